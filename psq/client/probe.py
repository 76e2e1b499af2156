"""Before joining: how fast is the link to a server, and what job does it run?

Both speak with a server that need not know this worker: HELLO, COOKIE, and then PROBE or a PLAN
without a body. Neither takes a rank, and nobody who holds it is disturbed. One frame is under way
at a time, so that what is measured is the link and not a queue.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import psq
from psq.client.waits import Backoff, Patience, Wait
from psq.errors import GaveUpError, RemoteProtocolError, RemoteWireError, StaleFrameError
from psq.keys import WorkerKeys
from psq.link import WorkerLink, wire_bytes
from psq.plan import Plan
from psq_proto.frames import HEADER_BYTES
from psq_proto.messages import MAX_PAYLOAD_BYTES, Bye, Error, Hello, MessageType
from psq_proto.session import Message, State, WorkerSession

__all__ = ["LinkRates", "ask_job", "probe_link"]

FIRST_BODY_BYTES: Final = 16 * 1024
BODY_GROWTH: Final = 4
ROUND_TRIPS: Final = 7
REPEATS: Final = 5
ENOUGH_S: Final = 0.03  # a body that takes so much longer than an empty one is large enough
PROBE_AGAIN_S: Final = 1.0  # a server that has other things to send lets an echo go
LEAST_S: Final = 1e-6  # clocks are no finer: no rate is infinite

_log = logging.getLogger("psq.client")


@dataclass(frozen=True, slots=True)
class LinkRates:
    """What a link was measured to do, by the frames that training sends.

    Attributes:
        round_trip_s: an empty frame there and back, the shortest of several.
        up_mbit_s, down_mbit_s: to the server and from it, the best of several; framing, checksums
            and what both processes take for a frame included.
    """

    round_trip_s: float
    up_mbit_s: float
    down_mbit_s: float


def probe_link(  # noqa: PLR0913 - a conversation gets its world as arguments
    endpoint: str,
    rank: int = 0,
    *,
    patience: Patience | None = None,
    rng: random.Random | None = None,
    clock: Callable[[], float] = time.monotonic,
    keys: WorkerKeys | None = None,
) -> LinkRates:
    """Measure the link to a server, in a fraction of a second on a fast one.

    Args:
        endpoint: the server's address.
        rank: whom to speak as; a server may know how many there are.
        patience: how long to wait for each answer.
        rng: nonces and jitter.
        clock: seconds, monotonic.
        keys: of the worker that asks, where links are encrypted.

    Raises:
        ConfigError: the endpoint is no address.
        GaveUpError: the server does not answer.
        RemoteError: it refuses, and says why.

    Cost: two frames of up to 1 MiB each way, `REPEATS` times; on a slow link smaller ones.
    """
    rng = rng or random.Random()  # noqa: S311 - nonces and jitter, no secrets
    talk = _Talk(endpoint, rank, patience or Patience(), rng, clock, keys=keys)
    try:
        talk.greet()
        return _measure(talk)
    finally:
        talk.link.close(0.0)


def ask_job(  # noqa: PLR0913 - a conversation gets its world as arguments
    endpoint: str,
    rank: int,
    patience: Patience | None = None,
    *,
    rng: random.Random | None = None,
    clock: Callable[[], float] = time.monotonic,
    keys: WorkerKeys | None = None,
) -> Plan:
    """The plan of the job that a server runs, as that server sees it; waits until there is one.

    Raises:
        ConfigError: the endpoint is no address.
        GaveUpError: the server does not answer, or has no job in time.
        RemotePlanError: its plan cannot be run here.
        RemoteError: it refuses, and says why.
    """
    rng = rng or random.Random()  # noqa: S311 - nonces and jitter, no secrets
    talk = _Talk(endpoint, rank, patience or Patience(), rng, clock, keys=keys)
    try:
        talk.greet()
        job = talk.exchange(MessageType.PLAN, MessageType.JOB, f"the job of server {endpoint}")
        return Plan.parse(job.body if isinstance(job.body, memoryview) else b"")
    finally:
        talk.link.close(0.0)


def _measure(talk: _Talk) -> LinkRates:
    empty_s = min(talk.probe(0, 0) for _ in range(ROUND_TRIPS))
    size = FIRST_BODY_BYTES
    while size < MAX_PAYLOAD_BYTES and talk.probe(size, 0) < empty_s + ENOUGH_S:
        size *= BODY_GROWTH
    size = min(size, MAX_PAYLOAD_BYTES)
    up_s = min(talk.probe(size, 0) for _ in range(REPEATS))
    both_s = min(talk.probe(size, size) for _ in range(REPEATS))
    mbit = 8e-6 * (wire_bytes(HEADER_BYTES + size) - wire_bytes(HEADER_BYTES))
    return LinkRates(
        round_trip_s=empty_s,
        up_mbit_s=mbit / max(LEAST_S, up_s - empty_s),
        down_mbit_s=mbit / max(LEAST_S, both_s - up_s),
    )


class _Talk:
    """A conversation that says one thing and waits for its answer; it begins again if it breaks."""

    def __init__(  # noqa: PLR0913 - a conversation gets its world as arguments
        self,
        endpoint: str,
        rank: int,
        patience: Patience,
        rng: random.Random,
        clock: Callable[[], float],
        *,
        keys: WorkerKeys | None,
    ) -> None:
        self.link = WorkerLink(endpoint, linger_s=0.0, keys=keys)
        self._session = WorkerSession(rank=rank, plan_body=b"")
        self._patience = patience
        self._rng = rng
        self._clock = clock
        self._seq = 0

    def greet(self) -> None:
        """From HELLO to COOKIE."""
        hello = Hello(self._rng.getrandbits(64), software=f"psq {psq.__version__}")
        self._until(
            lambda message: message.header.type is MessageType.COOKIE,
            lambda: bytes(self._session.send(MessageType.HELLO, hello)),
            f"server {self.link.endpoint}",
        )

    def exchange(
        self, ask: MessageType, answer: MessageType, what: str, body: bytes = b"", part: int = 0
    ) -> Message:
        """Say something, again where it may be lost, until the answer comes."""
        self._seq += 1
        seq = self._seq if ask is MessageType.PROBE else 0

        def say() -> bytes:
            if self._session.state is not State.COOKIED:
                self.greet()  # the connection broke, or the server began anew
            return bytes(self._session.send(ask, body, seq=seq, part=part))

        return self._until(
            lambda message: message.header.type is answer and message.header.seq == seq,
            say,
            what,
            PROBE_AGAIN_S if ask is MessageType.PROBE else 0.0,
        )

    def probe(self, body_bytes: int, back_bytes: int) -> float:
        """Seconds until so many bytes have gone up, and so many have come back."""
        body = bytes(body_bytes)
        started_s = self._clock()
        what = f"server {self.link.endpoint} to answer a probe"
        self.exchange(MessageType.PROBE, MessageType.ECHO, what, body, back_bytes)
        return self._clock() - started_s

    def _until(
        self,
        wanted: Callable[[Message], bool],
        say: Callable[[], bytes],
        what: str,
        least_s: float = 0.0,
    ) -> Message:
        """Say it again and again, `least_s` apart or more, until what is wanted has come."""
        wait, backoff = Wait(self._clock(), self._patience), Backoff(self._rng)
        say_at_s = self._clock()
        while True:
            now_s = self._clock()
            blocked = False
            if now_s >= say_at_s:
                blocked = not self.link.send(say())
                say_at_s = now_s + (0.0 if blocked else max(least_s, backoff.next_s()))
            words = wait.check(self._clock(), what)
            if words:
                _log.warning("%s", words)
            due_s = wait.due_s if blocked else min(wait.due_s, say_at_s)
            self.link.wait(max(0.0, due_s - self._clock()), room=blocked)
            for frame in self.link.drain():
                message = self._receive(frame)
                if message is not None and wanted(message):
                    return message

    def _receive(self, frame: memoryview) -> Message | None:
        try:
            message = self._session.receive(frame)
        except (StaleFrameError, RemoteWireError):
            return None  # of a conversation before, or damaged: it is asked for again
        if isinstance(message.body, Bye):
            msg = f"server {self.link.endpoint} ended the job ({message.body.reason})"
            raise GaveUpError(msg)
        if isinstance(message.body, Error):
            msg = f"the server refused ({message.body.code}): {message.body.text}"
            raise RemoteProtocolError(msg)
        return message

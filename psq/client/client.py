"""The thin shell around `machine`: the link, the clock, the waits, the thread that says "alive".

    join -> [begin -> (payload, push, poll) of each shard | skip -> finish]* -> leave

Inside `join`, `poll` and `finish` the calling thread drives the machine and weights are handed to
the hooks; in between the process computes, and a thread keeps sending heartbeats. The thread shares
link and machine under a lock that it only ever tries to take, and puts aside what it receives (at
most `INBOX_FRAMES`; the rest stays in libzmq's queue), so nothing is applied behind the caller's
back. Every wait is named on the log and ends.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from psq.client.machine import Hooks, Machine
from psq.client.pulse import Pulse
from psq.client.round import RoundResult
from psq.client.waits import Patience, Wait
from psq.errors import ConfigError, GaveUpError, PsqError
from psq.link import WorkerLink
from psq.plan import Plan
from psq_proto.messages import NONE, Leave, MessageType, clip_text

__all__ = ["INBOX_FRAMES", "Client"]

INBOX_FRAMES: Final = 256
HURRIED_LINGER_S: Final = 0.5  # after Ctrl-C or an error the process should be gone within 2 s
_TYPE_OFFSET: Final = 5

_log = logging.getLogger("psq.client")


class Client:
    """One worker's end of a job.

    One thread calls it. After an error that it raised, only `leave` makes sense.

    Args:
        endpoints: the server's address, or one for each server of the job, in their order.
        plan: what is trained.
        rank: this worker's number.
        hooks: see `psq.client.machine.Hooks`; called inside `join`, `poll` and `finish` only.
        patience: how it waits.
        rng: jitter, nonces and the lineage come from it.
        clock: seconds, monotonic.

    Raises:
        ConfigError: the rank is not in the plan, or the endpoint is no address.
    """

    def __init__(  # noqa: PLR0913 - a client gets its world as arguments
        self,
        endpoints: str | Sequence[str],
        plan: Plan,
        rank: int,
        hooks: Hooks,
        *,
        patience: Patience | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan = plan
        self.rank = rank
        self._patience = patience or Patience()
        self._clock = clock
        addresses = (endpoints,) if isinstance(endpoints, str) else tuple(endpoints)
        if len(addresses) != 1:
            msg = f"a job has one server, got {len(addresses)} addresses"
            raise ConfigError(msg)
        self._link = WorkerLink(addresses[0])
        self._machine = Machine(
            plan,
            rank,
            hooks,
            heartbeat_s=self._patience.heartbeat_s,
            rng=rng or random.Random(),  # noqa: S311 - jitter and names, no secrets
            is_lent=self._link.is_lent,
        )
        self._blocked = False
        self._inbox: deque[memoryview] = deque()
        self._lock = threading.Lock()
        self._pulse = Pulse(self._beat, self._patience.heartbeat_s)

    @property
    def version(self) -> int:
        """The version of the weights in the replica; -1 before `join`."""
        return self._machine.replica.version

    @property
    def versions(self) -> Sequence[int]:
        """The version of each shard; -1 before its first weights."""
        return self._machine.replica.versions

    @property
    def sent_bytes(self) -> int:
        """Bytes sent so far, as on the wire (see `psq.link`)."""
        return self._link.sent_bytes

    @property
    def received_bytes(self) -> int:
        """Bytes received so far, as on the wire."""
        return self._link.received_bytes

    @property
    def resent_frames(self) -> int:
        """Frames sent again because a connection lost them."""
        return self._machine.resent_frames

    @property
    def resets(self) -> int:
        """How often the residual had to start again from zero."""
        return self._machine.resets

    def join(self) -> int:
        """Join the job and take the weights; blocks until the server has some.

        Returns:
            The version of the weights: how many rounds the job has behind it.

        Raises:
            GaveUpError: the server did not answer in time, or ended the job.
            RefusedError, RemotePlanError, RemoteVersionError: it turned this worker away, and says
                why.
            FencedError: another process has this rank.
        """
        with self._lock:
            self._pump(lambda: self._machine.joined and self.version != NONE, self._patience)
        self._pulse.start()
        return self.version

    def begin(self, rate: float) -> int:
        """Open the next round, with the learning rate this worker asks for; returns its number."""
        with self._lock:
            return self._machine.begin(rate).number

    def payload(self, shard: int) -> NDArray[np.uint8]:
        """Where to encode a shard: u8[nbytes], the very bytes that `push` will send."""
        with self._lock:
            return self._machine.frames.payload(shard)

    def said(self, shard: int) -> NDArray[np.uint8]:
        """What was pushed last, for `Hooks.restore`."""
        return self._machine.frames.said(shard)

    def push(self, shard: int) -> None:
        """Send a shard that was encoded into `payload`; never blocks. Cost: one CRC pass."""
        with self._lock:
            self._machine.push(shard)
            self._flush()

    def skip(self, shard: int | None = None) -> None:
        """Contribute nothing to a shard, or to every shard that nothing was said of yet."""
        with self._lock:
            self._machine.skip(shard)
            self._flush()

    def takes_part(self, shard: int) -> bool:
        """Whether this step says something of a shard: one that does not is not to be pushed."""
        return self._machine.round is not None and 0 <= shard < len(self.plan.layout.shards)

    def poll(self) -> None:
        """Send what is due and take in what has come, weights included; never blocks.

        Raises:
            as `finish`, but for the wait.
        """
        with self._lock:
            self._flush()
            self._inbox.extend(self._link.drain())
            self._take_in()

    def finish(self) -> RoundResult:
        """Wait for the verdict and for the next weights.

        Raises:
            as `join`, and RemotePayloadError: the server sent weights that do not fit the plan, or
            says that a push does not; RemoteProtocolError: it came back without its state.
        """
        with self._lock:
            self._pump(lambda: self._machine.round_over, self._patience)
            return self._machine.end_round()

    def leave(self, reason: Literal["done", "error", "interrupted"], text: str = "") -> None:
        """Tell the server that this worker goes, and close the link. Safe to call twice.

        With "done" it waits up to `Patience.farewell_s` until the server has taken note, joining
        again to say it if the connection broke just now; else it lets go within half a second.
        """
        if self._link.closed:
            return
        self._pulse.stop()
        hurried = reason != "done"
        with self._lock:
            try:
                self._machine.leave(Leave(reason, clip_text(text)))
                if not hurried:
                    self._say_goodbye()
                else:
                    with suppress(PsqError):  # an interrupt may have left anything half done
                        self._flush()
            finally:
                self._link.close(HURRIED_LINGER_S if hurried else None)

    def _say_goodbye(self) -> None:
        bounded = replace(self._patience, give_up_after_s=self._patience.farewell_s)
        try:
            self._pump(lambda: self._machine.left, bounded)
        except GaveUpError as error:
            _log.warning("left without the server's answer: %s", error)

    def _pump(self, done: Callable[[], bool], patience: Patience) -> None:
        """Send what is due and take in what comes, until `done` or patience ends."""
        machine = self._machine
        machine.forget_status()
        wait = Wait(self._clock(), patience)
        while True:
            self._take_in()
            if done():
                return
            self._flush()
            if done():  # to find nobody there may be the end of a goodbye
                return
            self._report(wait)
            now_s = self._clock()
            due_s = machine.due_s
            if self._blocked and due_s <= now_s:
                due_s = wait.due_s  # it is due already and waits for room
            self._link.wait(max(0.0, min(wait.due_s, due_s) - now_s), room=self._blocked)
            self._inbox.extend(self._link.drain())

    def _take_in(self) -> None:
        while self._inbox:
            self._machine.receive(self._inbox.popleft(), self._clock())

    def _flush(self) -> None:
        """Send until nothing is due or the link has no room."""
        now_s = self._clock()
        self._blocked = False
        while (frame := self._machine.next_frame(now_s)) is not None:
            if not self._link.send(frame):
                self._machine.not_sent(now_s)
                self._blocked = True
                return
            self._machine.sent(now_s)

    def _report(self, wait: Wait) -> None:
        while self._machine.notes:
            _log.warning("%s", self._machine.notes.popleft())
        words = wait.check(
            self._clock(), self._machine.waited_for() or f"server {self._link.endpoint}"
        )
        if words:
            _log.warning("%s", words)

    def _beat(self) -> None:
        """A heartbeat from the thread, if nobody is at work on the link."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._link.closed or not self._machine.joined:
                return
            self._flush()
            for frame in self._link.drain(INBOX_FRAMES - len(self._inbox)):
                if len(frame) > _TYPE_OFFSET and frame[_TYPE_OFFSET] == MessageType.STATUS:
                    self._machine.answered_unseen()
                else:
                    self._inbox.append(frame)
        finally:
            self._lock.release()

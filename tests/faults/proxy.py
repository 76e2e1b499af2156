"""A TCP proxy that treats what passes as badly as a network can, and counts how often it did.

One thread forwards for all connections. A `Harm` is told every piece of each direction, and says
what is to be forwarded, and when, or that the connection is to end; so each kind of harm is a few
lines below.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from psq_proto.messages import MessageType

__all__ = [
    "Cut",
    "Harm",
    "Passed",
    "Proxy",
    "Stream",
    "cut_often",
    "delay",
    "duplicate",
    "flip",
    "hold",
    "nothing",
]

END_S: Final = 5.0
PIECE_BYTES: Final = 16_384
TICK_S: Final = 0.005
GREETING_BYTES: Final = 64
_LONG, _COMMAND = 2, 4
_REPEATED: Final = {
    MessageType.HELLO,
    MessageType.PUSH,
    MessageType.PULL,
    MessageType.HEARTBEAT,
    MessageType.LEAVE,
}


class Cut(Exception):  # noqa: N818 - no error: what a harm asks for
    """The connection is to be reset now."""


@dataclass(slots=True)
class Stream:
    """One direction of one connection, as a harm sees it.

    Attributes:
        up: from a worker to the server.
        rng: of the proxy.
        passed: how many bytes have come so far.
        greeted: how many of them were a greeting, for harms that look at frames.
        frame: the beginning of a frame that has not come whole, likewise.
    """

    up: bool
    rng: random.Random
    passed: int = 0
    greeted: int = 0
    frame: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True, slots=True)
class Passed:
    """What becomes of a piece: these bytes, so much later; `struck` if that is harm."""

    data: bytes
    delay_s: float = 0.0
    struck: bool = False


Harm = Callable[[Stream, bytes], Passed]


def nothing(_: Stream, data: bytes) -> Passed:
    """Forward."""
    return Passed(data)


def delay(least_s: float, most_s: float) -> Harm:
    """Each piece comes later, still in order."""

    def harm(stream: Stream, data: bytes) -> Passed:
        return Passed(data, stream.rng.uniform(least_s, most_s), struck=True)

    return harm


def flip(every_bytes: int) -> Harm:
    """One bit in about so many is another, in what workers say; never in the greeting."""

    def harm(stream: Stream, data: bytes) -> Passed:
        spoilt = stream.up and stream.passed > 4 * GREETING_BYTES
        if not spoilt or stream.rng.random() > len(data) / every_bytes:
            return Passed(data)
        changed = bytearray(data)
        changed[stream.rng.randrange(len(data))] ^= 1 << stream.rng.randrange(8)
        return Passed(bytes(changed), struck=True)

    return harm


def cut_often(every_bytes: int) -> Harm:
    """Connections are reset, in the middle of whatever that is, about every so many bytes."""

    def harm(stream: Stream, data: bytes) -> Passed:
        if stream.passed > 4 * GREETING_BYTES and stream.rng.random() < len(data) / every_bytes:
            raise Cut
        return Passed(data)

    return harm


def duplicate(share: float) -> Harm:
    """Such a share of whole messages comes twice, in what workers say of rounds.

    TCP never does that; PLAN or JOIN twice in one stream is an error, and refused.
    """

    def harm(stream: Stream, data: bytes) -> Passed:
        if not stream.up:
            return Passed(data)
        greeting = max(0, GREETING_BYTES - stream.greeted)  # goes on as it comes: it takes turns
        made, struck = bytearray(data[:greeting]), False
        stream.greeted += len(made)
        stream.frame += data[greeting:]
        while (size := _frame_bytes(stream)) and len(stream.frame) >= size:
            whole = stream.frame[:size]
            del stream.frame[:size]
            again = _kind(whole) in _REPEATED and stream.rng.random() < share
            made += whole + whole * again
            struck |= again
        return Passed(bytes(made), struck=struck)

    return harm


def _kind(frame: bytearray) -> int:
    """The type of psq's message in a whole frame; -1 if there is none."""
    body = frame[9:] if frame[0] & _LONG else frame[2:]
    return body[5] if body[:4] == b"PSQW" and not frame[0] & _COMMAND else -1


def _frame_bytes(stream: Stream) -> int:
    """How long the frame is that begins here; 0 if that has not come."""
    if len(stream.frame) < 2:
        return 0
    if not stream.frame[0] & _LONG:
        return 2 + stream.frame[1]
    if len(stream.frame) < 9:
        return 0
    (size,) = struct.unpack_from(">Q", stream.frame, 1)
    return 9 + int(size)


def hold(*, up: bool = True, down: bool = True) -> Harm:
    """Nothing passes, in one direction or both, and nobody is told: a half-open connection."""

    def harm(stream: Stream, data: bytes) -> Passed:
        held = up if stream.up else down
        return Passed(b"", struck=True) if held else Passed(data)

    return harm


class Proxy:
    """Forwards connections to a target, with whatever `harm` is set at the moment.

    Args:
        target: an endpoint.
        seed: of what is left to chance.

    Attributes:
        endpoint: what clients connect to.
        harm: may be changed at any time.
        struck: how often a harm did any.
    """

    def __init__(self, target: str, seed: int = 1) -> None:
        host, port = target.removeprefix("tcp://").rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.harm: Harm = nothing
        self.struck = 0
        self._rng = random.Random(seed)  # noqa: S311 - no secret
        self._peers: dict[socket.socket, socket.socket] = {}
        self._streams: dict[socket.socket, Stream] = {}
        self._due: list[tuple[float, int, socket.socket, bytes]] = []
        self._last_s: dict[socket.socket, float] = {}
        self._order = itertools.count()
        self._cut_all = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Reset every connection."""
        self._cut_all.set()

    def close(self) -> None:
        """Reset every connection, and listen no more."""
        self._stop.set()
        self._thread.join(END_S)
        for end in list(self._peers):
            self._cut(end)
        self._listener.close()

    def _serve(self) -> None:
        while not self._stop.is_set():
            if self._cut_all.is_set():
                self._cut_all.clear()
                for end in list(self._peers):
                    self.struck += end in self._peers
                    self._cut(end)
            for end in select.select([self._listener, *self._peers], [], [], TICK_S)[0]:
                self._accept() if end is self._listener else self._forward(end)
            self._release()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(self._target, timeout=END_S)
        except OSError:
            client.close()
            return
        for one, other, up in ((client, server, True), (server, client, False)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            one.settimeout(END_S)
            self._peers[one] = other
            self._streams[one] = Stream(up, self._rng)

    def _forward(self, source: socket.socket) -> None:
        if source not in self._peers:
            return  # cut while we were looking
        stream = self._streams[source]
        try:
            data = source.recv(PIECE_BYTES)
            passed = self.harm(stream, data) if data else None
        except (OSError, Cut) as error:
            self.struck += isinstance(error, Cut)
            passed = None
        if passed is None:
            self._cut(source)
            return
        stream.passed += len(data)
        self.struck += passed.struck
        due_s = max(time.monotonic() + passed.delay_s, self._last_s.get(source, 0.0))
        self._last_s[source] = due_s
        heapq.heappush(self._due, (due_s, next(self._order), source, passed.data))

    def _release(self) -> None:
        """Send what is due."""
        while self._due and self._due[0][0] <= time.monotonic():
            *_, source, data = heapq.heappop(self._due)
            if source in self._peers and data:
                try:
                    self._peers[source].sendall(data)
                except OSError:
                    self._cut(source)

    def _cut(self, end: socket.socket) -> None:
        other = self._peers.pop(end, None)
        for each in (end, other):
            if each is None:
                continue
            self._peers.pop(each, None)
            self._streams.pop(each, None)
            self._last_s.pop(each, None)
            with contextlib.suppress(OSError):
                # No lingering: the other side gets a RST, not an orderly end.
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            each.close()

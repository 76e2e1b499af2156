"""What both ends of the wire share: socket options, the poll, the counters, lent buffers.

See `psq.link`, which says what the options are for.
"""

from __future__ import annotations

import math
from enum import Enum
from types import TracebackType
from typing import Final, Self, TypeAlias

import zmq

from psq.errors import ConfigError, UsageError
from psq_proto.frames import MAX_FRAME_BYTES

__all__ = [
    "DRAIN_LIMIT",
    "QUEUE_FRAMES",
    "SERVER_LINGER_S",
    "WORKER_LINGER_S",
    "ZERO_COPY_BYTES",
    "Buffer",
    "Link",
    "Sent",
    "check_libzmq",
    "libzmq_version",
    "make_context",
    "poll_ms",
    "wire_bytes",
]

Buffer: TypeAlias = bytes | bytearray | memoryview

MIN_LIBZMQ: Final = (4, 3, 5)
# Below this a copy is cheaper than lending: what is lent comes back by way of a thread of pyzmq's,
# which takes the GIL for each frame. (Measured with frames of 131 KiB: 0.02 to 0.1 of the CPU of a
# step, the more the busier the cores are; its time is the same.)
# Far above it malloc may map fresh pages for each copy (see `process.keep_freed_memory`).
ZERO_COPY_BYTES: Final = 256 * 1024
DRAIN_LIMIT: Final = 64  # messages taken in one go, before the loop looks at its clock again
QUEUE_FRAMES: Final = 64  # SNDHWM and RCVHWM
WORKER_LINGER_S: Final = 2.0
SERVER_LINGER_S: Final = 0.5
RECONNECT_MS: Final = 100
MAX_RECONNECT_MS: Final = 500  # a server that came back is not to wait for its workers

_SHORT_FRAME_BYTES: Final = 255
_SHORT_FRAMING_BYTES: Final = 2
_LONG_FRAMING_BYTES: Final = 9


def libzmq_version() -> tuple[int, int, int]:
    """The version of the libzmq that pyzmq is linked to."""
    return zmq.zmq_version_info()


def check_libzmq() -> None:
    """Refuse a libzmq older than the one every measured fact above was seen on.

    Raises:
        ConfigError: libzmq is older than 4.3.5.
    """
    version = libzmq_version()
    if version < MIN_LIBZMQ:
        msg = (
            f"libzmq {'.'.join(map(str, version))} is too old, psq needs "
            f"{'.'.join(map(str, MIN_LIBZMQ))}: upgrade pyzmq, or the libzmq it was built against"
        )
        raise ConfigError(msg)


def wire_bytes(frame_bytes: int) -> int:
    """What a frame of this size takes on the wire, ZMTP's framing included."""
    long = frame_bytes > _SHORT_FRAME_BYTES
    return frame_bytes + (_LONG_FRAMING_BYTES if long else _SHORT_FRAMING_BYTES)


class Sent(Enum):
    """What became of a frame handed to `ServerLink.send`."""

    QUEUED = "queued"
    FULL = "full"  # the peer's queue is at its limit: it reads too slowly, try again later
    GONE = "gone"  # nobody is connected under this peer id


class Link:
    """What both ends share: the context, the poll, the drain, the counters, the lent buffers."""

    def __init__(
        self, kind: int, endpoint: str, linger_s: float, context: zmq.Context[zmq.Socket[bytes]]
    ) -> None:
        self.sent_bytes = 0
        self.received_bytes = 0
        self.sent_frames = 0
        self.received_frames = 0
        self.refused = 0
        self._added_bytes = 0  # to each frame, by encryption
        self._linger_ms = round(linger_s * 1000)
        self._lent: dict[int, tuple[Buffer, list[zmq.MessageTracker]]] = {}
        self._sweep_at = QUEUE_FRAMES
        self._context = context
        self._socket = context.socket(kind)
        _set_options(self._socket, endpoint, self._linger_ms)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return bool(self._socket.closed)

    def watch(self, other: int | Link) -> None:
        """Let `wait` also return when another link, or a signal's descriptor, can be read."""
        self._poller.register(other if isinstance(other, int) else other._socket, zmq.POLLIN)  # noqa: SLF001 - its own class

    def unwatch(self, descriptor: int) -> None:
        """It is closed, or will be."""
        self._poller.unregister(descriptor)

    def wait(self, timeout_s: float) -> bool:
        """Block until a message can be read, a watched descriptor is readable, or the time is up.

        Returns:
            Whether a message can be read.
        """
        ready = self._poller.poll(poll_ms(timeout_s))
        return any(source is self._socket and event & zmq.POLLIN for source, event in ready)

    def is_lent(self, frame: Buffer) -> bool:
        """Whether libzmq still reads this buffer: then it must not be written to.

        Buffers below `ZERO_COPY_BYTES` are copied by `send`, unless it is told to lend them.
        """
        entry = self._lent.get(id(frame))
        if entry is None:
            return False
        if not all(tracker.done for tracker in entry[1]):
            return True
        self._lent.pop(id(frame), None)
        return False

    def close(self, linger_s: float | None = None) -> None:
        """Close; what is queued has up to `linger_s` (default: the link's own) to leave.

        Safe to call twice.
        """
        if self._socket.closed:
            return
        self._shut(linger_s)
        self._context.term()
        self._lent.clear()

    def _shut(self, linger_s: float | None) -> None:
        """Close the socket alone: what it lent comes back when the context ends."""
        self._socket.close(self._linger_ms if linger_s is None else round(linger_s * 1000))

    def _put(self, frame: Buffer, *, lend: bool = False) -> None:
        """Hand one last part to libzmq. Raises zmq.ZMQError (Again when there is no room)."""
        if len(frame) > MAX_FRAME_BYTES:
            msg = (
                f"a frame of {len(frame)} bytes, the limit is {MAX_FRAME_BYTES}: "
                "the layout must cut smaller shards"
            )
            raise UsageError(msg)
        if len(frame) < ZERO_COPY_BYTES and not lend:
            self._socket.send(frame, zmq.DONTWAIT)
        else:
            whole = zmq.Frame(frame, track=True, copy=False, copy_threshold=0)
            tracker = self._socket.send(whole, zmq.DONTWAIT, copy=False, track=True)
            self._lend(frame, tracker)
        self.sent_frames += 1
        self.sent_bytes += wire_bytes(len(frame) + self._added_bytes)

    def _lend(self, frame: Buffer, tracker: zmq.MessageTracker) -> None:
        # The table holds the buffer itself: its id stays its own for as long as the entry lives.
        _, trackers = self._lent.setdefault(id(frame), (frame, []))
        trackers[:] = [old for old in trackers if not old.done]
        trackers.append(tracker)
        if len(self._lent) > self._sweep_at:
            for key in [k for k, (_, live) in self._lent.items() if all(t.done for t in live)]:
                del self._lent[key]
            self._sweep_at = max(QUEUE_FRAMES, 2 * len(self._lent))

    def _take(self) -> zmq.Frame | None:
        """The last part of the next message, or None (dropped, counted) if it has several."""
        part = self._part()
        if part.more:
            while self._part().more:
                pass
            self.refused += 1
            return None
        self.received_frames += 1
        return part

    def _part(self) -> zmq.Frame:
        part = self._socket.recv(zmq.DONTWAIT, copy=False)
        self.received_bytes += wire_bytes(len(part) + self._added_bytes)
        return part


def make_context() -> zmq.Context[zmq.Socket[bytes]]:
    """A context of its own for each link, or group of links.

    Raises:
        ConfigError: libzmq is too old.
    """
    check_libzmq()
    return zmq.Context()


def poll_ms(timeout_s: float) -> int:
    """Seconds as a poll takes them, rounded up: with 0 a caller half a millisecond early spins."""
    return max(0, math.ceil(timeout_s * 1000))


def _set_options(socket: zmq.Socket[bytes], endpoint: str, linger_ms: int) -> None:
    options = {
        zmq.MAXMSGSIZE: MAX_FRAME_BYTES,
        zmq.RCVHWM: QUEUE_FRAMES,
        zmq.SNDHWM: QUEUE_FRAMES,
        zmq.LINGER: linger_ms,
        zmq.HANDSHAKE_IVL: 3000,
        zmq.CONNECT_TIMEOUT: 1000,
        zmq.RECONNECT_IVL: RECONNECT_MS,
        zmq.RECONNECT_IVL_MAX: MAX_RECONNECT_MS,
        zmq.TCP_KEEPALIVE: 1,
        zmq.TCP_KEEPALIVE_IDLE: 5,
        zmq.TCP_KEEPALIVE_INTVL: 2,
        zmq.TCP_KEEPALIVE_CNT: 3,
        zmq.TCP_MAXRT: 30_000,
        zmq.HEARTBEAT_IVL: 0,
        zmq.IMMEDIATE: 1,
        zmq.IPV6: int("[" in endpoint),  # only where one is written: "localhost" stays 127.0.0.1
    }
    for option, value in options.items():
        socket.setsockopt(option, value)

"""The wire: DEALERs for a worker, a ROUTER for a server, one ZeroMQ frame per message.

This is the only module that imports zmq. It moves frames and counts bytes; it never looks inside a
frame, keeps no protocol state and starts no thread. A link belongs to one thread at a time: who
shares one brings a lock.

What the options are for (all measured against libzmq 4.3.5):

- No ZMTP heartbeats: a busy peer past its receive limit aborts the process. TCP keepalive finds
  dead hosts, and the protocol's own heartbeats find dead processes.
- `IMMEDIATE`: nothing queues for a server that is not connected, and what was queued for a
  connection that broke is dropped with it. A `send` that finds no connection says so, and a
  restarted server meets no stale frames. The price: what came just before the connection broke, and
  was not taken yet, is dropped as well; a goodbye may never be read.
- `ROUTER_MANDATORY`, and sends that never block: a full or vanished worker is an answer.
- `MAXMSGSIZE` and the high-water marks bound one frame and one queue. They do not bound a message
  of many frames, so psq's messages have exactly one: any other is dropped and counted in `refused`.
- `LINGER` is explicit, because the default waits for ever at exit.

Bytes are counted as they are on the wire: a frame with its header, plus the framing ZMTP puts
before it, which is 2 bytes up to 255 and 9 bytes above. Not counted: TCP/IP headers, and the
greeting of about 200 bytes per connection.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Collection, Iterator, Sequence
from enum import Enum
from types import TracebackType
from typing import Final, Self, TypeAlias

import zmq

from psq.errors import ConfigError, UsageError
from psq_proto.frames import MAX_FRAME_BYTES

__all__ = [
    "DRAIN_LIMIT",
    "MAX_FRAME_BYTES",
    "SERVER_LINGER_S",
    "WORKER_LINGER_S",
    "ZERO_COPY_BYTES",
    "Buffer",
    "Sent",
    "ServerLink",
    "WorkerLink",
    "WorkerLinks",
    "check_libzmq",
    "libzmq_version",
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


class _Link:
    """What both ends share: the context, the poll, the drain, the counters, the lent buffers."""

    def __init__(
        self, kind: int, endpoint: str, linger_s: float, context: zmq.Context[zmq.Socket[bytes]]
    ) -> None:
        self.sent_bytes = 0
        self.received_bytes = 0
        self.sent_frames = 0
        self.received_frames = 0
        self.refused = 0
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

    def watch(self, other: int | WorkerLink) -> None:
        """Let `wait` also return when another link, or a signal's descriptor, can be read."""
        self._poller.register(other if isinstance(other, int) else other._socket, zmq.POLLIN)  # noqa: SLF001 - one class in two parts

    def wait(self, timeout_s: float) -> bool:
        """Block until a message can be read, a watched descriptor is readable, or the time is up.

        Returns:
            Whether a message can be read.
        """
        ready = self._poller.poll(_poll_ms(timeout_s))
        return any(source is self._socket and event & zmq.POLLIN for source, event in ready)

    def is_lent(self, frame: Buffer) -> bool:
        """Whether libzmq still reads this buffer: then it must not be written to.

        Only buffers of `ZERO_COPY_BYTES` and more are ever lent; a smaller one is copied by `send`.
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

    def _put(self, frame: Buffer) -> None:
        """Hand one last part to libzmq. Raises zmq.ZMQError (Again when there is no room)."""
        if len(frame) > MAX_FRAME_BYTES:
            msg = (
                f"a frame of {len(frame)} bytes, the limit is {MAX_FRAME_BYTES}: "
                "the layout must cut smaller shards"
            )
            raise UsageError(msg)
        if len(frame) < ZERO_COPY_BYTES:
            self._socket.send(frame, zmq.DONTWAIT)
        else:
            tracker = self._socket.send(frame, zmq.DONTWAIT, copy=False, track=True)
            self._lend(frame, tracker)
        self.sent_frames += 1
        self.sent_bytes += wire_bytes(len(frame))

    def _lend(self, frame: Buffer, tracker: zmq.MessageTracker) -> None:
        # The table holds the buffer itself: its id stays its own for as long as the entry lives.
        _, trackers = self._lent.setdefault(id(frame), (frame, []))
        trackers[:] = [old for old in trackers if not old.done]
        trackers.append(tracker)
        if len(self._lent) > self._sweep_at:
            for key in [k for k, (_, live) in self._lent.items() if all(t.done for t in live)]:
                del self._lent[key]
            self._sweep_at = max(QUEUE_FRAMES, 2 * len(self._lent))

    def _take(self) -> memoryview | None:
        """The last part of the next message, or None (dropped, counted) if it has several."""
        part = self._part()
        if part.more:
            while self._part().more:
                pass
            self.refused += 1
            return None
        self.received_frames += 1
        return part.buffer

    def _part(self) -> zmq.Frame:
        part = self._socket.recv(zmq.DONTWAIT, copy=False)
        self.received_bytes += wire_bytes(len(part))
        return part


class WorkerLink(_Link):
    """A worker's end: a DEALER connected to one server, reconnecting by itself.

    Args:
        endpoint: the server, such as tcp://10.0.0.5:5555. A host name is looked up at each attempt.
        linger_s: how long `close` waits for what is queued.
        context: of the group that this link belongs to, which then ends it; none for one alone.

    Raises:
        ConfigError: the endpoint is no ZeroMQ address, or libzmq is too old.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        linger_s: float = WORKER_LINGER_S,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        super().__init__(zmq.DEALER, endpoint, linger_s, context or _context())
        self.endpoint = endpoint
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._shut(0.0)
            if context is None:
                self._context.term()
            msg = (
                f"cannot connect to {endpoint!r}: {error.strerror}; "
                "write an address such as tcp://10.0.0.5:5555"
            )
            raise ConfigError(msg) from error

    def send(self, frame: Buffer) -> bool:
        """Queue one frame without blocking; False when no server is connected or the queue is full.

        A frame of `ZERO_COPY_BYTES` or more is shared with libzmq, not copied: see `is_lent`.
        """
        try:
            self._put(frame)
        except zmq.Again:
            return False
        return True

    def wait(self, timeout_s: float, *, room: bool = False) -> bool:
        """As for every link; with `room` it also ends when `send` would find room."""
        if not room:
            return super().wait(timeout_s)
        self._poller.modify(self._socket, zmq.POLLIN | zmq.POLLOUT)
        try:
            return super().wait(timeout_s)
        finally:
            self._poller.modify(self._socket, zmq.POLLIN)

    def wait_room(self, timeout_s: float) -> bool:
        """Block until `send` would find room, or the time is up."""
        return bool(self._socket.poll(_poll_ms(timeout_s), zmq.POLLOUT))

    def drain(self, limit: int = DRAIN_LIMIT) -> Iterator[memoryview]:
        """The messages that have arrived, at most `limit`, without blocking."""
        for _ in range(limit):
            try:
                frame = self._take()
            except zmq.Again:
                return
            if frame is not None:
                yield frame


class WorkerLinks:
    """A worker's ends to all servers of a job: one context, and one wait for all of them.

    Args:
        endpoints: the servers, in the job's order.
        linger_s: how long `close` waits for what is queued, for all links together.

    Raises:
        ConfigError: as `WorkerLink`.
    """

    def __init__(self, endpoints: Sequence[str], *, linger_s: float = WORKER_LINGER_S) -> None:
        self._context = _context()
        self._poller = zmq.Poller()
        self._index: dict[zmq.Socket[bytes], int] = {}
        links: list[WorkerLink] = []
        try:
            for endpoint in endpoints:
                link = WorkerLink(endpoint, linger_s=linger_s, context=self._context)
                self._index[link._socket] = len(links)  # noqa: SLF001 - one class in two parts
                links.append(link)
        finally:
            self.links = tuple(links)
            if len(links) < len(endpoints):
                self.close(0.0)
        for socket in self._index:
            self._poller.register(socket, zmq.POLLIN)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return bool(self._context.closed)

    def wait(self, timeout_s: float, room: Collection[int] = ()) -> list[int]:
        """Block until a message can be read, or a link in `room` can send, or the time is up.

        Returns:
            The links, by their places, that have a message to read.
        """
        sockets = [self.links[index]._socket for index in room]  # noqa: SLF001 - see above
        for socket in sockets:
            self._poller.modify(socket, zmq.POLLIN | zmq.POLLOUT)
        try:
            ready = self._poller.poll(_poll_ms(timeout_s))
        finally:
            for socket in sockets:
                self._poller.modify(socket, zmq.POLLIN)
        return [self._index[socket] for socket, event in ready if event & zmq.POLLIN]

    def close(self, linger_s: float | None = None) -> None:
        """Close all; what is queued has up to `linger_s` (default: their own) to leave.

        Safe to call twice.
        """
        for link in self.links:
            if not link.closed:
                link._shut(linger_s)  # noqa: SLF001 - see above
        self._context.term()


class ServerLink(_Link):
    """A server's end: a ROUTER bound to one address.

    A peer id names a connection, not a worker: the same worker has another one after it reconnects.

    Args:
        bind: where to listen, such as tcp://127.0.0.1:5555; port 0 takes a free
            one, see `endpoint`.
        linger_s: how long `close` waits for what is queued.
        queue_frames: how many frames may wait for one slow worker before `send` answers
            `Sent.FULL`.

    Raises:
        ConfigError: the address is taken, is not this machine's, or is no ZeroMQ address; or
            libzmq is too old.
    """

    def __init__(
        self, bind: str, *, linger_s: float = SERVER_LINGER_S, queue_frames: int = QUEUE_FRAMES
    ) -> None:
        super().__init__(zmq.ROUTER, bind, linger_s, _context())
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.BACKLOG, 1024)
        self._socket.setsockopt(zmq.SNDHWM, queue_frames)
        try:
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(_bind_failure(bind, error)) from error
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def send(self, peer: bytes, frame: Buffer) -> Sent:
        """Queue one frame for a peer without blocking.

        A frame of `ZERO_COPY_BYTES` or more is shared with libzmq, not copied: the same buffer can
        go to every worker and costs its memory once, and must stay as it is while `is_lent`.
        """
        try:
            self._socket.send(peer, zmq.DONTWAIT | zmq.SNDMORE)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno == errno.EHOSTUNREACH:
                return Sent.GONE
            raise
        self._put(frame)
        return Sent.QUEUED

    def drain(self, limit: int = DRAIN_LIMIT) -> Iterator[tuple[bytes, memoryview]]:
        """The (peer id, frame) pairs that have arrived, at most `limit`, without blocking."""
        for _ in range(limit):
            try:
                peer = self._socket.recv(zmq.DONTWAIT)
                frame = self._take()
            except zmq.Again:
                return
            if frame is not None:
                yield peer, frame


def _context() -> zmq.Context[zmq.Socket[bytes]]:
    check_libzmq()
    return zmq.Context()


def _poll_ms(timeout_s: float) -> int:
    # Rounded up: a caller whose deadline is half a millisecond away would spin with 0.
    return max(0, math.ceil(timeout_s * 1000))


def _set_options(socket: zmq.Socket[bytes], endpoint: str, linger_ms: int) -> None:
    options = {
        zmq.MAXMSGSIZE: MAX_FRAME_BYTES,
        zmq.RCVHWM: QUEUE_FRAMES,
        zmq.SNDHWM: QUEUE_FRAMES,
        zmq.LINGER: linger_ms,
        zmq.HANDSHAKE_IVL: 3000,
        zmq.CONNECT_TIMEOUT: 1000,
        zmq.RECONNECT_IVL: 100,
        zmq.RECONNECT_IVL_MAX: 5000,
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


def _bind_failure(bind: str, error: zmq.ZMQError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"cannot listen on {bind}: the address is in use; stop the process that has it, "
            "or choose another port (0 takes a free one)"
        )
    if error.errno in {errno.ENODEV, errno.EADDRNOTAVAIL}:
        return f"cannot listen on {bind}: this machine has no such address (127.0.0.1 is its own)"
    return (
        f"cannot listen on {bind!r}: {error.strerror}; "
        "write an address such as tcp://127.0.0.1:5555"
    )

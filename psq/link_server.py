"""A server's end of the wire: a ROUTER, its door and its connections.

See `psq.link` for the options, `psq.curve` for the door, `psq.connections` for what is watched.
"""

from __future__ import annotations

import errno
import resource
import time
from collections.abc import Container, Iterator
from typing import Final

import zmq

from psq.connections import MAX_CONNECTIONS, SWEEP_S, Connections
from psq.curve import CURVE_BYTES, Doorman, canary, use_server_keys
from psq.errors import ConfigError
from psq.keys import Authorized, ServerKeys
from psq.link_base import (
    DRAIN_LIMIT,
    QUEUE_FRAMES,
    SERVER_LINGER_S,
    Buffer,
    Link,
    Sent,
    make_context,
    poll_ms,
    wire_bytes,
)

__all__ = ["ServerLink", "connection_limit"]

NOTES_PER_PERIOD: Final = 8
NOTES_PERIOD_S: Final = 10.0
_SPARE_FILES: Final = 256  # descriptors that connections leave to everything else
_NO_DESCRIPTOR: Final = -1
MAX_PARTS: Final = 64
"""Of a message that is dropped: psq's have one part. Each costs the loop a microsecond."""
_REVOKED: Final = "a connection whose key is not authorized any more was ended"


class _Notes:
    """Lines for the log, a few in each period; the rest is counted."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._period_s = 0.0
        self._left = NOTES_PER_PERIOD
        self._untold = 0

    def add(self, line: str) -> None:
        """Take a line, or count it."""
        now_s = time.monotonic()
        if now_s >= self._period_s:
            if self._untold:
                self._lines.append(f"and {self._untold} more such lines in {NOTES_PERIOD_S:g} s")
            self._period_s, self._left = now_s + NOTES_PERIOD_S, NOTES_PER_PERIOD
            self._untold = 0
        if self._left:
            self._left -= 1
            self._lines.append(line)
        else:
            self._untold += 1

    def take(self) -> list[str]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def clear(self) -> None:
        """Forget all."""
        self.__init__()  # type: ignore[misc]


class ServerLink(Link):
    """A server's end: a ROUTER bound to one address.

    A peer id names a connection, not a worker: the same worker has another one after it reconnects.
    With keys, `key` says whose a frame is; a peer id may come under another key later.

    Args:
        bind: where to listen, such as tcp://127.0.0.1:5555; port 0 takes a free
            one, see `endpoint`.
        linger_s: how long `close` waits for what is queued.
        queue_frames: how many frames may wait for one slow worker before `send` answers
            `Sent.FULL`.
        keys: the server's own, and where those of its workers are; none: nothing is encrypted, and
            everybody is let in.
        max_connections: more are hung up on; by default as many as there are descriptors for.

    Attributes:
        endpoint: where it listens.
        key: whose the frame is that `drain` has just given.

    Raises:
        ConfigError: the address is taken, is not this machine's, or is no ZeroMQ address; libzmq is
            too old; or a key that was made up was let in.
    """

    def __init__(
        self,
        bind: str,
        *,
        linger_s: float = SERVER_LINGER_S,
        queue_frames: int = QUEUE_FRAMES,
        keys: ServerKeys | None = None,
        max_connections: int | None = None,
    ) -> None:
        super().__init__(zmq.ROUTER, bind, linger_s, make_context())
        self.key: Authorized | None = None
        self._notes = _Notes()
        self._house_s = 0.0
        self._doorman: Doorman | None = None
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.BACKLOG, 1024)
        self._socket.setsockopt(zmq.SNDHWM, queue_frames)
        limit = max_connections or connection_limit()
        self._connections = Connections(self._socket, self._notes.add, limit)
        self._poller.register(self._connections.socket, zmq.POLLIN)
        try:
            if keys is not None:
                self._employ(keys)
            self._socket.bind(bind)
            self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
            self._connections.listens_on(self.endpoint)
            if keys is not None:
                canary(_from_here(self.endpoint), keys.own.public, lambda: self._wait(0.0))
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(_bind_failure(bind, error)) from error
        except BaseException:
            self.close()
            raise
        self._notes.clear()  # of the canary

    @property
    def encrypted(self) -> bool:
        """Whether only known keys are let in."""
        return self._doorman is not None

    @property
    def refused_keys(self) -> int:
        """Handshakes that were refused for their key; one is the canary's."""
        return self._doorman.refused if self._doorman is not None else 0

    @property
    def hung_up(self) -> int:
        """Connections that were ended from here."""
        return self._connections.hung_up

    @property
    def connections(self) -> int:
        """TCP connections that there are, those included that have said nothing yet."""
        return len(self._connections)

    @property
    def members(self) -> Container[bytes]:
        """The peers that speak for a rank: others have less room, see `psq.connections`."""
        return self._connections.members

    @members.setter
    def members(self, members: Container[bytes]) -> None:
        self._connections.members = members

    def notes(self) -> list[str]:
        """Lines for the log since the last call; floods are counted, not told."""
        return self._notes.take()

    def ended(self) -> list[bytes]:
        """Peers whose connection has ended since the last call, and of whom all was read."""
        return self._connections.ended()

    def wait(self, timeout_s: float) -> bool:
        """As for every link. Strangers are turned away, and connections watched, in here only."""
        ends_s = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, ends_s - time.monotonic())
            readable, woken = self._wait(min(left_s, SWEEP_S))
            if readable or woken or left_s <= SWEEP_S:
                return readable

    def send(self, peer: bytes, frame: Buffer, *, lend: bool = False) -> Sent:
        """Queue one frame for a peer without blocking.

        A frame of `ZERO_COPY_BYTES` or more is shared with libzmq, not copied: the same buffer can
        go to every worker and costs its memory once, and must stay as it is while `is_lent`. So is
        a smaller one with `lend`, by which its sender sees when it has left.
        """
        try:
            self._socket.send(peer, zmq.DONTWAIT | zmq.SNDMORE)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno == errno.EHOSTUNREACH:
                return Sent.GONE
            raise
        self._put(frame, lend=lend)
        return Sent.QUEUED

    def drain(self, limit: int = DRAIN_LIMIT) -> Iterator[tuple[bytes, memoryview]]:
        """The (peer id, frame) pairs that have arrived, at most `limit`, without blocking.

        While the caller has one, `key` is that of whoever sent it. What came under a key that is
        not authorized any more is dropped.
        """
        for _ in range(limit):
            try:
                peer = self._socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                self._connections.drained()
                return
            frame = self._take_from(peer)
            if frame is not None:
                yield peer, frame

    def _take_from(self, peer: bytes) -> memoryview | None:
        """The one part of a message, or None if it has several or no authorized key."""
        part, parts = self._part(), 1
        fd = _descriptor(part)
        public = str(part.get("User-Id")) if self._doorman is not None else ""
        nbytes = wire_bytes(len(part) + self._added_bytes)
        last = part
        while last.more:
            last, parts = self._part(), parts + 1
            nbytes += wire_bytes(len(last) + self._added_bytes)
        self._connections.came(fd, peer, public, nbytes)
        if parts > 1 or fd == _NO_DESCRIPTOR:
            self.refused += 1
            if parts > MAX_PARTS:
                self._connections.hang_up(
                    fd, "a message had more parts than anybody needs: hung up"
                )
            return None
        if self._doorman is not None:
            self.key = self._doorman.authorized.get(public)
            if self.key is None:
                self.refused += 1
                self._connections.hang_up(fd, _REVOKED)
                return None
        self.received_frames += 1
        return part.buffer

    def _employ(self, keys: ServerKeys) -> None:
        """Let in authorized keys only."""
        self._added_bytes = CURVE_BYTES
        self._doorman = Doorman(self._context, self._poller, keys.authorized, self._notes.add)
        use_server_keys(self._socket, keys)

    def _wait(self, timeout_s: float) -> tuple[bool, bool]:
        """(whether a message can be read, whether something else that is watched can)."""
        ready = dict(self._poller.poll(poll_ms(timeout_s)))
        readable = bool(ready.pop(self._socket, 0) & zmq.POLLIN)
        if ready:
            if ready.pop(self._connections.socket, 0):
                self._connections.hear()
            if self._doorman is not None:
                knocks = [ready.pop(socket, 0) for socket in self._doorman.sockets]
                if any(knocks):
                    self._doorman.answer()
        now_s = time.monotonic()
        if now_s >= self._house_s:
            self._house_s = now_s + SWEEP_S
            self._keep_house(now_s)
        return readable, bool(ready)

    def _keep_house(self, now_s: float) -> None:
        """See who is let in now, and who is to be hung up on."""
        if self._doorman is not None:
            self._doorman.renew(now_s)
            if self._doorman.reload(now_s):
                self._connections.keep_only(self._doorman.authorized, _REVOKED)
        self._connections.sweep(now_s)

    def _shut(self, linger_s: float | None) -> None:
        self._connections.close()
        super()._shut(linger_s)
        if self._doorman is not None:
            self._doorman.close()


def connection_limit() -> int:
    """How many connections this process has descriptors for, once it has all that it may have.

    The soft limit of the process is raised to the hard one where that is needed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CONNECTIONS + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, (soft - _SPARE_FILES) // 2))


def _descriptor(part: zmq.Frame) -> int:
    """Which connection a frame came through; none is known of one that speaks ZMTP 1 or 2.

    psq speaks 3, so what comes through such a one is dropped.
    """
    try:
        return int(part.get(zmq.SRCFD))
    except zmq.ZMQError:
        return _NO_DESCRIPTOR


def _from_here(endpoint: str) -> str:
    """How this machine reaches a server that listens on every address."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    mine = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # noqa: S104 - no bind
    return f"tcp://{mine}:{port}"


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

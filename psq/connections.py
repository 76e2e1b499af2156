"""The TCP connections behind a ROUTER: who is there, who has gone, and who fills our memory.

libzmq shows none of this by itself. Its monitor tells when a connection begins and ends, and which
descriptor it has; each frame tells which descriptor it came through; and the kernel tells how many
bytes a descriptor has received. What was received, less what came out as frames, is what libzmq
holds for that connection. Of a message that never ends libzmq keeps every part (30 bytes of memory
for each byte sent, without encryption), and no option of its bounds that: so whoever has more
unread than a frame, although all that could be read was, is hung up on. So is, of those who are no
members of the job, whoever has most, while they have more than `STRANGERS_BYTES` together; and who
was never heard, oldest first, when there are too many connections.

Only descriptors of the server's own port are ever shut down. Linux counts the bytes; elsewhere they
are not watched.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Final

import zmq

from psq_proto.frames import MAX_FRAME_BYTES

__all__ = ["MAX_CONNECTIONS", "SWEEP_S", "UNREAD_BYTES", "Connections"]

MAX_CONNECTIONS: Final = 8192
SWEEP_S: Final = 0.1
"""How often the connections are looked at, but never for more than a twentieth of the time."""
SWEEP_SHARE: Final = 20
UNREAD_BYTES: Final = MAX_FRAME_BYTES + 128 * 1024
"""One frame, and what belongs to handshakes and buffers."""
STRANGERS_BYTES: Final = 8 << 20
"""What all connections may have unread that speak for no rank: some plans, or probes, under way."""
EVENTS_PER_TURN: Final = 1024
SHED_S: Final = 0.02
"""How soon connections are given up again, where there is still no descriptor for another."""
_EVENTS: Final = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_ACCEPT_FAILED
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)
_HEAD: Final = struct.Struct("=Hi")
_TCP_INFO_BYTES: Final = 136
_AT_ONCE: Final = struct.pack("ii", 1, 0)
_INT: Final = struct.Struct("i")
_BYTES_RECEIVED: Final = struct.Struct("@Q")
_BYTES_RECEIVED_AT: Final = 128  # tcpi_bytes_received, Linux 4.1 and later

Socket = zmq.Socket[bytes]


@dataclass(slots=True)
class _Connection:
    """One descriptor.

    Attributes:
        peer: its routing id; empty until it has said something.
        key: its public key, likewise.
        frame_bytes: what came out of it, as on the wire.
        taken_bytes: what libzmq had taken from the kernel when it was last looked at.
    """

    peer: bytes = b""
    key: str = ""
    frame_bytes: int = 0
    taken_bytes: int = 0


class Connections:
    """See the module's docstring.

    Args:
        router: the socket, not bound yet.
        note: takes a line for the log.
        limit: how many there may be.

    Attributes:
        socket: can be read when something happened.
        hung_up: how many were ended from here.
        strangers: how many handshakes failed because the other end spoke no psq, or no encryption.
        members: the routing ids that speak for a rank; whoever knows sets it.
    """

    def __init__(self, router: Socket, note: Callable[[str], None], limit: int) -> None:
        self._note = note
        self._limit = limit
        self._router = router
        self._open: dict[int, _Connection] = {}
        self._silent: dict[int, None] = {}
        self._ending: list[bytes] = []  # since everything was read
        self._ended: list[bytes] = []
        self._port = 0
        self._drained = False
        self._sweep_s = 0.0
        self.hung_up = 0
        self.strangers = 0
        self.members: Container[bytes] = frozenset()
        self._shed_s = 0.0
        address = f"inproc://psq-{id(self)}"
        router.monitor(address, _EVENTS)
        self.socket: Socket = router.context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.RCVHWM, 0)  # else a flood of events holds up all of libzmq
        self.socket.connect(address)

    def __len__(self) -> int:
        return len(self._open)

    def listens_on(self, endpoint: str) -> None:
        """The address is known."""
        self._port = int(endpoint.rpartition(":")[2])

    def hear(self) -> None:
        """Take in what has happened."""
        for _ in range(EVENTS_PER_TURN):
            try:
                head, _ = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            event, value = _HEAD.unpack_from(head)
            if event == zmq.EVENT_ACCEPTED:
                self._accept(value)
            elif event == zmq.EVENT_DISCONNECTED:
                self._end(value)
            elif event == zmq.EVENT_ACCEPT_FAILED:
                self._shed(time.monotonic())
            else:
                self.strangers += 1

    def came(self, fd: int, peer: bytes, key: str, wire_bytes: int) -> None:
        """A frame of `peer` came through this descriptor."""
        connection = self._open.get(fd)
        if connection is None or connection.peer not in (b"", peer):
            self.hear()  # this descriptor may have been another connection's a moment ago
            connection = self._open.get(fd)
        if connection is None:
            return  # it has ended, and this was still unread
        connection.frame_bytes += wire_bytes
        if connection.peer != peer:
            connection.peer, connection.key = peer, key
            self._silent.pop(fd, None)

    def drained(self) -> None:
        """Everything that could be read was read."""
        self._drained = True
        self._ended += self._ending
        self._ending.clear()

    def ended(self) -> list[bytes]:
        """The routing ids of connections that have ended since the last call, all read."""
        ended, self._ended = self._ended, []
        return ended

    def hang_up(self, fd: int, why: str) -> None:
        """End a connection; its socket is libzmq's to close."""
        with contextlib.suppress(OSError), _borrowed(fd) as borrowed:
            if borrowed.getsockname()[1] == self._port:
                # A reset, not a farewell: whoever sends without end hears of it at once.
                borrowed.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
                borrowed.shutdown(socket.SHUT_RDWR)
                self.hung_up += 1
                self._note(why)

    def keep_only(self, keys: Container[str], why: str) -> None:
        """End the connections whose key is none of these, if they have said anything."""
        for fd, connection in list(self._open.items()):
            if connection.peer and connection.key not in keys:
                self.hang_up(fd, why)

    def sweep(self, now_s: float) -> None:
        """End the connections of which libzmq holds more than it may, if it is time to look.

        What was taken from the kernel at the last look must have come out as frames by now, if all
        that could be read has been read since; all but a frame that is under way.
        """
        if now_s < self._sweep_s or not self._drained or not _COUNTS:
            return
        self._drained = False
        strangers: list[tuple[int, int]] = []
        for fd, connection in list(self._open.items()):
            unread = connection.taken_bytes - connection.frame_bytes
            if unread > UNREAD_BYTES:
                self.hang_up(
                    fd,
                    f"a connection had {unread} bytes of a message without end unread, at most "
                    f"{UNREAD_BYTES} are kept: hung up",
                )
            elif unread > 0 and connection.peer not in self.members:
                strangers.append((unread, fd))
            connection.taken_bytes = _taken_bytes(fd)
        self._thin_out(strangers)
        self._sweep_s = now_s + max(SWEEP_S, SWEEP_SHARE * (time.monotonic() - now_s))

    def _thin_out(self, strangers: list[tuple[int, int]]) -> None:
        """Hang up on those with most unread, until they have no more than they may together."""
        unread = sum(nbytes for nbytes, _ in strangers)
        for nbytes, fd in sorted(strangers, reverse=True):
            if unread <= STRANGERS_BYTES:
                return
            why = (
                f"strangers had {unread} bytes unread, at most {STRANGERS_BYTES} are kept: hung up"
            )
            self.hang_up(fd, f"{why} on one with {nbytes}")
            unread -= nbytes

    def close(self) -> None:
        """Hear nothing more; the ROUTER must still be open."""
        self._router.disable_monitor()
        self.socket.close(0)

    def _accept(self, fd: int) -> None:
        self._end(fd)
        self._open[fd] = _Connection()
        self._silent[fd] = None
        if len(self._open) > self._limit:
            oldest = next(iter(self._silent))
            del self._silent[oldest]
            self.hang_up(oldest, f"more than {self._limit} connections: hung up on a silent one")

    def _shed(self, now_s: float) -> None:
        """Make room: without a free descriptor libzmq tries to accept for ever, with a whole core.

        Whoever was never heard goes; if all were, the last to come. (To stop listening would end
        every connection: in libzmq they belong to the listener.)
        """
        if now_s < self._shed_s or not self._open:
            return
        self._shed_s = now_s + SHED_S
        why = "no descriptor is left for another connection: hung up on one that was never heard"
        for fd in list(self._silent):
            self.hang_up(fd, why)
        if not self._silent:
            self.hang_up(next(reversed(self._open)), "no descriptor is left: hung up on the newest")

    def _end(self, fd: int) -> None:
        connection = self._open.pop(fd, None)
        self._silent.pop(fd, None)
        if connection is not None and connection.peer:
            self._ending.append(connection.peer)


@contextlib.contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    """A socket object for libzmq's descriptor, which stays libzmq's."""
    borrowed = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=fd)
    try:
        yield borrowed
    finally:
        borrowed.detach()


_COUNTS: Final = sys.platform == "linux"


def _taken_bytes(fd: int) -> int:
    """How many bytes were read from this descriptor so far; never too many."""
    try:
        with _borrowed(fd) as borrowed:
            info = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            waiting: int = _INT.unpack(fcntl.ioctl(fd, termios.FIONREAD, bytes(_INT.size)))[0]
    except OSError:
        return 0
    if len(info) < _TCP_INFO_BYTES:
        return 0
    received: int = _BYTES_RECEIVED.unpack_from(info, _BYTES_RECEIVED_AT)[0]
    return received - waiting

"""A worker's ends of the wire: a DEALER for each server, reconnecting by itself.

libzmq tells a worker that is turned away nothing, and it would wait for ever: the socket's monitor
hears of it, and `wait` raises. See `psq.link`.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Final

import zmq

from psq.curve import CURVE_BYTES, use_worker_keys
from psq.errors import ConfigError, RefusedError
from psq.keys import WorkerKeys, fingerprint
from psq.link_base import DRAIN_LIMIT, WORKER_LINGER_S, Buffer, Link, make_context, poll_ms

__all__ = ["WorkerLink", "WorkerLinks"]

_ASKED_AT: Final = frozenset({1, 4, 16, 64})
"""After how many failed handshakes in a row a server is asked what it speaks."""
_GREETING_S: Final = 0.5
_GREETING_BYTES: Final = 64
_MECHANISM: Final = slice(12, 32)
_ENCRYPTED: Final = "CURVE"
_PLAIN: Final = "NULL"
_EVENT_HEAD: Final = struct.Struct("=Hi")
_EVENTS: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
)


class WorkerLink(Link):
    """A worker's end: a DEALER connected to one server, reconnecting by itself.

    Args:
        endpoint: the server, such as tcp://10.0.0.5:5555. A host name is looked up at each attempt.
        linger_s: how long `close` waits for what is queued.
        context: of the group that this link belongs to, which then ends it; none for one alone.
        keys: this worker's, and the server's; none: nothing is encrypted.

    Attributes:
        endpoint: that one.
        failures: handshakes that failed since one succeeded.

    Raises:
        ConfigError: the endpoint is no ZeroMQ address, or libzmq is too old.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        linger_s: float = WORKER_LINGER_S,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        keys: WorkerKeys | None = None,
    ) -> None:
        super().__init__(zmq.DEALER, endpoint, linger_s, context or make_context())
        self.endpoint = endpoint
        self.failures = 0
        self._keys = keys
        self._refusal = ""
        if keys is not None:
            self._added_bytes = CURVE_BYTES
            use_worker_keys(self._socket, keys)
        address = f"inproc://psq-{id(self)}"
        self._socket.monitor(address, _EVENTS)
        self._ears = self._context.socket(zmq.PAIR)
        self._ears.setsockopt(zmq.RCVHWM, 0)  # else events that nobody hears hold up all of libzmq
        self._ears.connect(address)
        self._poller.register(self._ears, zmq.POLLIN)
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
        """As for every link; with `room` it also ends when `send` would find room.

        Raises:
            RefusedError: the server turned this worker's key away, or one of both has keys and the
                other has not.
        """
        ends_s = time.monotonic() + timeout_s
        if room:
            self._poller.modify(self._socket, zmq.POLLIN | zmq.POLLOUT)
        try:
            while True:
                readable = super().wait(max(0.0, ends_s - time.monotonic()))
                # What the ears hear is no reason to end a wait, unless it is bad news.
                if not self.check() or readable or time.monotonic() >= ends_s:
                    return readable
        finally:
            if room:
                self._poller.modify(self._socket, zmq.POLLIN)

    @property
    def hint(self) -> str:
        """What may be wrong while nobody answers, in words that go behind the server's name."""
        if self._keys is None or not self.failures:
            return ""
        return (
            f" (handshakes failed: {self.failures}; is the key that {self._keys.path.parent} has "
            "of the server still the server's?)"
        )

    def check(self) -> bool:
        """Look whether the server has turned this worker away; whether there was any news.

        Raises:
            RefusedError: as `wait`.
        """
        heard = False
        while not self._ears.closed:
            try:
                head, _ = self._ears.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                break
            heard = True
            self._hear(_EVENT_HEAD.unpack_from(head)[0])
        if self._refusal:
            raise RefusedError(self._refusal)
        return heard

    def _hear(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.failures = 0
            return
        self.failures += 1
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and self._keys is not None:
            self._refusal = (
                f"server {self.endpoint} refused the key of this worker ({self._keys.path}, "
                f"fingerprint {fingerprint(self._keys.own.public)}): it is not, or no longer, "
                "among the server's authorized_workers; psq keys list shows who is"
            )
        elif self.failures in _ASKED_AT:
            self._compare(_mechanism(self.endpoint))

    def _compare(self, theirs: str) -> None:
        """Whether one has keys and the other has not, which no waiting cures.

        libzmq's own word for it is often lost: whoever notices first hangs up on the other.
        """
        if theirs == _ENCRYPTED and self._keys is None:
            self._refusal = (
                f"server {self.endpoint} wants keys and this worker has none: give it its own with "
                "--keys, which psq keygen makes"
            )
        elif theirs == _PLAIN and self._keys is not None:
            self._refusal = (
                f"server {self.endpoint} speaks plaintext and this worker has keys: start it with "
                "--keys as well, or it is not the server that is meant"
            )

    def _shut(self, linger_s: float | None) -> None:
        self._socket.disable_monitor()
        self._ears.close(0)
        super()._shut(linger_s)

    def wait_room(self, timeout_s: float) -> bool:
        """Block until `send` would find room, or the time is up."""
        return bool(self._socket.poll(poll_ms(timeout_s), zmq.POLLOUT))

    def drain(self, limit: int = DRAIN_LIMIT) -> Iterator[memoryview]:
        """The messages that have arrived, at most `limit`, without blocking."""
        for _ in range(limit):
            try:
                frame = self._take()
            except zmq.Again:
                return
            if frame is not None:
                yield frame.buffer


def _mechanism(endpoint: str) -> str:
    """What the greeting of whoever listens there says of encryption; empty if nobody greets.

    The first words of ZMTP 3 are enough to be told: signature and version.
    """
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    got = b""
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _GREETING_S) as asked:
            asked.sendall(b"\xff" + bytes(8) + b"\x7f\x03")
            while len(got) < _GREETING_BYTES and (more := asked.recv(_GREETING_BYTES)):
                got += more
    except (OSError, ValueError):
        return ""
    return got[_MECHANISM].rstrip(b"\0").decode(errors="replace")


class WorkerLinks:
    """A worker's ends to all servers of a job: one context, and one wait for all of them.

    Args:
        endpoints: the servers, in the job's order.
        linger_s: how long `close` waits for what is queued, for all links together.
        keys: as for `WorkerLink`.

    Raises:
        ConfigError: as `WorkerLink`.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        linger_s: float = WORKER_LINGER_S,
        keys: WorkerKeys | None = None,
    ) -> None:
        self._context = make_context()
        self._poller = zmq.Poller()
        self._index: dict[zmq.Socket[bytes], int] = {}
        links: list[WorkerLink] = []
        try:
            for endpoint in endpoints:
                link = WorkerLink(endpoint, linger_s=linger_s, context=self._context, keys=keys)
                self._index[link._socket] = len(links)  # noqa: SLF001 - one class in two parts
                links.append(link)
        finally:
            self.links = tuple(links)
            if len(links) < len(endpoints):
                self.close(0.0)
        for dealer in self._index:
            self._poller.register(dealer, zmq.POLLIN)
        self._ears = {link._ears: link for link in links}  # noqa: SLF001 - as above
        for ears in self._ears:
            self._poller.register(ears, zmq.POLLIN)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return bool(self._context.closed)

    def wait(self, timeout_s: float, room: Collection[int] = ()) -> list[int]:
        """Block until a message can be read, or a link in `room` can send, or the time is up.

        Returns:
            The links, by their places, that have a message to read.

        Raises:
            RefusedError: as `WorkerLink.wait`.
        """
        ends_s = time.monotonic() + timeout_s
        while True:
            ready = self._poll(max(0.0, ends_s - time.monotonic()), room)
            heard = [self._ears[one].check() for one in ready if one in self._ears]
            # What ears hear is no reason to end a wait, unless it is bad news.
            if len(ready) > len(heard) or not any(heard) or time.monotonic() >= ends_s:
                return [
                    self._index[one]
                    for one, event in ready.items()
                    if one in self._index and event & zmq.POLLIN
                ]

    def _poll(self, timeout_s: float, room: Collection[int]) -> dict[zmq.Socket[bytes], int]:
        """What is ready, of links and ears."""
        dealers = [self.links[index]._socket for index in room]  # noqa: SLF001 - see above
        for dealer in dealers:
            self._poller.modify(dealer, zmq.POLLIN | zmq.POLLOUT)
        try:
            return dict(self._poller.poll(poll_ms(timeout_s)))
        finally:
            for dealer in dealers:
                self._poller.modify(dealer, zmq.POLLIN)

    def close(self, linger_s: float | None = None) -> None:
        """Close all; what is queued has up to `linger_s` (default: their own) to leave.

        Safe to call twice.
        """
        for link in self.links:
            if not link.closed:
                link._shut(linger_s)  # noqa: SLF001 - see above
        self._context.term()

"""The network: a connection is two streams in order, until it breaks; nothing else is certain.

A connection that is cut loses some of what was under way, or nothing; what comes of it late comes
beside the frames of the next one. Either end may take a while to notice. Damage is a bit that flips
on the way, a double is a frame that comes twice in its stream, and a hold keeps one direction back.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from psq.link import Sent
from psq_proto.frames import Buffer
from psq_proto.messages import MessageType

from .clock import Schedule

__all__ = ["Connection", "Network", "Receiver", "ServerEnd", "WorkerLink"]

LATENCY_S: Final = (0.0005, 0.004)
ROOM_FRAMES: Final = 64
"""What lies between a server and a worker that does not read, before the server is told so."""
NOTICE_S: Final = 3.0
"""How long an end may not notice that a connection is gone."""
LATE_S: Final = 0.5
"""How much later what was under way may come, after its connection broke."""
RECONNECT_S: Final = (0.02, 0.4)
CUT_ALL_S: Final = 0.002
DOUBLED: Final = frozenset(
    {MessageType.HELLO, MessageType.PUSH, MessageType.PULL, MessageType.HEARTBEAT}
    | {MessageType.VERDICT, MessageType.WEIGHTS, MessageType.STATUS, MessageType.COOKIE}
)
"""What comes twice: what both ends may send again anyway. (A stream by itself repeats nothing.)"""


class Receiver(Protocol):
    """A server process, as the network sees it."""

    def on_frame(self, connection: Connection, frame: bytes) -> None:
        """A frame came."""

    def on_gone(self, connection: Connection) -> None:
        """The connection is found to be gone."""


class Connection:
    """One TCP connection with all that is under way on it; `name` is the server's name for it."""

    __slots__ = ("lost_down_s", "lost_up_s", "name", "open_at_server", "queued", "server", "times")

    def __init__(self, name: bytes, server: Receiver) -> None:
        self.name = name
        self.server = server
        self.open_at_server = True
        self.queued = 0  # on the way to the worker, or unread there
        self.times = [0.0, 0.0]  # when the last frame of each stream comes
        self.lost_up_s = self.lost_down_s = float("inf")


class Network:
    """Brings frames, in order and in time, or not.

    Args:
        schedule: virtual time.
        rng: latencies, and what a cut loses.

    Attributes:
        struck: how often each kind of fault has struck.
        flips, doubles: frames that are to be damaged, or to come twice, from now on.
        held_until_s: by (rank, server, direction): until when nothing passes.
    """

    def __init__(self, schedule: Schedule, rng: random.Random) -> None:
        self.schedule = schedule
        self.rng = rng
        self.struck: dict[str, int] = {}
        self.flips = self.doubles = 0
        self.held_until_s: dict[tuple[int, int, str], float] = {}
        self._names = 0

    def strike(self, kind: str) -> None:
        """Count a fault that struck."""
        self.struck[kind] = self.struck.get(kind, 0) + 1

    def name(self) -> bytes:
        """A routing id that was never used."""
        self._names += 1
        return self._names.to_bytes(5, "big")

    def transmit(
        self,
        connection: Connection,
        stream: int,
        key: tuple[int, int, str],
        frame: bytes,
        deliver: Callable[[bytes], None],
    ) -> int:
        """Let a frame arrive in its turn; returns how often it will."""
        rng, now_s = self.rng, self.schedule.now_s
        arrives_s = max(now_s + rng.uniform(*LATENCY_S), connection.times[stream])
        held_s = self.held_until_s.get(key, 0.0)
        arrives_s = max(arrives_s, held_s)
        copies = 1
        if self.flips and rng.random() < 0.1:
            self.flips -= 1
            self.strike("flips")
            frame = _flipped(frame, rng)
            self.schedule.note("flip", key, frame[5])
        elif self.doubles and frame[5] in DOUBLED and rng.random() < 0.1:
            self.doubles -= 1
            self.strike("doubles")
            copies = 2
            self.schedule.note("double", key, frame[5])
        connection.times[stream] = arrives_s
        for _ in range(copies):
            self.schedule.at(arrives_s, lambda: deliver(frame))
        return copies


def _flipped(frame: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(frame)
    bit = rng.randrange(8 * len(frame))
    damaged[bit >> 3] ^= 1 << (bit & 7)
    return bytes(damaged)


class WorkerLink:
    """A worker process's end, with the interface of `psq.link.WorkerLink`.

    Args:
        network: carries the frames.
        rank, server: whose, to which.
        on_arrival: something came, or there is room again.
    """

    def __init__(
        self, network: Network, rank: int, server: int, on_arrival: Callable[[], None]
    ) -> None:
        self.network = network
        self.endpoint = f"server{server}"
        self.closed = False
        self.connection: Connection | None = None
        self.inbox: deque[tuple[Connection, bytes]] = deque()
        self.on_sent: Callable[[Buffer], None] = lambda _: None
        self._on_arrival = on_arrival
        self._up, self._down = (rank, server, "up"), (rank, server, "down")

    def connect(self, server: Receiver) -> Connection:
        """A new connection, to this process."""
        self.connection = Connection(self.network.name(), server)
        self.network.schedule.note("connected", self._up[:2], self.connection.name.hex())
        self._on_arrival()
        return self.connection

    def send(self, frame: Buffer) -> bool:
        """Put a frame on its way; False if there is no connection."""
        connection = self.connection
        if connection is None:
            return False
        self.on_sent(frame)
        self.network.transmit(
            connection, 0, self._up, bytes(frame), lambda sent: self._deliver_up(connection, sent)
        )
        return True

    def drain(self, limit: int) -> Iterator[memoryview]:
        """What has come."""
        while limit > 0 and self.inbox:
            connection, frame = self.inbox.popleft()
            connection.queued -= 1
            limit -= 1
            yield memoryview(frame)

    def is_lent(self, _: Buffer) -> bool:
        """Frames are copied here."""
        return False

    def arrive(self, connection: Connection, frame: bytes) -> None:
        """A frame of the server's came."""
        late = self.network.schedule.now_s > connection.lost_down_s
        if self.closed or late:
            connection.queued -= 1
            return
        self.inbox.append((connection, frame))
        self._on_arrival()

    def _deliver_up(self, connection: Connection, frame: bytes) -> None:
        if self.network.schedule.now_s <= connection.lost_up_s:
            connection.server.on_frame(connection, frame)

    def cut(self, *, at_once: bool) -> Connection | None:
        """The connection breaks: what is under way is lost, all of it or but for a beginning.

        Args:
            at_once: whether this end knows now; else it goes on sending, and nobody hears.
        """
        connection = self.connection
        if connection is None:
            return None
        now_s, rng = self.network.schedule.now_s, self.network.rng
        connection.lost_up_s = now_s + rng.choice((0.0, CUT_ALL_S, LATE_S))
        connection.lost_down_s = now_s + rng.choice((0.0, CUT_ALL_S))
        if connection.lost_up_s > now_s + CUT_ALL_S:  # held in some buffer on the way
            late_s = now_s + rng.uniform(0.0, LATE_S)
            key = self._up
            self.network.held_until_s[key] = max(self.network.held_until_s.get(key, 0.0), late_s)
        if at_once:
            self.connection = None
        return connection

    def drop(self, connection: Connection) -> None:
        """This end notices that this connection is gone."""
        if self.connection is connection:
            self.connection = None
            self._on_arrival()

    def close(self) -> None:
        """The process is dead."""
        self.closed = True
        self.inbox.clear()
        self.connection = None


class ServerEnd:
    """A server process's end, with what `psq_server.outbox.Outbox` asks of a link."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.links: dict[bytes, tuple[Connection, WorkerLink]] = {}
        self.on_sent: Callable[[Buffer], None] = lambda _: None

    def send(self, peer: bytes, frame: Buffer, *, lend: bool = False) -> Sent:  # noqa: ARG002 - none is
        """Put a frame on its way to a worker, if it has room."""
        known = self.links.get(peer)
        if known is None or not known[0].open_at_server:
            self.links.pop(peer, None)
            return Sent.GONE
        connection, link = known
        if connection.queued >= ROOM_FRAMES:
            return Sent.FULL
        self.on_sent(frame)
        key = link._down
        connection.queued += self.network.transmit(
            connection, 1, key, bytes(frame), lambda sent: link.arrive(connection, sent)
        )
        return Sent.QUEUED

    def is_lent(self, _: Buffer) -> bool:
        """Frames are copied here."""
        return False

"""A network in virtual time: ports with a rate, a latency, and frames that may get lost.

    worker --[its port]-- latency --[the server's port, shared by all workers]-- server

A port passes one frame after another, each direction by itself, so the pushes of many workers queue
at a server as they do in front of a real one. A frame is passed on when all of it has come. Not
modelled: TCP's windows and slow start, other traffic, and any wait inside a machine.

A frame that is lost is one that came damaged: who got it drops it, and the protocol sends it again
when it finds out. The handshake is spared, as its losses would only delay the start.
"""

from __future__ import annotations

import math
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Final

from psq.errors import ConfigError
from psq.link import DRAIN_LIMIT, QUEUE_FRAMES, Sent, wire_bytes
from psq_proto.frames import HEADER_BYTES, Buffer, glance
from psq_proto.messages import MessageType
from psq_worker.simulate.clock import Events

__all__ = ["Network", "Port", "ServerPort", "Traffic", "WorkerPort", "WorkerPorts"]

LOSABLE: Final = frozenset(
    {
        MessageType.PUSH,
        MessageType.PULL,
        MessageType.HEARTBEAT,
        MessageType.VERDICT,
        MessageType.WEIGHTS,
        MessageType.STATUS,
    }
)
BITS: Final = 8
COPIES: Final = 64
"""Frames of a server that are kept to be sent to others as well."""


@dataclass(frozen=True, slots=True)
class Network:
    """What machines are connected by.

    Attributes:
        bandwidth_bit_s: of a worker's link, each way; infinite where it costs nothing.
        server_bit_s: of a server's link, which all workers share; None: as a worker's.
        latency_s: from one end to the other.
        loss: the share of frames that come damaged.
    """

    bandwidth_bit_s: float = math.inf
    server_bit_s: float | None = None
    latency_s: float = 0.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what carries nothing, or loses everything."""
        rates = (self.bandwidth_bit_s, self.server_rate_bit_s)
        if not all(rate > 0.0 for rate in rates):
            msg = f"network: a link's rate must be above 0 bit/s, got {rates}"
            raise ConfigError(msg)
        if not 0.0 <= self.latency_s < math.inf:
            msg = f"network: the latency must be 0 s or more, got {self.latency_s!r}"
            raise ConfigError(msg)
        if not 0.0 <= self.loss <= MAX_LOSS:
            msg = f"network: the share of lost frames must be 0..{MAX_LOSS:g}, got {self.loss!r}"
            raise ConfigError(msg)

    @property
    def server_rate_bit_s(self) -> float:
        """The rate of a server's link."""
        return self.bandwidth_bit_s if self.server_bit_s is None else self.server_bit_s


MAX_LOSS: Final = 0.5


class Port:
    """One direction of one machine's link.

    Attributes:
        free_s: when all that it was given will have passed.
    """

    def __init__(self, rate_bit_s: float) -> None:
        self._s_per_byte = BITS / rate_bit_s
        self.free_s = 0.0

    def passes(self, now_s: float, nbytes: int) -> float:
        """When a frame that comes now has passed."""
        self.free_s = max(now_s, self.free_s) + nbytes * self._s_per_byte
        return self.free_s

    def rest(self, now_s: float, duration_s: float) -> None:
        """Nothing passes for so long."""
        self.free_s = max(now_s, self.free_s) + duration_s

    def takes_in(self, now_s: float, nbytes: int) -> float:
        """When a frame is in, the last byte of which could be now: at once, if nothing queues."""
        self.free_s = max(now_s, self.free_s + nbytes * self._s_per_byte)
        return self.free_s


@dataclass(slots=True)
class Traffic:
    """What has been sent, over all links.

    Attributes:
        up_bytes, down_bytes: by rank, as on the wire.
        pushed_bytes: payloads of PUSH, as sent.
        answered_bytes: payloads of WEIGHTS after a round, as taken in.
        lost_frames: came damaged.
    """

    up_bytes: Counter[int] = field(default_factory=Counter)
    down_bytes: Counter[int] = field(default_factory=Counter)
    pushed_bytes: int = 0
    answered_bytes: int = 0
    lost_frames: int = 0

    def count_up(self, rank: int, frame: Buffer) -> None:
        """A worker sends."""
        self.up_bytes[rank] += wire_bytes(len(frame))
        seen = glance(frame)
        if seen is not None and seen.type == MessageType.PUSH:
            self.pushed_bytes += len(frame) - HEADER_BYTES

    def count_down(self, rank: int, frame: Buffer) -> None:
        """A server sends."""
        self.down_bytes[rank] += wire_bytes(len(frame))


class WorkerPort:
    """A worker's link to one server: what `psq.link.WorkerLink` is in a real process.

    Args:
        rank: whose.
        server: the other end.
        up: the worker's own port, which its links to all servers share; `down` likewise.
        wake: called when something has come.
    """

    def __init__(
        self, rank: int, server: ServerPort, up: Port, down: Port, wake: Callable[[], None]
    ) -> None:
        self.rank = rank
        self.endpoint = f"virtual://{server.number}"
        self.closed = False
        self.sent_bytes = self.received_bytes = 0
        self.inbox: deque[memoryview] = deque()
        self.queued = 0  # frames on their way here, or waiting to be read
        self._server, self._up, self._down, self._wake = server, up, down, wake
        self._peer = server.connect(self)

    def send(self, frame: Buffer) -> bool:
        """Queue one frame; False when no server is there."""
        server = self._server
        if server.closed:
            return False
        size = wire_bytes(len(frame))
        self.sent_bytes += size
        server.traffic.count_up(self.rank, frame)
        sent_s = self._up.passes(server.events.now_s, size)
        if not server.loses(frame):
            copy = bytes(frame)
            server.events.at(sent_s + server.latency_s, lambda: server.arrive(self._peer, copy))
        return True

    def drain(self, limit: int = DRAIN_LIMIT) -> Iterator[memoryview]:
        """The frames that have come, at most `limit`."""
        was_full = self.queued >= QUEUE_FRAMES
        for _ in range(min(limit, len(self.inbox))):
            self.queued -= 1
            frame = self.inbox.popleft()
            self.received_bytes += wire_bytes(len(frame))
            yield frame
        if was_full and self.queued < QUEUE_FRAMES:
            self._server.has_room()

    def is_lent(self, frame: Buffer) -> bool:
        """Never: what is sent is copied."""
        del frame
        return False

    def carry(self, frame: bytes, *, lost: bool) -> float:
        """A server sends this: it comes, unless it is lost on the way; when it has left there."""
        server = self._server
        self.queued += not lost
        sent_s = server.out.passes(server.events.now_s, wire_bytes(len(frame)))
        if not lost:
            server.weights_under_way += is_weights(frame)
            view = memoryview(frame)
            server.events.at(sent_s + server.latency_s, lambda: self._come(view))
        return sent_s

    def close(self) -> None:
        """This process does not read any more."""
        if not self.closed:
            self.closed = True
            self.inbox.clear()
            self._server.disconnect(self._peer)

    def _come(self, frame: memoryview) -> None:
        events = self._server.events
        in_s = self._down.takes_in(events.now_s, wire_bytes(len(frame)))
        if in_s > events.now_s:
            events.at(in_s, lambda: self._take(frame))
        else:
            self._take(frame)

    def _take(self, frame: memoryview) -> None:
        self._server.weights_under_way -= is_weights(frame)
        if not self.closed:
            self.inbox.append(frame)
            self._wake()


class ServerPort:
    """A server's end of all its links: what `psq.link.ServerLink` is in a real process.

    Attributes:
        wake: called when something has come, or a queue that was full has room again.
        weights_under_way: frames of weights that have not come yet.
    """

    def __init__(
        self, number: int, network: Network, events: Events, traffic: Traffic, rng: random.Random
    ) -> None:
        self.number = number
        self.endpoint = f"virtual://{number}"
        self.events = events
        self.traffic = traffic
        self.latency_s = network.latency_s
        self.out, self._in = (Port(network.server_rate_bit_s) for _ in range(2))
        self.closed = False
        self.sent_bytes = self.received_bytes = 0
        self.weights_under_way = 0
        self.wake: Callable[[], None] = lambda: None
        self._loss, self._rng = network.loss, rng
        self._inbox: deque[tuple[bytes, memoryview]] = deque()
        self._peers: dict[bytes, WorkerPort] = {}
        self._connections = 0
        self._lent: Counter[int] = Counter()
        self._copies: OrderedDict[bytes, bytes] = OrderedDict()

    def connect(self, port: WorkerPort) -> bytes:
        """A worker's process is there; returns the name of its connection."""
        self._connections += 1
        name = self._connections.to_bytes(5, "big")
        self._peers[name] = port
        return name

    def disconnect(self, peer: bytes) -> None:
        """It is not there any more: what is sent to it finds nobody."""
        self._peers.pop(peer, None)

    def loses(self, frame: Buffer) -> bool:
        """Whether this frame gets lost."""
        if not self._loss or self._rng.random() >= self._loss:
            return False
        seen = glance(frame)
        lost = seen is not None and seen.type in LOSABLE
        self.traffic.lost_frames += lost
        return lost

    def arrive(self, peer: bytes, frame: bytes) -> None:
        """A frame has reached this end of the wire."""
        in_s = self._in.takes_in(self.events.now_s, wire_bytes(len(frame)))
        self.events.at(in_s, lambda: self._take(peer, frame))

    def rest(self, duration_s: float) -> None:
        """This machine computes: what it sends next leaves so much later."""
        self.out.rest(self.events.now_s, duration_s)

    def has_room(self) -> None:
        """Somebody has read who was behind."""
        self.wake()

    # ---- what `psq_server.loop` asks of a link

    def watch(self, fd: int) -> None:
        """There are no signals."""
        del fd

    def wait(self, timeout_s: float) -> bool:
        """Never: time does not pass in here."""
        del timeout_s
        return bool(self._inbox)

    def drain(self, limit: int = DRAIN_LIMIT) -> Iterator[tuple[bytes, memoryview]]:
        """The frames that have come, with the connection of each, at most `limit`."""
        for _ in range(min(limit, len(self._inbox))):
            yield self._inbox.popleft()

    key: Final = None
    refused_keys: Final = 0

    def notes(self) -> list[str]:
        """Nothing is turned away here."""
        return []

    def ended(self) -> list[bytes]:
        """A simulated connection ends without a word: who sends finds out."""
        return []

    @property
    def pending(self) -> bool:
        """Whether anything is left to be read."""
        return bool(self._inbox)

    def send(self, peer: bytes, frame: Buffer, *, lend: bool = False) -> Sent:  # noqa: ARG002 - all are
        """Queue one frame for a peer."""
        port = self._peers.get(peer)
        if port is None:
            return Sent.GONE
        if port.queued >= QUEUE_FRAMES:
            return Sent.FULL
        self.traffic.count_down(port.rank, frame)
        self.sent_bytes += wire_bytes(len(frame))
        sent_s = port.carry(self._copy(frame), lost=self.loses(frame))
        if sent_s > self.events.now_s:
            self._lent[id(frame)] += 1
            self.events.at(sent_s, lambda: self._give_back(frame))
        return Sent.QUEUED

    def is_lent(self, frame: Buffer) -> bool:
        """Whether a frame that was sent has not left this machine yet."""
        return id(frame) in self._lent

    def _give_back(self, frame: Buffer) -> None:
        name = id(frame)
        self._lent[name] -= 1
        if not self._lent[name]:
            del self._lent[name]

    def _copy(self, frame: Buffer) -> bytes:
        """The frame as it is on the wire: one copy, however many it is sent to."""
        header = bytes(memoryview(frame)[:HEADER_BYTES])  # its checksums name the bytes behind it
        copy = self._copies.get(header)
        if copy is None:
            copy = self._copies[header] = bytes(frame)
            if len(self._copies) > COPIES:
                self._copies.popitem(last=False)
        return copy

    def _take(self, peer: bytes, frame: bytes) -> None:
        if peer in self._peers:  # the connection takes what was on it along
            self.received_bytes += wire_bytes(len(frame))
            self._inbox.append((peer, memoryview(frame)))
            self.wake()


def is_weights(frame: Buffer) -> bool:
    """Whether a frame says WEIGHTS."""
    seen = glance(frame)
    return seen is not None and seen.type == MessageType.WEIGHTS


class WorkerPorts:
    """A worker's links to all servers: what `psq.link.WorkerLinks` is in a real process."""

    def __init__(self, ports: Collection[WorkerPort]) -> None:
        self.links = tuple(ports)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return all(port.closed for port in self.links)

    def wait(self, timeout_s: float, room: Collection[int] = ()) -> list[int]:
        """The links with something to read; never blocks."""
        del timeout_s, room
        return [index for index, port in enumerate(self.links) if port.inbox]

    def close(self, linger_s: float | None = None) -> None:
        """Close all."""
        del linger_s
        for port in self.links:
            port.close()

"""A server's process without a socket: the state machine, its outbox, and integers for weights.

It does what `psq_server.loop` does, in the same order: an event, all that its actions bring about,
then the next frame.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from psq_proto.frames import Buffer
from psq_server.outbox import Outbox
from psq_server.state import (
    Action,
    Adopt,
    Broadcast,
    Committed,
    Echo,
    Event,
    FrameReceived,
    Initialize,
    Judge,
    Log,
    PeerBehind,
    PeerGone,
    Pushed,
    Reduce,
    Send,
    SendFull,
    ServerState,
    Settings,
    ShardReduced,
    Stop,
    Tick,
)

from .arithmetic import IntegerWeights
from .clock import LocalClock, Schedule
from .network import Connection, Network, ServerEnd, WorkerLink
from .oracle import Oracle

__all__ = ["Server"]

RUN_ID: Final = b"simulated run id"
TICK_S: Final = 0.25
FLUSH_S: Final = 0.01
LEASE_S: Final = 2.0
REDUCE_S: Final = 0.001


class Server:
    """One server of a job, through all of its processes."""

    def __init__(self, index: int, schedule: Schedule, network: Network, oracle: Oracle) -> None:
        self.index = index
        self.schedule = schedule
        self.network = network
        self.oracle = oracle
        self.clock = LocalClock(schedule, 1000.0 * (index + 1))
        self.epoch = 0
        self.process: Process | None = None
        self.ended: Stop | None = None

    def start(self) -> None:
        """A new process."""
        self.epoch += 1
        self.process = Process(self, self.epoch)
        self.schedule.note("server starts", self.index, self.epoch)


class Process:
    """One process of a server's, from start to end."""

    def __init__(self, server: Server, epoch: int) -> None:
        self.server = server
        self.epoch = epoch
        self.alive = True
        self.end = ServerEnd(server.network)
        self.end.on_sent = self._goes_down
        self.settings = Settings(RUN_ID, epoch, lease_s=LEASE_S, give_up_after_s=900.0)
        self.state = ServerState(self.settings, server.clock.now_s())
        self.outbox = Outbox(self.end, lambda shard: self._hold().full(shard))
        self.weights: IntegerWeights | None = None
        self._events: deque[Event] = deque()
        self._flushing = False
        self._wake_s = -1.0
        server.schedule.after(TICK_S, self._tick)

    # ---- what the network and the clock bring

    def connect(self, connection: Connection, link: WorkerLink) -> None:
        """A worker has connected."""
        self.end.links[connection.name] = (connection, link)

    def on_frame(self, connection: Connection, frame: bytes) -> None:
        """A frame came."""
        if self.alive:
            self.happen(FrameReceived(connection.name, memoryview(frame)))

    def on_gone(self, connection: Connection) -> None:
        """A connection is found to be gone."""
        if self.alive and connection.name in self.end.links:
            self.end.links.pop(connection.name)
            self.outbox.forget(connection.name)
            self.happen(PeerGone(connection.name))

    def _tick(self) -> None:
        if self.alive:
            self.happen(Tick())
            self.server.schedule.after(TICK_S, self._tick)

    def _wake(self) -> None:
        if self.alive and self.state.wake_s is not None:
            self.happen(Tick())

    def happen(self, event: Event) -> None:
        """Handle an event, and every event that its actions bring about."""
        self._events.append(event)
        while self._events and self.alive:
            event, now_s = self._events.popleft(), self.server.clock.now_s()
            actions = self.state.handle(event, now_s)
            for action in actions:
                if isinstance(action, Committed):  # the verdicts stand before it
                    self.server.oracle.committed(self.server.index, action.version, durable=True)
            for action in actions:
                self._do(action)
            self.state.validate()
        self._plan_ahead()

    def _plan_ahead(self) -> None:
        while self.outbox.gone and self.alive:
            self.happen(PeerGone(self.outbox.gone.pop()))
        if self.outbox.waiting and not self._flushing:
            self._flushing = True
            self.server.schedule.after(FLUSH_S, self._flush)
        wake_s = self.state.wake_s
        if wake_s is not None and wake_s != self._wake_s:
            self._wake_s = wake_s
            self.server.schedule.after(wake_s - self.server.clock.now_s(), self._wake)

    def _flush(self) -> None:
        self._flushing = False
        if self.alive:
            self.outbox.flush()
            self._plan_ahead()

    # ---- what the state machine wants

    def _do(self, action: Action) -> None:
        match action:
            case Send() | Echo() | Broadcast() | SendFull():
                self._transmit(action)
            case Reduce(round_, shard):
                frame = self._hold().reduce(action)
                self._events.append(ShardReduced(round_, shard, frame, REDUCE_S))
            case Judge():
                self._events.append(self._hold().judge(action))
            case Initialize(shard, _, values):
                self._hold().init(shard, values)
            case Adopt():
                self.weights = IntegerWeights(action.plan, RUN_ID, self.epoch, self._reduced)
            case Stop():
                self.alive = False
                self.server.ended = action
                self.server.schedule.note("server ends", self.server.index, action.reason)
            case Log():
                self.server.schedule.note("log", self.server.index, action.event, action.fields)
            case _:
                pass

    def _transmit(self, action: Send | Echo | Broadcast | SendFull) -> None:
        match action:
            case Send():
                self.outbox.send(action.peer, action.frame)
            case Echo():
                self.outbox.send_if_idle(action.peer, action.frame)
            case Broadcast():
                frames = tuple(zip(action.shards, action.frames, strict=True))
                for peer in action.peers:
                    if not self.outbox.send_weights(peer, action.version, frames):
                        self._events.append(PeerBehind(peer))
            case SendFull():
                for peer in action.peers:
                    self.outbox.send_full(peer, action.versions)

    def _reduced(
        self, round_: int, shard: int, said: tuple[Pushed, ...], now: tuple[int, int]
    ) -> None:
        self.server.oracle.reduced(self.server.index, round_, shard, said, now)

    def _goes_down(self, frame: Buffer) -> None:
        self.server.oracle.goes_down(self.server.index, frame)

    def _hold(self) -> IntegerWeights:
        assert self.weights is not None
        return self.weights

"""A server's process without a socket: the state machine, its outbox, and integers for weights.

It does what `psq_server.loop` does, in the same order: an event, all that its actions bring about,
then the next frame. The gate and what stands between it and the disk are the real ones; so is the
replay after a crash.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import msgpack

from psq.plan import Plan
from psq_proto.frames import Buffer
from psq_server.commits import Commits
from psq_server.outbox import Outbox
from psq_server.recovery import replay
from psq_server.retaking import retake
from psq_server.state import (
    Action,
    Adopt,
    Blocked,
    Broadcast,
    Checkpointed,
    Committed,
    Durable,
    Echo,
    Event,
    FrameReceived,
    GoBack,
    Initialize,
    Judge,
    Log,
    PeerBehind,
    PeerGone,
    Pushed,
    Reduce,
    Retake,
    Retaken,
    Send,
    SendFull,
    ServerState,
    Settings,
    ShardReduced,
    Stop,
    Tick,
)
from psq_server.state.durable import Rest
from psq_server.state.events import LOGGED

from .arithmetic import IntegerWeights
from .case import Case
from .clock import LocalClock, Schedule, Violation
from .disk import Disk, Entry, Killed, Store
from .network import Connection, Network, ServerEnd, WorkerLink
from .oracle import Oracle

__all__ = ["Process", "Server"]

RUN_ID: Final = b"simulated run id"
TICK_S: Final = 0.25
FLUSH_S: Final = 0.01
LEASE_S: Final = 2.0
GRACE_S: Final = 1.0
REDUCE_S: Final = 0.001
LINGER_S: Final = 0.5


class Server:
    """One server of a job, through all of its processes."""

    def __init__(  # noqa: PLR0913, PLR0917 - a server gets its world as arguments
        self,
        index: int,
        case: Case,
        schedule: Schedule,
        network: Network,
        oracle: Oracle,
        disk: Disk,
    ) -> None:
        self.index = index
        self.case = case
        self.schedule = schedule
        self.network = network
        self.oracle = oracle
        self.disk = disk
        disk.on_durable = lambda version: oracle.is_durable(index, version)
        self.clock = LocalClock(schedule, 1000.0 * (index + 1))
        self.epoch = 0
        self.process: Process | None = None
        self.ended: Stop | None = None
        self.stopping = False

    @property
    def settings(self) -> Settings:
        """What the next process is told."""
        case = self.case
        return Settings(
            RUN_ID,
            self.epoch,
            lease_s=LEASE_S,
            min_workers=case.min_workers or None,
            grace_s=GRACE_S,
            give_up_after_s=900.0,
            durability=case.durability,
            kept_bytes=1 if case.checkpoint_every == 1 else 1 << 20,
            checkpoint_every=case.checkpoint_every or None,
        )

    def start(self) -> None:
        """A new process, which takes up what is on the disk."""
        if self.ended:
            return
        self.epoch += 1
        self.schedule.note("server starts", self.index, self.epoch)
        self.oracle.epochs[self.index] = self.epoch
        self.process = Process(self)
        with suppress(Killed):
            self.process.begin()

    def crash(self) -> None:
        """The process dies; what was not synced is lost, or some of it."""
        process = self.process
        if process is None or not process.alive:
            return
        process.die()
        self.process = None
        self.stopping = False
        self.disk.cut_power()
        self.oracle.down(self.index)


@dataclass(slots=True)
class _Log:
    """Where the process says what happens; the story takes it."""

    server: Server

    def write(self, level: str, event: str, fields: Mapping[str, Any]) -> None:
        """One line."""
        self.server.schedule.note("log", self.server.index, level, event, fields)


@dataclass(slots=True)
class _Recovered:
    """What a disk had."""

    state: ServerState
    weights: IntegerWeights | None = None
    last: Entry | None = None


class Process:
    """One process of a server's, from start to end."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.epoch = server.epoch
        self.alive = True
        self.end = ServerEnd(server.network)
        self.end.on_sent = self._goes_down
        self.outbox = Outbox(self.end, lambda shard: self._hold().full(shard))
        self._events: deque[Event] = deque()
        self._flushing = False
        self._wake_s = -1.0
        kept = server.case.durability != "off"
        self.store = Store(server.disk, self.epoch, self._hear) if kept else None
        self.state: ServerState
        self.weights: IntegerWeights | None = None
        self.commits: Commits

    def begin(self) -> None:
        """Take up what is on the disk, and serve."""
        server = self.server
        recovered = self._recover()
        self.state, self.weights = recovered.state, recovered.weights
        if self.store is not None and self.state.level in LOGGED:
            version = self.state.snapshot(server.clock.now_s()).version
            self.store.open_journal(version, recovered.last)
        self.commits = Commits(
            self.state,
            self.store,  # type: ignore[arg-type]
            self._hold,  # type: ignore[arg-type]
            _Log(server),  # type: ignore[arg-type]
            clock=server.clock.now_s,
        )
        self.outbox.is_paused = lambda: self.commits.is_busy
        server.schedule.after(TICK_S, self._tick)

    def _recover(self) -> _Recovered:
        """Go on from the newest checkpoint and what the journal has after it."""
        server, now_s = self.server, self.server.clock.now_s()
        if self.store is None or not server.disk.images:
            server.oracle.recovered(server.index, 0, {})
            return _Recovered(ServerState(server.settings, now_s))
        image = server.disk.images[-1]
        meta = msgpack.unpackb(image.meta, strict_map_key=False)
        captured = meta["server"]
        weights = self._make_weights(Plan.parse(captured["plan"]))
        weights.resume(meta["facts"], image.arrays)
        weights.on_reduced = _unseen
        entries = list(server.disk.read())
        replayed = replay(captured, entries, weights)
        last = next((e for e in reversed(entries) if e.number == replayed.last_number), None)
        weights.on_reduced = self._reduced
        state = ServerState.restore(
            server.settings,
            captured,
            now_s,
            shards=weights.versions,
            frames=weights.last_frames,
            rest=Rest(replayed.owed, image.version),
        )
        version = state.snapshot(now_s).version
        server.schedule.note("recovered", server.index, image.version, replayed.rounds, version)
        owed = replayed.owed  # else these are its weights; then they will be: see `remade`
        history = server.oracle.history
        values = {shard: history[shard][version] for shard in weights.values} if owed else None
        server.oracle.recovered(server.index, version, values or weights.values)
        return _Recovered(state, weights, last)

    # ---- what the network, the disk and the clock bring

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

    def _hear(self) -> None:
        """Take what the disk has answered."""
        if not self.alive:
            return
        with suppress(Killed):
            for news in self.commits.hear():
                if not self.alive:
                    return
                if isinstance(news, Durable | Blocked | Checkpointed):
                    self.happen(news)
                else:
                    self._do(news)
            self._plan_ahead()

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
        try:
            while self._events and self.alive:
                self._handle(self._events.popleft())
        except Killed:
            self._events.clear()
            return
        self._plan_ahead()

    def _handle(self, event: Event) -> None:
        actions = self.state.handle(event, self.server.clock.now_s())
        durable = self.state.level not in LOGGED
        for action in actions:
            if isinstance(action, Committed):  # the verdicts stand before it
                self.server.oracle.committed(self.server.index, action.version, durable=durable)
        for action in self.commits.admit(actions):
            self._do(action)
        self.state.validate()
        if self.server.index == 0 and self.alive:
            self.server.oracle.hands_out(self.state._world.ledger.epoch)

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

    def die(self) -> None:
        """Nothing of this process does anything any more."""
        self.alive = False
        if self.store is not None:
            self.store.alive = False

    # ---- what the state machine wants

    def _do(self, action: Action) -> None:
        match action:
            case Send() | Echo() | Broadcast() | SendFull():
                self._transmit(action)
            case Reduce(round_, shard):
                frame = self._hold().reduce(action)
                self._events.append(ShardReduced(round_, shard, frame, REDUCE_S))
            case Retake():
                self._retake(action)
            case GoBack():
                raise Violation(action.text)
            case Judge():
                self._events.append(self._hold().judge(action))
            case Initialize(shard, _, values):
                self._hold().init(shard, values)
            case Adopt():
                self.weights = self._make_weights(action.plan)
            case Stop():
                self._stop(action)
            case Log():
                self.server.schedule.note("log", self.server.index, action.event, action.fields)
            case _:
                pass

    def _retake(self, action: Retake) -> None:
        """Make a round again that the oracle has seen."""
        weights = self._hold()
        weights.on_reduced = _unseen
        self._events.append(Retaken(action.past.number, retake(action.past, weights)))
        weights.on_reduced = self._reduced
        self.server.network.strike("recalled")
        if weights.version == self.state.snapshot(self.server.clock.now_s()).version:
            self.server.oracle.remade(self.server.index, weights.values)

    def _stop(self, action: Stop) -> None:
        """The process ends; its connections do a while later."""
        self.die()
        self.server.ended = action
        self.server.schedule.note("server ends", self.server.index, action.reason)
        for connection, link in self.end.links.values():
            self.server.schedule.after(LINGER_S, partial(link.drop, connection))

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

    def _make_weights(self, plan: Plan) -> IntegerWeights:
        return IntegerWeights(plan, RUN_ID, self.epoch, self._reduced)

    def _reduced(
        self, round_: int, shard: int, said: tuple[Pushed, ...], now: tuple[int, int]
    ) -> None:
        self.server.oracle.reduced(self.server.index, round_, shard, said, now)

    def _goes_down(self, frame: Buffer) -> None:
        self.server.oracle.goes_down(self.server.index, frame)

    def _hold(self) -> IntegerWeights:
        if self.weights is None:
            msg = "weights are asked for before there is a plan"
            raise Violation(msg)
        return self.weights


def _unseen(round_: int, shard: int, said: tuple[Pushed, ...], now: tuple[int, int]) -> None:
    """A replay: the oracle has seen these rounds."""
    del round_, shard, said, now

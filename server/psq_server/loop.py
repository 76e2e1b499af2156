"""The shell around the state machine: one thread that polls, asks, and does what it is told.

    wait for frames, a signal or a tick  ->  state.handle(event)  ->  do each action  ->  again

Nothing is decided here. Actions may bring about events (a reduced shard, a vanished peer); these
are handled before the next frame is taken, so the machine always sees one thing at a time. The
weights live in `Weights`; frames are sealed once and shared by all peers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, assert_never

from psq.clock import parse_consistency
from psq.errors import EXIT_STATE, StateError
from psq.link import DRAIN_LIMIT, Sent, ServerLink, WorkerLink
from psq.metrics import Totals
from psq.plan import Plan
from psq.rules.coded import MAX_LAG
from psq.timeline import MIN_WAIT_S, NOWHERE, Phase, Timeline
from psq_proto.frames import Buffer, glance
from psq_proto.messages import NO_SHARD, MessageType
from psq_server.commits import Answer, Commits
from psq_server.line_log import LineLog
from psq_server.outbox import Outbox
from psq_server.retaking import retake
from psq_server.saving import metadata_of, part_path, save_weights
from psq_server.signals import Signals
from psq_server.state import (
    Action,
    Adopt,
    Broadcast,
    Changed,
    Checkpoint,
    Committed,
    Echo,
    Event,
    FrameReceived,
    GoBack,
    Initialize,
    Judge,
    Log,
    PeerBehind,
    PeerGone,
    Reduce,
    Retake,
    Retaken,
    Save,
    Send,
    SendFull,
    ServerState,
    ShardReduced,
    Snapshot,
    Started,
    Stop,
    StopRequested,
    Tick,
)
from psq_server.weights import Weights

if TYPE_CHECKING:
    from psq_server.store import Store

__all__ = ["FAREWELL_S", "FLUSH_S", "TICK_S", "Above", "Ending", "Loop", "Observer"]

MAX_WAITING_VERSIONS: Final = 8
"""Versions that may wait for one slow reader, where workers may be as far apart."""
TICK_S: Final = 0.25
FLUSH_S: Final = 0.001
"""How soon a peer whose queue was full is tried again."""
FAREWELL_S: Final = 1.2
"""How long an ending server waits for workers to hang up: one that computes reads once a second."""
FAREWELL_TRY_S: Final = 0.1


class Above(Protocol):
    """The server above, in a tree: it has the weights, and says what becomes of them.

    `psq_server.tree.Aggregator` is one.
    """

    @property
    def plan(self) -> Plan | None:
        """What is trained; None before the first worker has said it."""

    @property
    def link(self) -> WorkerLink:
        """Wakes the loop."""

    def take(self, action: Action) -> bool:
        """Begin what an action asks for; False if it is the loop's to do."""

    def turn(self) -> Iterator[Event | Broadcast]:
        """What has come of it, and is to be done about it, one thing after another."""

    def patience_s(self) -> float:
        """How long nothing has to be done, unless something comes."""


class Observer(Protocol):
    """Who is told how long things took; `psq.metrics.Metrics` is one."""

    def observe_step(self, duration_s: float) -> None:
        """A round was committed, so long after the one before."""

    def observe_phase(self, phase: str, duration_s: float) -> None:
        """One round spent this long in a phase."""

    def observe_staleness(self, steps: int) -> None:
        """A contribution that counts was so many rounds stale."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How and why the loop ended.

    The reason "lost" is no end of the server: rounds are lost, and it goes on from before them.
    """

    exit_code: int
    reason: str
    text: str
    saved: str


@dataclass(slots=True)
class _Phases:
    """Seconds by phase: of the round under way, and altogether."""

    clock: Callable[[], float]
    round_s: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("wait", "receive", "reduce", "send"), 0.0)
    )
    total_s: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("wait", "receive", "reduce", "send", "save"), 0.0)
    )

    @property
    def elsewhere_s(self) -> float:
        """Seconds so far in what receiving brings about."""
        total_s = self.total_s
        return total_s["reduce"] + total_s["send"] + total_s["save"]

    def add(self, phase: str, duration_s: float) -> None:
        self.total_s[phase] += duration_s
        if phase in self.round_s:
            self.round_s[phase] += duration_s

    def close_rounds(self, observer: Observer, count: int) -> None:
        """Tell of the rounds that ended in one turn, and share its time among them."""
        for phase, duration_s in self.round_s.items():
            for _ in range(count):
                observer.observe_phase(phase, duration_s / count)
            self.round_s[phase] = 0.0


class Loop:
    """Runs one server until it is done.

    Args:
        link: where frames come from.
        state: decides.
        log: takes the events worth a line.
        signals: wake the loop and end it.
        observer: is told how long things took.
        save: where the final weights go, if anywhere.
        insecure: shown in the metrics.
        clock: monotonic seconds.
        timeline: records what happens when, on the same clock.
        above: the server above, in a tree.
        store: the disk, where something is to outlive this process.
        weights: of a job that goes on.

    Attributes:
        timeline: that one.
    """

    def __init__(  # noqa: PLR0913 - a shell gets its world as arguments
        self,
        link: ServerLink,
        state: ServerState,
        *,
        log: LineLog,
        signals: Signals,
        observer: Observer,
        save: Path | None,
        insecure: bool = False,
        clock: Callable[[], float] = time.monotonic,
        timeline: Timeline | None = None,
        above: Above | None = None,
        store: Store | None = None,
        weights: Weights | None = None,
    ) -> None:
        self._link = link
        self._above = above
        self._state = state
        self._log = log
        self._signals = signals
        self._observer = observer
        self._save = save
        self._insecure = insecure
        self._clock = clock
        self.timeline = timeline
        self._outbox = Outbox(link, lambda shard: self._hold().full(shard))
        self._events: deque[Event] = deque()
        self._weights = weights
        self._store = store
        self._commits = Commits(state, store, self._hold, log, clock=clock)
        self._outbox.is_paused = lambda: self._commits.is_busy
        if weights is not None:
            self._suit(weights.plan)
            weights.watch(self._is_busy)
        self._phases = _Phases(clock)
        self._committed = 0  # rounds that have ended in the present turn
        self._ending: Ending | None = None
        self._byes: tuple[Send, ...] = ()
        self._saved = ""
        self._failure: StateError | None = None
        self._tick_s = self._round_s = clock()
        self._watched = (self._tick_s, state.snapshot(self._tick_s))

    @property
    def phase_seconds(self) -> Mapping[str, float]:
        """Seconds spent in each phase so far."""
        return self._phases.total_s

    @property
    def plan(self) -> Plan | None:
        """What is trained, as this server sees it; None before the first worker has said it."""
        if self._above is not None:
            return self._above.plan
        return None if self._weights is None else self._weights.plan

    @property
    def watched(self) -> tuple[float, Snapshot]:
        """(when, how things were) at the last tick; for other threads."""
        return self._watched

    def totals(self) -> Totals:
        """The counts for a scrape; reads plain numbers, and may be called from any thread."""
        counts, (_, snapshot) = self._state.counts, self._watched
        store, kept = self._store, {}
        if store is not None:
            kept = {"written": store.checkpoints, "failed": store.failed_checkpoints}
        return Totals(
            sent_bytes=self._link.sent_bytes,
            received_bytes=self._link.received_bytes,
            rounds=counts.rounds,
            version=snapshot.version,
            pushes=dict(counts.pushes),
            skipped=counts.skipped,
            evicted=counts.evicted,
            rejected=dict(counts.rejected),
            workers=snapshot.workers,
            waiting_s=snapshot.waiting_s,
            insecure=self._insecure,
            durable_version=self._commits.durable_version,
            blocked=bool(self._commits.blocked),
            journal_bytes=0 if store is None else store.journal_bytes,
            checkpoints=kept,
            copies={} if store is None else dict(store.copies),
            checkpoint_age_s=0.0 if store is None else store.age_s,
        )

    @property
    def dropped_frames(self) -> int:
        """Frames dropped because their peer was too slow, or the disk was and too many asked."""
        return self._outbox.dropped_frames + self._commits.dropped

    @property
    def refused_keys(self) -> int:
        """Handshakes that were refused for their key."""
        return self._link.refused_keys

    def run(self) -> Ending:
        """Work until the state machine says stop.

        Raises:
            StateError: the weights could not be saved, or there is no room for them. Whatever is
                raised, the workers are told that the server ends.
        """
        self._link.watch(self._signals.fd)
        if self._above is not None:
            self._link.watch(self._above.link)
        if self._store is not None:
            self._link.watch(self._store.fd)
        try:
            while self._ending is None:
                self._turn()
        except Exception as error:
            self._fail(error)
            raise
        self._outbox.flush()
        self._linger()
        if self._store is not None:
            self._link.unwatch(self._store.fd)
        if self._failure is not None:
            raise self._failure
        return self._ending

    def _fail(self, error: Exception) -> None:
        """Tell the workers that this process ends, so that they need not find out by silence."""
        text = f"the server failed: {type(error).__name__}: {error}"
        self._log.write("error", "failed", {"text": text})
        self._byes = tuple(self._state.fail(text))
        for bye in self._byes:
            self._link.send(bye.peer, bye.frame)
        self._linger()

    def _linger(self) -> None:
        """Keep the link until every worker has heard BYE and hung up, for FAREWELL_S at most.

        What lies unread in a worker's queue is lost with its connection, and the worker would wait
        for a server that has ended. Saying BYE again does no harm, and shows who is gone.
        """
        byes, ends_s = self._byes, self._clock() + FAREWELL_S
        while byes and self._clock() < ends_s:
            time.sleep(FAREWELL_TRY_S)
            byes = tuple(b for b in byes if self._link.send(b.peer, b.frame) is not Sent.GONE)

    def _turn(self) -> None:
        """Wait, take what came, send what can be sent, and look at the time."""
        before_s = self._clock()
        self._link.wait(self._patience_s(before_s))
        now_s = self._clock()
        self._phases.add("wait", now_s - before_s)
        if self.timeline is not None and now_s - before_s >= MIN_WAIT_S:
            self.timeline.add(Phase.WAIT, before_s, now_s)
        elsewhere_s = self._phases.elsewhere_s
        self._hear()
        for peer, frame in self._link.drain(DRAIN_LIMIT):
            self._happen(FrameReceived(peer, frame, self._link.key))
        if self._above is not None:
            for news in self._above.turn():
                if isinstance(news, Broadcast):
                    self._transmit(news)
                    self._follow()
                else:
                    self._happen(news)
        if self._outbox.waiting:
            self._timed("send", self._outbox.flush)
        self._report_gone()
        wish = self._signals.take()
        if wish is not None:
            self._happen(StopRequested(wish))
        after_s = self._clock()
        elsewhere_s = self._phases.elsewhere_s - elsewhere_s
        self._phases.add("receive", max(0.0, after_s - now_s - elsewhere_s))
        if self._committed:
            self._phases.close_rounds(self._observer, self._committed)
            self._committed = 0
        if after_s >= self._tick_due_s():
            self._tick_s = after_s
            self._tell_notes()
            self._link.members = self._state.speakers
            self._happen(Tick())
            self._watched = (after_s, self._state.snapshot(after_s))

    def _tell_notes(self) -> None:
        """Log what the link has seen of strangers, revoked keys and the like."""
        for note in self._link.notes():
            self._log.write("warning", "link", {"text": note})

    def _patience_s(self, now_s: float) -> float:
        if self._outbox.waiting:
            return FLUSH_S
        patience_s = max(0.0, self._tick_due_s() - now_s)
        return patience_s if self._above is None else min(patience_s, self._above.patience_s())

    def _tick_due_s(self) -> float:
        wake_s, tick_s = self._state.wake_s, self._tick_s + TICK_S
        return tick_s if wake_s is None else min(wake_s, tick_s)

    def _happen(self, event: Event) -> None:
        """Handle an event, and every event that its actions bring about."""
        self._events.append(event)
        self._follow()

    def _follow(self) -> None:
        """Handle what has happened."""
        while self._events:
            event, now_s = self._events.popleft(), self._clock()
            actions = self._state.handle(event, now_s)
            if self.timeline is not None and isinstance(event, FrameReceived):
                self._record_push(self.timeline, event.frame, now_s, self._clock())
            for action in self._commits.admit(actions):
                if isinstance(action, Adopt):
                    self._suit(action.plan)
                if self._above is None or not self._above.take(action):
                    self._do(action)

    @staticmethod
    def _record_push(timeline: Timeline, frame: Buffer, start_s: float, end_s: float) -> None:
        seen = glance(frame)
        if seen is not None and seen.type == MessageType.PUSH:
            shard = NOWHERE if seen.shard == NO_SHARD else seen.shard
            timeline.add(Phase.RECEIVE, start_s, end_s, shard, seen.round, seen.rank, len(frame))

    def _hear(self) -> None:
        """Take what the disk has answered."""
        for news in self._commits.hear():
            if isinstance(news, Answer):
                self._happen(news)
            else:
                self._do(news)
        failure = self._commits.give_up()
        if failure is not None:
            self._failure = failure
            self._ending = Ending(failure.exit_code, "failed", str(failure), self._saved)

    def _report_gone(self) -> None:
        for peer in self._link.ended():
            self._outbox.forget(peer)
            self._happen(PeerGone(peer))
        while self._outbox.gone:
            self._happen(PeerGone(self._outbox.gone.pop()))

    def _do(self, action: Action) -> None:  # noqa: C901 - a case for each kind of action
        match action:
            case Send() | Echo() | Broadcast() | SendFull():
                self._timed("send", lambda: self._transmit(action))
            case Reduce() | Judge() | Retake():
                self._work(action)
            case Committed():
                self._close_round(action)
            case Initialize():
                self._hold().reducer.init(action.shard, action.part, action.values)
            case Adopt():
                self._weights = self._make_room(action.plan)
            case Started() | Changed() | Checkpoint():
                pass  # they are the gate's
            case GoBack():
                self._ending = Ending(EXIT_STATE, "lost", action.text, self._saved)
            case Log():
                self._log.write(action.level, action.event, action.fields)
            case Save():
                before_s = self._clock()
                self._timed("save", lambda: self._write_weights(action.version))
                if self.timeline is not None and self._save is not None:
                    self.timeline.add(Phase.SAVE, before_s, self._clock())
            case Stop():
                self._log.write("info", "stop", {"reason": action.reason, "text": action.text})
                self._ending = Ending(action.exit_code, action.reason, action.text, self._saved)
                self._byes = action.byes
            case _:
                assert_never(action)

    def _transmit(self, action: Send | Echo | Broadcast | SendFull) -> None:
        match action:
            case Send():
                self._outbox.send(action.peer, action.frame)
            case Echo():
                self._outbox.send_if_idle(action.peer, action.frame)
            case Broadcast():
                self._share(action)
            case SendFull():
                for peer in action.peers:
                    self._outbox.send_full(peer, action.versions)

    def _suit(self, plan: Plan) -> None:
        """Let the outbox hold as many versions as the job's workers may be apart."""
        staleness = parse_consistency(plan.consistency).max_staleness
        most = MAX_WAITING_VERSIONS
        self._outbox.max_versions = most if staleness is None else min(most, 2 + staleness)
        if plan.replicas > 1:
            self._outbox.max_versions = MAX_LAG + 2

    def _make_room(self, plan: Plan) -> Weights:
        settings = self._state.settings
        try:
            return Weights(plan, settings.run_id, settings.epoch, self._is_busy)
        except MemoryError as error:
            msg = f"there is no room for the job's {plan.layout.numel} values: {error}"
            raise StateError(msg) from error

    def _is_busy(self, frame: Buffer) -> bool:
        return self._link.is_lent(frame) or self._outbox.holds(frame)

    def _work(self, action: Reduce | Judge | Retake) -> None:
        if isinstance(action, Reduce):
            self._reduce(action)
        elif isinstance(action, Judge):
            self._judge(action)
        else:
            self._timed("reduce", lambda: self._retake(action))

    def _reduce(self, action: Reduce) -> None:
        before_s = self._clock()
        frame = self._hold().reduce(action)
        reduce_s = self._clock() - before_s
        self._phases.add("reduce", reduce_s)
        if self.timeline is not None:
            shard, end_s = action.shard, before_s + reduce_s
            self.timeline.add(
                Phase.REDUCE, before_s, end_s, shard, action.round, NOWHERE, len(frame)
            )
        self._events.append(ShardReduced(action.round, action.shard, frame, reduce_s))

    def _retake(self, action: Retake) -> None:
        """Make a round again whose payloads have come."""
        frames = retake(action.past, self._hold())
        self._events.append(Retaken(action.past.number, frames))

    def _judge(self, action: Judge) -> None:
        before_s = self._clock()
        self._events.append(self._hold().judge(action))
        judge_s = self._clock() - before_s
        self._phases.add("reduce", judge_s)
        if self.timeline is not None:
            end_s = before_s + judge_s
            self.timeline.add(Phase.REDUCE, before_s, end_s, NOWHERE, action.round, NOWHERE, 0)

    def _share(self, action: Broadcast) -> None:
        before_s = self._clock()
        frames = tuple(zip(action.shards, action.frames, strict=True))
        for peer in action.peers:
            if not self._outbox.send_weights(peer, action.version, frames):
                self._events.append(PeerBehind(peer))
        if self.timeline is not None:
            shard = action.shards[0] if len(action.shards) == 1 else NOWHERE
            nbytes = len(action.peers) * sum(map(len, action.frames))
            end_s, version = self._clock(), action.version
            self.timeline.add(Phase.BROADCAST, before_s, end_s, shard, version - 1, NOWHERE, nbytes)

    def _close_round(self, action: Committed) -> None:
        """Tell the observer of a round that is over; of its phases when the turn has ended."""
        now_s = self._clock()
        self._observer.observe_step(now_s - self._round_s)
        self._round_s = now_s
        self._committed += 1
        for steps in action.staleness:
            self._observer.observe_staleness(steps)

    def _write_weights(self, version: int) -> None:
        if self._save is None:
            return
        held, settings = self._hold(), self._state.settings
        path = part_path(self._save, held.plan.server, held.plan.servers)
        metadata = metadata_of(held.plan, settings.run_id, version)
        try:
            size_bytes = save_weights(path, held.reducer.weights(), metadata)
        except StateError as error:
            # The workers are told goodbye all the same: what they did cannot be saved by waiting.
            self._failure = error
            self._log.write("error", "not-saved", {"text": str(error)})
            return
        self._saved = str(path)
        self._log.write(
            "info", "saved", {"path": self._saved, "bytes": size_bytes, "version": version}
        )

    def _timed(self, phase: str, work: Callable[[], None]) -> None:
        before_s = self._clock()
        work()
        self._phases.add(phase, self._clock() - before_s)

    def _hold(self) -> Weights:
        assert self._weights is not None, "weights are asked for before there is a plan"  # noqa: S101
        return self._weights

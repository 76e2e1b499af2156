"""The server as a pure state machine: `handle(event, now_s) -> [action]`.

Theory of operation
===================

    EMPTY --JOIN--> JOB --INIT, all parts, from rank 0--> OPEN(r)

    of each shard, in round r:   open --every member has said it--> closed --ShardReduced-->
                                 version r + 1, WEIGHTS to everybody, at once
    of the round:                the last shard is reduced --> COMMIT: version r + 1, VERDICTs,
                                 OPEN(r + 1)

The first JOIN's plan is the job; this server has some of its shards. Round r collects contributions
and turns version r of every shard into r + 1. A rank has said a shard when it pushed it, skipped
it, or was refused it. Where every member is in every round (bsp), a shard is given to the reducer
as soon as it is said by all: so compressing, sending, reducing, broadcasting and decoding of
different shards overlap. Under any other consistency a round closes all its shards at once, for the
contributions that are complete; the others stay for the next round while they are not too stale,
and are rejected then. So it does under any consistency where the recipe judges whole rounds: then
all that was taken waits for `Judged`, and refused ranks have said nothing. Which ranks are members,
when a round closes and what is too stale are `psq.clock`'s decisions.

A contribution is named by the version it was computed from, and has one verdict, which says of each
shard whether it counts: all do but those it names. Payloads live from the push until their shard is
closed.

Never here: a clock, a socket, a thread, a log, randomness, arithmetic on weights. The shell
(`psq_server.loop`) brings all of these. Same events at the same times, same actions.

Invariants, which `validate` checks:

- a shard is reduced once a round, and a rank's payload counts at most once in it;
- the version grows by exactly 1, equals the open round, and is the least of the shards' versions;
  a shard is at most one ahead, and only while the open round has reduced it (one that a round
  does not move has its version all the same);
- a contribution that counts is at most as stale as the consistency allows;
- a shard is said in one way only: staged, counted, skipped or refused;
- nobody has a verdict for a contribution that is still open, or one that is not committed;
- what is staged stays within ranks x payload bytes of this server's shards;
- at most one peer speaks for a rank, and it bears the rank's incarnation;
- nobody is given up unless rounds may go on without, and nothing partial of those who are is
  staged;
- every position of an epoch of the data is in the pool, held by one rank, or visited.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Self, assert_never

from psq import clock
from psq.errors import RemoteError
from psq.plan import Plan
from psq_proto.frames import Buffer
from psq_proto.messages import MessageType
from psq_proto.session import Message, State
from psq_server.state import (
    drawing,
    durable,
    elastic,
    joining,
    keeping,
    presence,
    replaying,
    rounds,
    training,
)
from psq_server.state.events import (
    Action,
    Blocked,
    Changed,
    Checkpointed,
    DurabilityLevel,
    Durable,
    EndedAbove,
    Event,
    FrameReceived,
    Judged,
    PeerBehind,
    PeerGone,
    Retaken,
    Send,
    ShardReduced,
    StopRequested,
    Tick,
    WaitsAbove,
    WeightsAbove,
)
from psq_server.state.members import MAX_STRANGERS, STANDINGS, Peer, standing
from psq_server.state.round import Contribution
from psq_server.state.world import Counts, Settings, World

__all__ = ["ServerState", "Snapshot"]

STORY_EVENTS: Final = 256

_HANDLERS: Final[dict[MessageType, Callable[[World, Peer, Message], None]]] = {
    MessageType.HELLO: joining.on_hello,
    MessageType.PLAN: joining.on_plan,
    MessageType.JOIN: joining.on_join,
    MessageType.INIT: training.on_init,
    MessageType.PUSH: training.on_push,
    MessageType.PULL: training.on_pull,
    MessageType.HEARTBEAT: presence.on_heartbeat,
    MessageType.LEAVE: presence.on_leave,
    MessageType.CKPT_OK: keeping.on_kept,
    MessageType.PROBE: presence.on_probe,
    MessageType.DRAW: drawing.on_draw,
    MessageType.AGAIN: replaying.on_again,
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How the server is at one moment, for those who watch it.

    Attributes:
        status: "waiting" for workers or initial weights, "running", "stalled", "blocked" by the
            disk, "recovering" (workers say again what the server lacks), or "stopping".
        version: of the weights; -1 before the first.
        round: the open round.
        text: the present wait in words.
        waiting_s: its age.
        workers: how many ranks have each standing.
    """

    status: str
    version: int
    round: int
    text: str
    waiting_s: float
    workers: dict[str, int]


class ServerState:
    """One server's whole state; change it through `handle` alone."""

    def __init__(self, settings: Settings, now_s: float) -> None:
        self._world = World(settings, now_s)
        self._story: deque[tuple[float, str, str]] = deque(maxlen=STORY_EVENTS)
        self._checked_version = 0
        self._recorder = durable.Recorder()

    @classmethod
    def restore(  # noqa: PLR0913 - all that was on the disk
        cls,
        settings: Settings,
        captured: Mapping[str, durable.Plain],
        now_s: float,
        *,
        shards: Mapping[int, int],
        frames: Mapping[int, tuple[Buffer, ...]],
        rest: durable.Rest = durable.NO_REST,
    ) -> Self:
        """The state that was captured, between two rounds, without any connection.

        Args:
            settings: with this start's epoch.
            captured: by `capture`, and brought up to date by `durable.merge`.
            now_s: all ranks count as heard now.
            shards: the version that moved each shard last.
            frames: what was broadcast last of each shard, sealed for this epoch.
            rest: what else was on the disk; of rounds that are owed, nothing is in the weights.

        Raises:
            StateError: another version of psq wrote it.
        """
        made = cls(settings, now_s)
        durable.restore(made._world, captured, shards, frames, rest)
        made._checked_version = made._world.version
        made._recorder.capture(made._world)
        return made

    def capture(self) -> dict[str, durable.Plain]:
        """All that outlives this process, but for weights and what an open round holds."""
        return self._recorder.capture(self._world)

    def changes(self, *, committed: bool) -> dict[str, durable.Plain]:
        """What of it has changed since this was asked last; for `durable.merge`."""
        return self._recorder.changes(self._world, committed=committed)

    @property
    def plan(self) -> Plan | None:
        """The job, once there is one."""
        return None if self._world.job is None else self._world.job.plan

    @property
    def closes_whole(self) -> bool:
        """Whether rounds close all their shards at once."""
        return self._world.job is not None and self._world.job.is_whole

    @property
    def level(self) -> DurabilityLevel:
        """What of the job outlives this process."""
        return self._world.level

    @property
    def counts(self) -> Counts:
        """What has happened so far."""
        return self._world.counts

    @property
    def settings(self) -> Settings:
        """What this server was told."""
        return self._world.settings

    @property
    def speakers(self) -> frozenset[bytes]:
        """The peers that speak for a rank."""
        members = self._world.members.values()
        return frozenset(member.peer for member in members if member.peer is not None)

    @property
    def stopped(self) -> bool:
        """Whether `Stop` has been said; later events do nothing."""
        return self._world.stopped

    @property
    def wake_s(self) -> float | None:
        """When a `Tick` is needed, whatever else happens; None: at any time."""
        world = self._world
        ending_s = world.ending[1] if world.ending else None
        due = [world.due_s, ending_s, elastic.due_s(world)]
        return min((due_s for due_s in due if due_s is not None), default=None)

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """What to do about one event.

        Args:
            event: what happened.
            now_s: when, on any clock that never goes back.
        """
        world = self._world
        if world.stopped:
            return []
        world.now_s, world.out, world.touched = now_s, [], False
        label = self._dispatch(event)
        presence.end_if_due(world)
        if world.touched and world.is_logged:
            world.out.insert(0, Changed())
        self._story.append((now_s, label, " ".join(type(action).__name__ for action in world.out)))
        return world.out

    def fail(self, text: str) -> list[Send]:
        """The goodbyes of a process that cannot go on; later events do nothing."""
        return presence.fail(self._world, text)

    def snapshot(self, now_s: float) -> Snapshot:
        """How things are now; changes nothing."""
        world = self._world
        world.now_s = max(world.now_s, now_s)
        wait = presence.current_wait(world)
        workers = dict.fromkeys(STANDINGS, 0)
        for rank in world.ranks:
            workers[standing(world.members.get(rank), now_s, world.settings.lease_s)] += 1
        return Snapshot(
            status=self._status(),
            version=world.version if world.has_weights else -1,
            round=world.round.number,
            text=presence.wait_text(world),
            waiting_s=wait.age_s(now_s) if wait else 0.0,
            workers=workers,
        )

    def story(self) -> str:
        """The last events, one a line, for whoever has to find out how it came to this."""
        return "\n".join(
            f"{now_s:.3f} {label} -> {actions}" for now_s, label, actions in self._story
        )

    def validate(self) -> None:
        """Check every invariant; for tests, after each event.

        Raises:
            AssertionError: one is broken; the message ends with the story.
        """
        try:
            self._check()
        except AssertionError as error:
            msg = f"{error}\n{self.story()}"
            raise AssertionError(msg) from error

    def _dispatch(self, event: Event) -> str:  # noqa: C901 - a case for each kind of event
        """Handle one event; returns its name for the story."""
        world = self._world
        match event:
            case FrameReceived():
                return self._on_frame(event)
            case ShardReduced() | Judged():
                rounds.on_reducer(world, event)
            case Tick():
                presence.on_tick(world)
            case PeerGone():
                presence.on_peer_gone(world, event)
            case PeerBehind():
                presence.on_peer_behind(world, event)
            case WeightsAbove():
                training.on_weights_above(world)
            case WaitsAbove():
                world.above = event.text
            case EndedAbove():
                presence.finish(world, event.exit_code, "gave-up", event.text)
            case Durable() | Blocked() | Checkpointed():
                self._on_disk(event)
            case Retaken():
                replaying.on_retaken(world, event)
            case StopRequested():
                presence.on_stop_requested(world, event.reason)
            case _:
                assert_never(event)
        return type(event).__name__

    def _on_disk(self, event: Durable | Blocked | Checkpointed) -> None:
        world = self._world
        was_full = keeping.is_full(world)
        keeping.on_disk(world, event)
        if was_full and not keeping.is_full(world):  # rounds waited for this
            world.progressed()
            rounds.advance(world)

    def _on_frame(self, event: FrameReceived) -> str:
        world = self._world
        peer = world.peers.get(event.peer)
        if peer is not None and peer.key != event.key:
            # Whoever connects names its connection: another key must not go on with this one's.
            presence.on_peer_gone(world, PeerGone(event.peer))
            peer = None
        peer = peer or world.new_peer(event.peer, event.key)
        try:
            message = peer.session.receive(event.frame)
            presence.note_seen(world, peer)
            _HANDLERS[message.header.type](world, peer, message)
        except RemoteError as error:
            world.refuse(peer, error)
            return f"refused {type(error).__name__} of {peer.name.hex()}"
        header = message.header
        return f"{header.type.name} rank={header.rank} round={header.round} shard={header.shard}"

    def _status(self) -> str:
        world = self._world
        if world.stopped or world.ending is not None:
            return "stopping"
        if world.disk:
            return "blocked"
        if presence.is_stalled(world):
            return "stalled"
        if world.collection is not None:
            return "recovering"
        return "running" if world.has_weights else "waiting"

    def _check(self) -> None:
        world = self._world
        assert world.version in (self._checked_version, self._checked_version + 1), "version jumped"
        self._checked_version = world.version
        assert world.round.number == world.version, (world.round.number, world.version)
        assert world.counts.rounds == world.version, (world.counts.rounds, world.version)
        if world.stopped:
            return  # every conversation has ended
        self._check_members()
        self._check_round()
        elastic.check(world)
        drawing.check(world)
        strangers = len(world.peers) - sum(1 for _ in world.peers.joined())
        assert strangers <= MAX_STRANGERS, strangers

    def _check_members(self) -> None:
        world = self._world
        speaking: set[bytes] = set()
        for rank, member in world.members.items():
            assert member.rank == rank
            assert world.world_size is None or rank in world.ranks, rank
            assert member.last_applied < world.version, (rank, member.last_applied, world.version)
            assert member.incarnation <= world.incarnation, rank
            assert not (member.synced and not world.has_weights), rank
            if member.peer is None:
                assert not member.synced, rank
                continue
            assert member.peer not in speaking, f"{member.peer.hex()} speaks for two ranks"
            speaking.add(member.peer)
            peer = world.peers.get(member.peer)
            assert peer is not None, rank
            assert peer.session.joined, (rank, peer.session.state)
            assert (peer.session.rank, peer.session.incarnation) == (rank, member.incarnation), rank
        assert speaking == {peer.name for peer in world.peers.joined()}, "a joined peer has no rank"
        for peer in world.peers.joined():
            assert peer.session.state not in (State.FENCED, State.CLOSED), peer.name.hex()

    def _check_round(self) -> None:
        world, job, open_round = self._world, self._world.job, self._world.round
        contributions = [*open_round.items(), *open_round.closing.items()]
        assert world.collection is None or not open_round.closed, "a round closed too early"
        if job is None:
            assert not contributions
            return
        assert not (open_round.is_reduced and open_round.shards), "a round was not committed"
        for shard, version in world.versions.items():
            ahead = open_round.closed.get(shard) is not None
            now = job.plan.due_after(shard, world.version + ahead)
            assert job.plan.due_after(shard, version) == now, (shard, version, world.version)
            assert version <= world.version + ahead, (shard, version, world.version)
        for rank, mine in contributions:
            self._check_contribution(rank, mine)
        staged_bytes = sum(mine.staged_bytes for _, mine in contributions)
        assert staged_bytes == open_round.staged_bytes
        assert staged_bytes <= job.staged_bytes_limit, (staged_bytes, job.staged_bytes_limit)

    def _check_contribution(self, rank: int, mine: Contribution) -> None:
        world, job = self._world, self._world.need_job()
        member = world.members[rank]
        assert member.last_applied < mine.base, rank
        assert member.resolved is None or member.resolved.seq < mine.base, rank
        assert clock.may_apply(mine.base, world.version, job.consistency), (rank, mine.base)
        assert mine.payloads.keys() | mine.counted == mine.checksums.keys(), rank
        said = [*mine.checksums, *mine.nothing, *mine.refused]
        assert len(said) == len(set(said)) == mine.said_count, (rank, sorted(said))
        assert set(said) <= set(world.round.owed), (rank, sorted(said))
        assert not mine.counted - world.round.closed.keys(), rank
        assert not (mine.counted and world.round.judging), rank
        if not world.round.whole:
            assert not mine.payloads.keys() & world.round.closed.keys(), rank

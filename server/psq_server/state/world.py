"""All that a server knows, and the few ways of changing it that every handler needs.

Plain data with helpers: no decision is made here. Handlers (`joining`, `training`, `presence`) are
functions of a `World` and one message; what they decide to do, they append to `World.out`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal, Unpack

from psq.clock import DEADLINE_SAMPLES
from psq.errors import FencedError, RemoteError, StaleFrameError
from psq.keys import Authorized
from psq.plan import Plan
from psq.seldom import Seldom
from psq_proto.frames import Buffer
from psq_proto.messages import ControlBody, Error, ErrorCode, Fenced, MessageType, clip_text
from psq_proto.session import HeaderFields, ServerSession, State
from psq_server.state.branches import Branches
from psq_server.state.events import LOGGED, Action, DurabilityLevel, Field, Level, Log, Send
from psq_server.state.job import Job
from psq_server.state.ledger import Ledger
from psq_server.state.members import Member, Peer, Peers
from psq_server.state.past import Collection
from psq_server.state.replicas import Replicas
from psq_server.state.round import OpenRound

__all__ = ["MAX_COMPLAINTS", "Counts", "Settings", "World"]

MAX_KINDS: Final = 32
"""Words for why contributions do not count; of rules that have more, the rest is "other"."""
REJECTED_EVERY_S: Final = 10.0
"""From one line about what is rejected of a rank to the next: some rules refuse all the time."""
MAX_COMPLAINTS: Final = 8
"""Refusals of one connection that are answered and logged; later ones are only counted."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a server is told before it starts.

    Attributes:
        run_id: 16 random bytes that name this run.
        epoch: how often this run's server has started, from 1.
        world_size: accept only jobs of so many workers; None leaves it to the first plan.
        recipe: accept only jobs with a recipe of this name; None leaves it to the first plan.
        lease_s: silence after which a rank counts as lost.
        min_workers: rounds go on without ranks that are lost, with so many at least; None: every
            rank is waited for.
        grace_s: with that, how long after the first JOIN those that have not come are waited for.
        give_up_after_s: a wait that lasts longer ends the server.
        branches: who speaks to this server, in a tree; None: every rank for itself.
        is_root: there is no server above this one.
        memory_bytes: what this machine has; a larger model is refused. None: unknown.
        disk_bytes: what is free where the weights will be saved; likewise. None: not saved.
        saves: whether this server is to save the weights in the end.
        durability: what of a job outlives this process; "auto" is "journal" for small rounds.
        kept_bytes: at level "replay", of payloads that each worker keeps for this server at most.
        checkpoint_every: rounds from one checkpoint to the next; None: only time says.
        checkpoint_s: seconds from one checkpoint to the next.
    """

    run_id: bytes
    epoch: int = 1
    world_size: int | None = None
    recipe: str | None = None
    lease_s: float = 10.0
    min_workers: int | None = None
    grace_s: float = 10.0
    give_up_after_s: float = 900.0
    branches: Branches | None = None
    is_root: bool = True
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    saves: bool = False
    durability: Literal["off", "auto", "checkpoint", "replay", "journal"] = "off"
    kept_bytes: int = 256 << 20
    checkpoint_every: int | None = None
    checkpoint_s: float = 60.0


@dataclass(slots=True)
class Counts:
    """What has happened so far."""

    rounds: int = 0
    max_staleness: int = 0
    skipped: int = 0
    joins: int = 0
    resets: int = 0
    fenced: int = 0
    evicted: int = 0
    cold: int = 0
    pushes: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    rejected: Counter[tuple[int, str]] = field(default_factory=Counter)
    """Contributions of which something, or nothing, counted, by rank and kind of reason."""


class World:
    """See the module's docstring. `version` means nothing before `has_weights`.

    Attributes:
        KEPT: what outlives the process beside the plan and the members (see `durable`); the rest
            is of this process (clocks, connections) or is said again (an open round).
    """

    KEPT: ClassVar[tuple[str, ...]] = (
        "version",
        "counts",
        "durations_s",
        "replicas",
        "ledger",
        "starts",
    )

    def __init__(  # noqa: PLR0915 - all that a server knows, field by field
        self, settings: Settings, now_s: float
    ) -> None:
        self.settings = settings
        self.now_s = now_s
        self.progress_s = now_s
        self.noted_wait_s = now_s
        self.incarnation = 0
        self.peers = Peers()
        self.members: dict[int, Member] = {}
        self.offers: dict[int, Plan] = {}
        self.job: Job | None = None
        self.init_parts: set[tuple[int, int]] = set()
        self.has_weights = False
        self.version = 0
        self.round = OpenRound(0, ())
        self.versions: dict[int, int] = {}
        """Of each shard, the version that moved it last; up to the next round that moves it
        (`Plan.due_after`) its weights are those of every version."""
        self.last_frames: dict[int, tuple[Buffer, ...]] = {}
        """Of each shard, what was broadcast last."""
        self.ledger = Ledger()
        self.replicas: Replicas | None = None
        """Who speaks for whom, where ranks compute the same."""
        self.above = ""
        """What the servers above wait for, in a tree."""
        self.server_s = 0.0
        """What reducing the open round has taken so far."""
        self.durations_s: deque[float] = deque(maxlen=DEADLINE_SAMPLES)
        """How long the last contributions took, from the weights they were computed from."""
        self.opened_s: dict[int, float] = {}
        """When each of the last versions was made."""
        self.due_s: float | None = None
        """When the open round may close although some have not contributed."""
        self.ending: tuple[str, float] | None = None
        """Told to stop while a round is half reduced: why, and until when it may end."""
        self.counts = Counts()
        self._rejections = Seldom(REJECTED_EVERY_S)
        self.level: DurabilityLevel = "off"
        self.touched = False
        """What is known of the ranks has changed in the present event, outside a commit."""
        self.in_flight: dict[int, dict[int, int]] = {}
        """Of each version whose round is not durable yet: the ranks that it resolved something of,
        and what had been resolved of them before."""
        self.disk = ""
        """Why the disk refuses what has to be durable, if it does."""
        self.start_version = 0
        self.starts: tuple[tuple[int, int], ...] = ()
        """At which versions servers of this run began again, as (epoch, version); see `keeping`."""
        """The weights' version when this server started: 0 for a job it saw from the first."""
        self.checkpoint_version = 0
        self.checkpoint_due_s = now_s + settings.checkpoint_s
        self.checkpoint_at_s = now_s
        self.is_writing = False
        """Whether a checkpoint is being written."""
        self.written_version = 0
        """Of the newest checkpoint that is on disk, as far as this process knows."""
        self.is_exposed = False
        """At level "replay": a process that had kept its payloads may be gone, and they with it."""
        self.collection: Collection | None = None
        """The rounds that are to be made again before anything else happens: see `replaying`."""
        self.replay_s = 0.0
        """What reducing the rounds since the last checkpoint took: what a restart would take."""
        self.gathered = False
        """Whether those that have not come are no longer waited for: see `elastic`."""
        self.gather_until_s: float | None = None
        """Until when they are at most; None before the first JOIN."""
        self.stopped = False
        self.out: list[Action] = []

    @property
    def world_size(self) -> int | None:
        """How many ranks the job has; None before anybody has said."""
        return self.job.world_size if self.job else self.settings.world_size

    @property
    def ranks(self) -> Sequence[int]:
        """The ranks that speak to this server: all there are, but for a server of a tree."""
        branches = self.settings.branches
        return range(self.world_size or 0) if branches is None else branches.ranks

    @property
    def is_elastic(self) -> bool:
        """Whether rounds go on without ranks that are lost."""
        return self.settings.min_workers is not None

    @property
    def finished(self) -> frozenset[int]:
        """The ranks that left with their work done."""
        return frozenset(rank for rank, member in self.members.items() if member.finished)

    def new_peer(self, name: bytes, key: Authorized | None = None) -> Peer:
        """Open a conversation with a connection that was not known."""
        session = ServerSession(run_id=self.settings.run_id, epoch=self.settings.epoch)
        peer = Peer(name, session, self.now_s, key)
        self.peers.add_stranger(peer)
        return peer

    def member_of(self, peer: Peer) -> Member | None:
        """The rank this peer speaks for."""
        member = self.members.get(peer.session.rank)
        return member if member is not None and member.peer == peer.name else None

    def release(self, peer: Peer) -> None:
        """This peer speaks for nobody from now on; what its rank has staged stays."""
        member = self.member_of(peer)
        if member is not None:
            member.cut(self.now_s)
        self.peers.demote(peer)

    @property
    def there(self) -> frozenset[int]:
        """The ranks that take part and were heard within a lease."""
        since_s = self.now_s - self.settings.lease_s
        return frozenset(
            rank for rank, m in self.members.items() if not m.gone and m.seen_s >= since_s
        )

    def need_job(self) -> Job:
        """The job, where there must be one."""
        assert self.job is not None
        return self.job

    def note_opened(self) -> None:
        """The present version was made just now."""
        self.opened_s[self.version] = self.now_s
        if len(self.opened_s) > DEADLINE_SAMPLES:
            del self.opened_s[min(self.opened_s)]

    def note_duration(self, member: Member, base: int) -> None:
        """This rank's contribution, computed from version `base`, is complete."""
        if base in self.opened_s:
            member.took_s = self.now_s - self.opened_s[base]
            self.durations_s.append(member.took_s)

    def note_rejected(self, rank: int, kind: str) -> None:
        """Something that this rank contributed does not count; kinds are of a bounded number."""
        known = {word for _, word in self.counts.rejected}
        if kind not in known and len(known) >= MAX_KINDS:
            kind = "other"
        self.counts.rejected[rank, kind] += 1

    def log_rejected(self, rank: int, number: int, reason: str) -> None:
        """Something of this rank is refused: the first is logged, then one now and then."""
        due = self._rejections.note(rank, self.now_s)
        if due is None:
            return
        more = {"since_last": due.since, "total": due.total} if due.total > 1 else {}
        self.log("rejected", "warning", rank=rank, round=number, reason=reason, **more)

    @property
    def is_logged(self) -> bool:
        """Whether what happens now is to be durable before anybody hears of it."""
        return self.level in LOGGED and self.has_weights

    def changed(self) -> None:
        """What is known of a rank, or of anything else that is kept, is another from now on."""
        self.touched = True

    def progressed(self) -> None:
        """Something came nearer: the age of the present wait starts anew."""
        self.progress_s = self.now_s

    def say(
        self,
        peer: Peer,
        kind: MessageType,
        body: ControlBody | bytes,
        *,
        early: bool = False,
        **fields: Unpack[HeaderFields],
    ) -> None:
        """Send a control message, if this peer's conversation has room for it now.

        An `early` one says nothing that a crash could take back: see `Send`.
        """
        if peer.session.may_send(kind):
            frame = peer.session.send(kind, body, **fields)
            self.out.append(Send(peer.name, frame, early, self.member_of(peer) is None))

    def tell(
        self,
        member: Member,
        kind: MessageType,
        body: ControlBody | bytes,
        **fields: Unpack[HeaderFields],
    ) -> None:
        """Send a control message to whoever speaks for a rank."""
        peer = self.peers.get(member.peer) if member.peer is not None else None
        if peer is not None:
            self.say(peer, kind, body, **fields)

    def log(self, event: str, level: Level = "info", **fields: Field) -> None:
        """Note something for the reader of the log."""
        self.out.append(Log(event, fields, level))

    def fence(self, peer: Peer, text: str) -> None:
        """Tell a peer that another one has its rank now."""
        self.counts.fenced += 1
        self.say(peer, MessageType.FENCED, Fenced(clip_text(text)))
        self.peers.demote(peer)

    def end_conversation(self, peer: Peer, code: ErrorCode, text: str) -> None:
        """Refuse a peer for good: a fatal ERROR; it may come again on a new connection."""
        self._note_refusal(peer, code, text)
        self.say(peer, MessageType.ERROR, Error(code, clip_text(text), fatal=True))
        self.release(peer)

    def refuse(self, peer: Peer, error: RemoteError) -> None:
        """Answer what `receive` or a handler raised, as the session's own rules say."""
        if peer.session.state is State.CLOSED:
            return
        if isinstance(error, StaleFrameError):
            self._note_stale(peer, error)
        else:
            self._note_refusal(peer, type(error).__name__, str(error))
        if peer.complaints <= MAX_COMPLAINTS or isinstance(error, FencedError):
            answer = peer.session.answer(error)
            if answer is not None:
                stranger = self.member_of(peer) is None
                self.out.append(Send(peer.name, answer, stranger=stranger))
        if peer.session.state in (State.CLOSED, State.FENCED):
            self.release(peer)

    def _note_stale(self, peer: Peer, error: StaleFrameError) -> None:
        """Frames of an earlier connection are ordinary: one line tells of all of them.

        They show that the process lives, though it has not seen yet that it must join again.
        """
        for member in self.members.values():
            if member.peer is None and member.incarnation == error.incarnation:
                member.seen_s = self.now_s
                member.cut_s = self.now_s if member.cut_s is not None else None
        self.counts.refused["StaleFrameError"] += 1
        peer.complaints += 1
        if peer.complaints == 1:
            self.log("stale", peer=peer.name.hex(), text=str(error))

    def _note_refusal(self, peer: Peer, kind: str, text: str) -> None:
        self.counts.refused[kind] += 1
        peer.complaints += 1
        if peer.complaints <= MAX_COMPLAINTS:
            self.log("refused", "warning", peer=peer.name.hex(), kind=kind, text=text)

"""A worker's side of its conversation with one server as a pure state machine: frames in and out.

    join:   HELLO -> COOKIE -> PLAN, JOIN -> WELCOME -> [INIT ...] PULL -> WEIGHTS
    round:  PUSH ... -> WEIGHTS ... VERDICT
    end:    LEAVE -> BYE, or any answer to something sent after it

What to send follows from the state, not from a script: `next_frame` makes whatever the present
state calls for, `receive` takes in what comes. So a connection that breaks at any point needs no
path of its own: the server answers STALE_EPOCH, the session is back at its start, the same rules
join again with the same lineage, STATUS tells what arrived, and the rest is sent again, byte for
byte.

Rules it keeps, with the reason:
- What became of a contribution is known from its VERDICT alone. If STATUS says that there was one
  and it never came, something of the contribution is said again: the server repeats its verdict.
- A shard that STATUS calls missing is sent again only if that STATUS answers a heartbeat sent after
  the shard was: the stream is in order, so then it was lost. An older answer proves nothing.
- A round is over when its verdict is known and every shard has reached the version that the verdict
  names. Then, and only then, the refused shards go back into the residual, each once.
- Where ranks compute the same, a worker that is late takes one version after another, as its twin
  did: what comes before its turn is kept.
- Weights reach `Hooks.weights` once per shard and version (see `replica`). A delta whose base was
  lost asks for the weights in full.

Never here: a clock, a socket, a thread, a log, randomness of its own. Queues are bounded by the
number of shards.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from psq.client.epochs import Epochs, check_not_behind, comes_early
from psq.client.farewell import FAREWELL_BEAT_S, Farewell
from psq.client.frames import Frame, PushFrames
from psq.client.hooks import Hooks
from psq.client.identity import Identity, Welcomed
from psq.client.initial import InitialWeights
from psq.client.offset import OffsetEstimate
from psq.client.pending import pending_of, say_as_before
from psq.client.rejections import Rejections
from psq.client.replica import ReplicaVersions
from psq.client.round import Round
from psq.client.said import Said
from psq.client.speech import Speech
from psq.client.standing import Standing
from psq.client.turns import Turns
from psq.client.waits import name_ranks, name_shards
from psq.clock import may_apply, parse_consistency
from psq.errors import (
    ConfigError,
    GaveUpError,
    RemotePayloadError,
    RemoteProtocolError,
    RemoteWireError,
    StaleFrameError,
    UsageError,
)
from psq.plan import Plan
from psq_proto.frames import Header
from psq_proto.messages import (
    NO_VERSION,
    NONE,
    Bye,
    ControlBody,
    Cookie,
    Draw,
    Error,
    ErrorCode,
    Flags,
    Heartbeat,
    Kept,
    Leave,
    MessageType,
    Range,
    StaleEpoch,
    Status,
    Verdict,
    Welcome,
)
from psq_proto.session import State, WorkerSession

__all__ = ["Machine"]

_TYPE_OFFSET: Final = 5


class Machine:
    """See the module's docstring.

    Args:
        plan: what is trained, as this server sees it.
        rank: this worker's number.
        hooks: see `Hooks`.
        heartbeat_s: between two signs of life.
        rng: jitter, nonces and the lineage come from it.
        is_lent: whether the link still reads a buffer.

    Raises:
        ConfigError: the rank is not in the plan.
    """

    def __init__(  # noqa: PLR0913 - a machine gets its world as arguments
        self,
        plan: Plan,
        rank: int,
        hooks: Hooks,
        *,
        heartbeat_s: float,
        rng: random.Random,
        is_lent: Callable[[Frame], bool],
    ) -> None:
        if not 0 <= rank < plan.world_size:
            msg = f"rank: expected 0..{plan.world_size - 1}, got {rank}"
            raise ConfigError(msg)
        self.session = WorkerSession(rank=rank, plan_body=plan.body)
        self.replica = ReplicaVersions(plan, hooks.planes)
        self.frames = PushFrames(plan, is_lent)
        self.round: Round | None = None
        self.notes: deque[str] = deque(maxlen=64)
        self._rejections = Rejections(self.notes)
        self.offset = OffsetEstimate()
        self.damaged_frames = self.resets = 0
        self.answer: Range | None = None  # to the last DRAW
        self._plan = plan
        self._hooks = hooks
        self._heartbeat_s = heartbeat_s
        self._rule = parse_consistency(plan.consistency)
        self._standing = Standing(rng)
        self._shards = tuple(shard.index for shard in plan.owned)
        self._receives_only = not all(group.pushed for group in plan.groups)
        self._speech = Speech(self.session, self.frames)
        self.kept = Said(self.session, self.frames)
        self._outbox = self._speech.outbox
        self._initial = InitialWeights(plan, self.session, hooks.initial, is_lent)
        self._is_held = False
        self._known = NONE  # what the server had when an identity was taken up
        self.holds = False  # the round that was taken up, until `begin`
        self._beat_at_s = 0.0
        self._answers = 0  # of the heartbeats sent since WELCOME
        self.turns = Turns(plan)
        self._pull = self._pull_whole = self._progress = False
        self._gap_version = NONE
        self._epochs = Epochs(early=comes_early(plan))
        self._status: Status | None = None
        self._farewell = Farewell()

    @property
    def joined(self) -> bool:
        """Whether the server has welcomed this worker, on the connection there is now."""
        return self.session.joined and not self._standing.again

    @property
    def resent_frames(self) -> int:
        """Frames sent again because a connection lost them."""
        return self._speech.resent_frames

    @property
    def left(self) -> bool:
        """Whether nobody holds this worker any more."""
        return self._farewell.left

    @property
    def due_s(self) -> float:
        """When something will have to happen although nothing came."""
        if self.session.state in (State.CLOSED, State.FENCED):
            return math.inf
        if self._farewell.due_s < math.inf:
            return self._farewell.due_s
        return (
            min(self._initial.due_s, self._beat_at_s) if self.joined else self._standing.hello_at_s
        )

    @property
    def settled(self) -> bool:
        """Whether nothing is waited for: weights are there, and the round, if any, is over."""
        if self.round is None:
            return self.replica.version != NONE and self.replica.version >= self._known
        return bool(self.round.outcome) and self.replica.version >= self.round.target

    @property
    def ready(self) -> bool:
        """Whether the worker can compute: it has joined, and has the weights to compute from."""
        return self.joined and not self._standing.is_trial and (self.holds or self.settled)

    @property
    def at_rest(self) -> bool:
        """Whether nobody need wait for this server."""
        if self._farewell.leave is not None:
            return self.left
        return self.joined and self.settled

    def waited_for(self) -> str:
        """What the worker waits for, if it waits, in words; empty for the server itself."""
        if not self.joined or self._status is None:
            return ""
        return name_ranks(self._status) or self._status.text

    def forget_status(self) -> None:
        """A new wait begins: what the server last said about an earlier one is old."""
        self._status = None

    # ---- who it is

    @property
    def welcomed(self) -> bool:
        """Whether the server has answered to the identity that was offered."""
        return self._standing.was_welcomed and self.joined

    def offer(self, identity: Identity | None) -> None:
        """Join as this identity, on trial: nothing else is said or taken before `take_up`.

        None begins a new history.
        """
        self._standing.offer(identity)
        self.round, self.holds = None, False
        self._outbox.clear()

    def misfit(self) -> str:
        """Why this server and what was offered do not go together, in words; empty if they do."""
        return self._standing.misfit()

    def take_up(self) -> None:
        """Go on as what was offered: with its weights, and with the round that was under way.

        Of that round the worker may have to say more, computed from the weights it began with: so
        no others are taken before the next `begin`.
        """
        identity, version = self._standing.take_up()
        self._epochs.begin(self.session.epoch, version)
        self.replica.take_up(identity.versions)
        pending = identity.pending
        if pending is None:
            self._known = version
            self._pull = True
            return
        self.round = self._make_round(pending.number, pending.rate, pending.weight)
        say_as_before(self.round, pending, self.frames)
        self.holds = True

    def identity(self) -> Identity:
        """Who this worker is now: what a process that comes after it is to offer."""
        current = self.round
        return Identity(
            self.session.run_id,
            self._standing.lineage,
            self._standing.resolved,
            self.replica.version if current is None else current.number,
            self.replica.versions,
            None if current is None else pending_of(current, self.frames),
            self._epochs.epoch,
        )

    # ---- the worker's own doing

    def begin(self, rate: float, weight: int = 1) -> Round:
        """Open the next round, or go on with the one that was taken up."""
        if self.holds:
            return self._go_on(rate, weight)
        if self.round is not None or self.replica.version == NONE:
            msg = "a round begins after join, and after the round before has ended"
            raise UsageError(msg)
        self._speech.drop_pushes()  # copies of a round that is over: their buffers are needed now
        self._progress = self.turns.jumps = False
        self.round = self._make_round(self.replica.version, rate, weight)
        self._epochs.heard(self.replica.version)  # else nobody computes from it
        return self.round

    def _make_round(self, version: int, rate: float, weight: int) -> Round:
        due: Sequence[int] = self._plan.due_shards(version)
        if self._receives_only:
            due = [shard for shard in due if self._plan.pushes(shard)]
        return Round(version, rate, due, weight, fence=self._speech.beats)

    def _go_on(self, rate: float, weight: int) -> Round:
        current = self._open()
        current.check_same(rate, weight)
        self.holds = False
        self._pull = True
        return current

    def push(self, shard: int, codec: int = 0, weight: int | None = None) -> None:
        """Say a shard: what its payload buffer holds now.

        Args:
            shard: its index.
            codec: which of the plan's codecs for it that is written in.
            weight: how much it counts, where that is not the round's.
        """
        current = self._open()
        current.push(shard, weight)
        self.frames.use(shard, codec)
        if not current.outcome:  # else the contribution is rejected already, this shard with it
            self._speech.push(shard, current)

    def skip(self, shard: int | None = None) -> None:
        """Say nothing of a shard, or of every shard that nothing was said of yet."""
        current = self._open()
        new = current.skip(shard)
        if not current.outcome:
            self._speech.skip(new, current)

    def check_said(self) -> None:
        """A round ends only if something was said of every shard.

        Raises:
            UsageError: of one nothing was said.
        """
        unsaid = self._open().unsaid()
        if unsaid:
            msg = f"{name_shards(unsaid)} of this step neither pushed nor skipped: do either"
            raise UsageError(msg)

    def end_round(self) -> Round:
        """Close the round that is over: what was refused goes back into the residual."""
        current = self._open()
        for shard in current.rejected():
            self._hooks.restore(shard)
        self.kept.note(current)
        self.round = None
        return current

    def pull_whole(self) -> None:
        """Ask for the whole weights although the replica has them: see `Hooks.whole`."""
        self._pull = self._pull_whole = True

    def ask(self, draw: Draw) -> None:
        """Ask what a contribution is to be computed from; `answer` will have it."""
        if self.ready and self.session.state is State.JOINED:
            self._outbox.append(self.session.send(MessageType.DRAW, draw))

    def confirm(self, version: int, digest: int) -> None:
        """Say that this worker's own copy of a checkpoint is on its disk, if it is joined."""
        if self.session.state is State.JOINED:
            kept = self.session.send(MessageType.CKPT_OK, Kept(digest), version=version)
            self._outbox.append(kept)

    def hold(self, is_held: bool) -> None:  # noqa: FBT001 - the whole of what is said
        """Say with the next heartbeat, which is now, whether this worker waits for another server.

        See `held`.
        """
        if is_held != self._is_held:
            self._is_held = is_held
            self._beat_at_s = 0.0

    def leave(self, leave: Leave) -> None:
        """Say goodbye as soon as possible; `left` tells when the server has taken note."""
        self._farewell.leave = leave
        self.round = None
        self._outbox.clear()

    def _open(self) -> Round:
        if self.round is None:
            msg = "no round is open: begin one first"
            raise UsageError(msg)
        return self.round

    # ---- frames out

    def next_frame(self, now_s: float) -> Frame | None:
        """The frame to send now, the same one until it is `sent`; None when nothing is due."""
        if not self._outbox:
            self._queue_due(now_s)
        return self._outbox[0] if self._outbox else None

    def sent(self, now_s: float) -> None:
        """The link has taken what `next_frame` gave."""
        frame = self._outbox.popleft()
        self._farewell.heard()
        if frame[_TYPE_OFFSET] == MessageType.HEARTBEAT:
            self.offset.asked(now_s)
        if self.session.state is State.GREETED:
            self._standing.wait(now_s)

    def not_sent(self, now_s: float) -> None:
        """The link has no room for what `next_frame` gave, or no connection."""
        if self._farewell.is_said:
            self._farewell.unheard(now_s, is_needed=self.kept.is_needed)

    def _queue_due(self, now_s: float) -> None:
        if self.session.state in (State.CLOSED, State.FENCED):
            return
        if not self.joined:
            if now_s >= self._standing.hello_at_s:
                hello = self._standing.hello()
                self._outbox.append(self.session.send(MessageType.HELLO, hello))
            return
        if self.session.state is State.JOINED:
            self._queue_work(now_s)
        again = None if self._outbox or self._standing.is_trial else self.kept.next(self.round)
        if again is not None:
            self._outbox.append(again)
        if not self._outbox and now_s >= self._beat_at_s:
            leaving = self.session.state is State.LEAVING
            self._beat_at_s = now_s + (FAREWELL_BEAT_S if leaving else self._heartbeat_s)
            self._queue_heartbeat()

    def _queue_work(self, now_s: float) -> None:
        """Initial weights first, then the wish for weights, then the goodbye."""
        if not self._initial.over:
            frame = self._initial.next(now_s)
            if frame is not None:
                self._outbox.append(frame)
            if not self._initial.over:
                return
        if self._farewell.leave is not None:
            self._outbox.append(self.session.send(MessageType.LEAVE, self._farewell.leave))
            self._farewell.said(self._speech.beats)
            self._beat_at_s = 0.0  # a heartbeat follows: its answer says that the goodbye arrived
        elif self._pull and not (self._standing.is_trial or self.holds):
            self._pull = False
            self._progress = True  # the answer is under way, until a STATUS shows that it is not
            have = self.replica.version
            self.turns.jumps = have != NONE
            version = NO_VERSION if have == NONE or self._pull_whole else have
            self._pull_whole = False
            self._outbox.append(self.session.send(MessageType.PULL, version=version))

    def _queue_heartbeat(self) -> None:
        version = self.replica.version
        beat = Heartbeat(version, max(0, version), self._is_held)
        self._outbox.append(self.session.send(MessageType.HEARTBEAT, beat))
        self._speech.beats += 1

    # ---- frames in

    def answered_unseen(self) -> None:
        """A STATUS came that nobody will look at: one heartbeat fewer is under way."""
        self._answers += 1
        self.offset.unseen()

    def receive(self, frame: memoryview, now_s: float) -> None:
        """Take in one frame.

        Raises:
            FencedError: another process has this rank.
            RefusedError, RemotePlanError, RemoteVersionError: the server turned this worker away.
            RemotePayloadError: weights came that do not fit the plan, or a push did not.
            RemoteProtocolError: the server came back with an older state or none, or misbehaves.
            GaveUpError: the server ended the job.
        """
        try:
            header, body = self.session.receive(frame)
        except StaleFrameError:
            return  # of an earlier conversation; the session has seen to it
        except RemoteWireError as error:
            self._note_damage(f"dropped a damaged frame: {error}")
            return
        if header.type is MessageType.WEIGHTS and isinstance(body, memoryview):
            self.take_weights(header, body)  # nearly all of what comes
        else:
            self._take(header, body, now_s)

    def _take(self, header: Header, body: ControlBody | memoryview, now_s: float) -> None:
        self.kept.hear(header, body)
        match body:
            case Cookie():
                self._on_cookie(now_s)
            case Welcome():
                self._on_welcome(header, body, now_s)
            case Status():
                self.offset.answered(now_s, body.clock_s)
                self._on_status(body)
            case Range():
                self.answer = body
            case Verdict():
                self._on_verdict(header, body)
            case StaleEpoch():
                self._outbox.clear()
                self._standing.hello_at_s = now_s
            case Error():
                self._on_error(body)
            case Bye():
                self._on_bye(body)
            case _ if header.type is MessageType.CKPT:
                self._hooks.checkpoint(self._plan.server, header.version)

    def _on_cookie(self, now_s: float) -> None:
        self._standing.wait(now_s)
        said = self.round is not None and (self.round.pushed or self.round.skipped)
        pending = self.round.number if self.round is not None and said else NONE
        join = self._standing.join(pending, self._epochs.epoch)
        self._outbox.clear()
        self._outbox.append(self.session.send(MessageType.PLAN, self._plan.body))
        self._outbox.append(self.session.send(MessageType.JOIN, join))

    def _on_welcome(self, header: Header, welcome: Welcome, now_s: float) -> None:
        self._standing.welcome(Welcomed(self.session.run_id, header.version, welcome))
        self._outbox.clear()
        self._speech.beats = self._answers = 0
        self.offset.restart()
        self._beat_at_s = now_s  # at once: its answer says what arrived
        if self._standing.is_trial:
            return
        bare = self.replica.version == self._standing.resolved == NONE and not self.round
        epoch, now = self.session.epoch, header.version
        if self._epochs.enter(epoch, now, welcome.since, has_nothing=bare):
            self._forget_above(self._epochs.sure)
        self._pull = True
        self._initial.start(wanted=welcome.init_wanted)
        if is_reset := welcome.mode == "reset":
            self._standing.lineage = self.session.fresh_lineage
        if is_reset and (self.round is not None or self._standing.resolved != NONE):
            self._hooks.reset(self._shards)
            self.resets += 1
            self.notes.append("the server does not know this residual: it starts again from zero")
        if self.round is not None:
            self.round.welcomed(header.version, is_reset=is_reset)

    def _forget_above(self, version: int) -> None:
        """The server came back: what it had sent of a later version never happened."""
        forgotten = self.replica.forget_above(version)
        self.turns.forget_above(version)
        self._gap_version = NONE
        if forgotten:
            what = f"{name_shards(forgotten)} above version {version}"
            self.notes.append(f"the server came back: {what} are taken again, whole")

    def _on_status(self, status: Status) -> None:
        self._status = status
        self._epochs.heard(status.version)
        self._answers += 1
        if self.session.state is State.LEAVING:
            self._farewell.answered(self._answers)
            return
        current = self.round
        if current is not None and self._answers > current.fence:
            self._settle(current, status)
        # Without a round it lacks what it began with: version 0, or what it was taken up for.
        self._pull_if_behind(status, max(0, self._known) if current is None else current.target)

    def _settle(self, current: Round, status: Status) -> None:
        """Act on a STATUS that knows of everything this round has sent."""
        check_not_behind(status, current.number)
        if current.outcome or self._outbox:
            return
        if self.turns.in_order:
            over = self.turns.is_over(current.number, status.round)
        else:
            over = not may_apply(current.number, status.round, self._rule)
        if over or status.resolved == current.number:
            self._speech.ask(current)
        else:
            self._speech.again(current, status.missing)

    def _pull_if_behind(self, status: Status, target: int) -> None:
        """Ask for weights that the server has and that are not under way."""
        if self.replica.version < target <= status.version and not self._progress:
            self._pull = True
        self._progress = False

    def _on_verdict(self, header: Header, verdict: Verdict) -> None:
        current = self.round
        if current is None or header.seq != current.number or current.outcome:
            return  # repeated, or of a round before
        self._epochs.heard(header.version)
        current.take(verdict, header.version)
        self._standing.resolved = current.number
        lost = current.rejected()
        if verdict.outcome == "rejected":
            self._speech.drop_pushes()
        if lost or verdict.outcome == "rejected":
            self._rejections.note(current.number, lost, verdict)

    def _on_error(self, error: Error) -> None:
        if error.code == ErrorCode.WIRE:
            self._note_damage(f"the server dropped a damaged frame: {error.text}")
            return
        kind = RemotePayloadError if error.code == ErrorCode.PAYLOAD else RemoteProtocolError
        msg = f"the server refused ({error.code}): {error.text}"
        raise kind(msg)

    def _note_damage(self, words: str) -> None:
        """A frame was dropped; INIT or LEAVE nobody would miss, so these begin again with HELLO."""
        self.damaged_frames += 1
        self.notes.append(words)
        if self.joined and (self.session.state is State.LEAVING or self.replica.version == NONE):
            self._standing.begin_again()

    def _on_bye(self, bye: Bye) -> None:
        self._outbox.clear()
        self._farewell.left = True
        if self._farewell.leave is None:
            msg = f"the server ended the job ({bye.reason}){': ' if bye.text else ''}{bye.text}"
            raise GaveUpError(msg)

    def take_weights(self, header: Header, body: memoryview) -> None:
        """Put weights into the replica, if it wants them and it is their turn."""
        replica = self.replica
        if self._standing.is_trial or self.holds:
            return  # a pull will bring them, when it is their time
        if self.turns.keeps(header, body, replica.version, self.round):
            return
        if replica.wants(header, body.nbytes):
            self._progress = True
            self._hooks.weights(header, body)
            replica.took(header)
            if replica.version >= self._gap_version:
                self._gap_version = NONE
        elif replica.misses(header):
            self._pull = self._pull or self._gap_version == NONE  # once for each gap
            self._gap_version = max(self._gap_version, header.version)
        elif Flags.FULL in header.flags:
            self._progress = True  # an answer to PULL, on its way to the shards that lack something
            self._hooks.whole(header, body)

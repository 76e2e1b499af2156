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
import os
import platform
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import psq
from psq.client.frames import Frame, PushFrames
from psq.client.hooks import Hooks
from psq.client.offset import OffsetEstimate
from psq.client.replica import ReplicaVersions
from psq.client.round import Round
from psq.client.turns import Turns
from psq.client.waits import Backoff, name_ranks
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
from psq.layout import PART_NUMEL, part_count
from psq.plan import Plan
from psq_proto.frames import Header
from psq_proto.messages import (
    NO_SHARD,
    NO_VERSION,
    NONE,
    Bye,
    ControlBody,
    Cookie,
    Error,
    ErrorCode,
    Flags,
    Heartbeat,
    Hello,
    Join,
    Leave,
    MessageType,
    StaleEpoch,
    Status,
    Verdict,
    Welcome,
)
from psq_proto.session import State, WorkerSession

__all__ = ["ALONE_S", "FAREWELL_BEAT_S", "INITIAL_WINDOW", "Machine"]

FAREWELL_BEAT_S: Final = 0.1
"""Between two heartbeats of a worker that has said goodbye: their answer lets it go."""
INITIAL_WINDOW: Final = 4
"""Frames of initial weights that the link may still be reading: 4 MiB, not the whole model."""
INITIAL_PAUSE_S: Final = 0.002
"""Until the link is asked again whether it has read the oldest of them."""
ALONE_S: Final = 0.5
"""Without a connection for so long after its goodbye, a worker takes it that the server ended: one
that is still there would have been found again."""

MAX_SHARDS_NAMED: Final = 8
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
        self.left = False
        self.notes: deque[str] = deque(maxlen=64)
        self.offset = OffsetEstimate()
        self.damaged_frames = 0
        self.resent_frames = 0
        self.resets = 0
        self._plan = plan
        self._hooks = hooks
        self._heartbeat_s = heartbeat_s
        self._rng = rng
        self._rule = parse_consistency(plan.consistency)
        self._lineage = rng.getrandbits(64)
        self._nonce = rng.getrandbits(64)
        self._backoff = Backoff(rng)
        self._resolved = NONE
        self._shards = tuple(shard.index for shard in plan.owned)
        self._receives_only = not all(group.pushed for group in plan.groups)
        self._outbox: deque[Frame] = deque()
        self._initial: Iterator[bytearray] | None = None
        self._initial_sent: deque[bytearray] = deque()
        self._initial_at_s = 0.0
        self._is_lent = is_lent
        self._hello_at_s = self._beat_at_s = 0.0
        self._beats = self._answers = 0  # heartbeats sent, and those answered, since WELCOME
        self.turns = Turns(plan)
        self._pull = self._pull_whole = False
        self._gap_version = NONE
        self._progress = False
        self._status: Status | None = None
        self._leave: Leave | None = None
        self._leave_fence = 0
        self._alone_since_s: float | None = None

    @property
    def joined(self) -> bool:
        """Whether the server has welcomed this worker, on the connection there is now."""
        return self.session.joined

    @property
    def due_s(self) -> float:
        """When something will have to happen although nothing came."""
        if self.session.state in (State.CLOSED, State.FENCED):
            return math.inf
        if self._alone_since_s is not None:
            return self._alone_since_s + ALONE_S
        if self._initial is not None and self.joined:
            return min(self._initial_at_s, self._beat_at_s)
        return self._beat_at_s if self.joined else self._hello_at_s

    @property
    def settled(self) -> bool:
        """Whether nothing is waited for: weights are there, and the round, if any, is over."""
        if self.round is None:
            return self.replica.version != NONE
        return bool(self.round.outcome) and self.replica.version >= self.round.target

    @property
    def at_rest(self) -> bool:
        """Whether nobody need wait for this server."""
        if self._leave is not None:
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

    # ---- the worker's own doing

    def begin(self, rate: float, weight: int = 1) -> Round:
        """Open the next round."""
        if self.round is not None or self.replica.version == NONE:
            msg = "a round begins after join, and after the round before has ended"
            raise UsageError(msg)
        self._drop_pushes()  # copies of a round that is over: their buffers are needed now
        self._progress = self.turns.jumps = False
        version = self.replica.version
        due: Sequence[int] = self._plan.due_shards(version)
        if self._receives_only:
            due = [shard for shard in due if self._plan.pushes(shard)]
        self.round = Round(version, rate, due, weight, fence=self._beats)
        return self.round

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
            self._queue_push(shard, current)

    def skip(self, shard: int | None = None) -> None:
        """Say nothing of a shard, or of every shard that nothing was said of yet."""
        current = self._open()
        new = current.skip(shard)
        if not current.outcome:
            self._queue_skips(new, current)

    def check_said(self) -> None:
        """A round ends only if something was said of every shard.

        Raises:
            UsageError: of one nothing was said.
        """
        unsaid = self._open().unsaid()
        if unsaid:
            msg = f"{_name_shards(unsaid)} of this step neither pushed nor skipped: do either"
            raise UsageError(msg)

    def end_round(self) -> Round:
        """Close the round that is over: what was refused goes back into the residual."""
        current = self._open()
        for shard in current.rejected():
            self._hooks.restore(shard)
        self.round = None
        return current

    def pull_whole(self) -> None:
        """Ask for the whole weights although the replica has them: see `Hooks.whole`."""
        self._pull = self._pull_whole = True

    def leave(self, leave: Leave) -> None:
        """Say goodbye as soon as possible; `left` tells when the server has taken note."""
        self._leave = leave
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
        self._alone_since_s = None
        if frame[_TYPE_OFFSET] == MessageType.HEARTBEAT:
            self.offset.asked(now_s)
        if self.session.state is State.GREETED:
            self._hello_at_s = now_s + self._backoff.next_s()

    def not_sent(self, now_s: float) -> None:
        """The link has no room for what `next_frame` gave, or no connection."""
        if self.session.state is not State.LEAVING:
            return
        if self._alone_since_s is None:
            self._alone_since_s = now_s
        self.left = self.left or now_s - self._alone_since_s >= ALONE_S

    def _queue_due(self, now_s: float) -> None:
        if self.session.state in (State.CLOSED, State.FENCED):
            return
        if not self.joined:
            if now_s >= self._hello_at_s:
                hello = Hello(self._nonce, software=f"psq {psq.__version__}")
                self._outbox.append(self.session.send(MessageType.HELLO, hello))
            return
        if self.session.state is State.JOINED:
            self._queue_work(now_s)
        if not self._outbox and now_s >= self._beat_at_s:
            leaving = self.session.state is State.LEAVING
            self._beat_at_s = now_s + (FAREWELL_BEAT_S if leaving else self._heartbeat_s)
            self._queue_heartbeat()

    def _queue_work(self, now_s: float) -> None:
        """Initial weights first, then the wish for weights, then the goodbye."""
        if self._initial is not None:
            self._queue_initial(now_s)
            return
        if self._leave is not None:
            self._outbox.append(self.session.send(MessageType.LEAVE, self._leave))
            self._leave_fence = self._beats
            self._beat_at_s = 0.0  # a heartbeat follows: its answer says that the goodbye arrived
        elif self._pull:
            self._pull = False
            self._progress = True  # the answer is under way, until a STATUS shows that it is not
            have = self.replica.version
            self.turns.jumps = have != NONE
            version = NO_VERSION if have == NONE or self._pull_whole else have
            self._pull_whole = False
            self._outbox.append(self.session.send(MessageType.PULL, version=version))

    def _queue_initial(self, now_s: float) -> None:
        """The next INIT frame, as soon as the link has read enough of those before."""
        assert self._initial is not None  # noqa: S101 - the caller looked
        window = self._initial_sent
        while window and not self._is_lent(window[0]):
            window.popleft()
        if len(window) < INITIAL_WINDOW:
            initial = next(self._initial, None)
            if initial is not None:
                window.append(initial)
                self._outbox.append(initial)
                return
            if not window:
                self._initial = None
                self._queue_work(now_s)
                return
        self._initial_at_s = now_s + INITIAL_PAUSE_S

    def _queue_heartbeat(self) -> None:
        beat = Heartbeat(self.replica.version, max(0, self.replica.version))
        self._outbox.append(self.session.send(MessageType.HEARTBEAT, beat))
        self._beats += 1

    def _queue_push(self, shard: int, current: Round) -> None:
        """While not joined nothing is queued: after WELCOME a STATUS will call it missing."""
        current.fence = self._beats
        if self.session.state is not State.JOINED:
            return
        frame, weight = self.frames.to_seal(shard), current.weight_of(shard)
        self.session.seal(
            frame,
            MessageType.PUSH,
            codec=self.frames.wire_id(shard),
            seq=current.number,
            round=current.number,
            version=current.number,
            rate=current.rate,
            shard=shard,
            part=weight if weight != 1 else 0,
        )
        self._outbox.append(frame)

    def _queue_skips(self, shards: Iterable[int], current: Round) -> None:
        """Say nothing of these shards, each by its name.

        Only a contribution without any payload is skipped in one message: such a SKIP speaks of all
        shards not said yet, and a shard whose PUSH came damaged would be among them.
        """
        current.fence = self._beats
        if self.session.state is not State.JOINED:
            return
        for shard in (NO_SHARD,) if current.skipped_whole else shards:
            frame = self.session.send(
                MessageType.PUSH,
                flags=Flags.SKIP,
                seq=current.number,
                round=current.number,
                version=current.number,
                rate=current.rate,
                shard=shard,
            )
            self._outbox.append(frame)

    def _drop_pushes(self) -> None:
        if self._outbox:
            kept = [frame for frame in self._outbox if frame[_TYPE_OFFSET] != MessageType.PUSH]
            self._outbox = deque(kept)

    def _initial_frames(self) -> Iterator[bytearray]:
        """INIT frames of every shard, made one at a time: `INITIAL_WINDOW` at most in memory."""
        for shard in self._plan.owned:
            values = self._hooks.initial(shard.index)
            for part in range(part_count(shard.numel)):
                body = values[part * PART_NUMEL : (part + 1) * PART_NUMEL].data.cast("B")
                yield self.session.send(MessageType.INIT, body, shard=shard.index, part=part)

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
            self.damaged_frames += 1
            self.notes.append(f"dropped a damaged frame: {error}")
            return
        if header.type is MessageType.WEIGHTS and isinstance(body, memoryview):
            self.take_weights(header, body)  # nearly all of what comes
        else:
            self._take(header, body, now_s)

    def _take(self, header: Header, body: ControlBody | memoryview, now_s: float) -> None:
        match body:
            case Cookie():
                self._on_cookie(now_s)
            case Welcome():
                self._on_welcome(body, now_s)
            case Status():
                self.offset.answered(now_s, body.clock_s)
                self._on_status(body)
            case Verdict():
                self._on_verdict(header, body)
            case StaleEpoch():
                self._outbox.clear()
                self._hello_at_s = now_s
            case Error():
                self._on_error(body)
            case Bye():
                self._on_bye(body)

    def _on_cookie(self, now_s: float) -> None:
        self._hello_at_s = now_s + self._backoff.next_s()
        said = self.round is not None and (self.round.pushed or self.round.skipped)
        pending = self.round.number if self.round is not None and said else NONE
        join = Join(self._lineage, self._resolved, pending, platform.node(), os.getpid())
        self._outbox.clear()
        self._outbox.append(self.session.send(MessageType.PLAN, self._plan.body))
        self._outbox.append(self.session.send(MessageType.JOIN, join))

    def _on_welcome(self, welcome: Welcome, now_s: float) -> None:
        self._backoff.reset()
        self._nonce = self._rng.getrandbits(64)
        self._outbox.clear()
        self._beats = self._answers = 0
        self.offset.restart()
        self._beat_at_s = now_s  # at once: its answer says what arrived
        self._pull = True
        self._initial = self._initial_frames() if welcome.init_wanted else None
        self._initial_sent.clear()
        if welcome.mode == "reset" and self._resolved != NONE:
            self._hooks.reset(self._shards)
            self.resets += 1
            self.notes.append("the server does not know this residual: it starts again from zero")
        if self.round is not None:
            self.round.fence = 0

    def _on_status(self, status: Status) -> None:
        self._status = status
        self._answers += 1
        if self.session.state is State.LEAVING:
            self.left = self._answers > self._leave_fence
            return
        current = self.round
        if current is not None and self._answers > current.fence:
            self._settle(current, status)
        self._pull_if_behind(status, 0 if current is None else current.target)

    def _settle(self, current: Round, status: Status) -> None:
        """Act on a STATUS that knows of everything this round has sent."""
        if status.round < current.number or status.resolved > current.number:
            msg = (
                f"the server is at round {status.round} and has resolved {status.resolved} of this "
                f"rank, this worker is at round {current.number}: "
                "the server came back with an older state; start the job again"
            )
            raise RemoteProtocolError(msg)
        if current.outcome or self._outbox:
            return
        if self.turns.in_order:
            over = self.turns.is_over(current.number, status.round)
        else:
            over = not may_apply(current.number, status.round, self._rule)
        if over or status.resolved == current.number:
            self._ask_again(current)
        else:
            self._send_again(current, status.missing)

    def _ask_again(self, current: Round) -> None:
        """There is, or will be, a verdict: anything of the contribution makes the server say it.

        It was lost, or the rounds that may take the contribution are over, and what this server
        misses now is of another one.
        """
        if not current.pushed and not current.skipped:
            return
        if current.pushed:
            self._queue_push(min(current.pushed), current)
        else:
            self._queue_skips(sorted(current.skipped)[:1], current)
        self.resent_frames += 1

    def _send_again(self, current: Round, missing: Iterable[int]) -> None:
        lost = [shard for shard in missing if shard in current.pushed]
        skips = [shard for shard in missing if shard in current.skipped]
        for shard in lost:
            self._queue_push(shard, current)
        if skips:
            self._queue_skips(skips, current)
        self.resent_frames += len(lost) + (1 if current.skipped_whole and skips else len(skips))

    def _pull_if_behind(self, status: Status, target: int) -> None:
        """Ask for weights that the server has and that are not under way."""
        if self.replica.version < target <= status.version and not self._progress:
            self._pull = True
        self._progress = False

    def _on_verdict(self, header: Header, verdict: Verdict) -> None:
        current = self.round
        if current is None or header.seq != current.number or current.outcome:
            return  # repeated, or of a round before
        current.take(verdict, header.version)
        self._resolved = current.number
        lost = current.rejected()
        if verdict.outcome == "rejected":
            self._drop_pushes()
            self.notes.append(f"round {current.number} rejected: {verdict.reason}")
        elif lost:
            self.notes.append(
                f"round {current.number}: {_name_shards(lost)} rejected: {verdict.reason}"
            )

    def _on_error(self, error: Error) -> None:
        if error.code == ErrorCode.WIRE:
            self.damaged_frames += 1
            self.notes.append(f"the server dropped a damaged frame: {error.text}")
            return
        kind = RemotePayloadError if error.code == ErrorCode.PAYLOAD else RemoteProtocolError
        msg = f"the server refused ({error.code}): {error.text}"
        raise kind(msg)

    def _on_bye(self, bye: Bye) -> None:
        self._outbox.clear()
        self.left = True
        if self._leave is None:
            msg = f"the server ended the job ({bye.reason}){': ' if bye.text else ''}{bye.text}"
            raise GaveUpError(msg)

    def take_weights(self, header: Header, body: memoryview) -> None:
        """Put weights into the replica, if it wants them and it is their turn."""
        replica = self.replica
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


def _name_shards(shards: list[int]) -> str:
    named = ", ".join(map(str, shards[:MAX_SHARDS_NAMED]))
    more = len(shards) - MAX_SHARDS_NAMED
    word = "shard" if len(shards) == 1 else "shards"
    return f"{word} {named}{f' and {more} more' if more > 0 else ''}"

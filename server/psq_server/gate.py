"""Output commit: nothing leaves a server that its crash could take back.

The state machine knows of no disk; it says what is to be done. The gate stands behind it, list of
actions by list of actions, and says what may be done now and what is to be written first:

    at level     an action            becomes
    journal      Judge, Reduce        Append(JUDGE or SHARD), and is done: nobody sees it yet
                 Committed            Append(ROUND), Sync(ticket); what leaves waits for the ticket
                 Changed              Append(CHANGE), Sync(ticket); likewise
    replay       likewise, but that of a payload its length and digest are put down, and all that
                 was reduced in one record, Append(SAID), before that of the round
    + checkpoint Started              Keep(0, ticket); likewise
                 Checkpoint           Keep(version); the last one with a ticket, for what follows it

Whoever holds a ticket's answer calls `done`, and gets what is let out, in order. What leaves is
ordered as the state machine said it: an action waits for all tickets up to its own, so one that
needs none still waits behind those that do; only an `early` Send and an Echo need not. In the lists
of a round whose shards may not go out one by one (`Adopt.whole`) everything waits for the round's
ticket, from its first Reduce on, before there is one.

Never here: a disk, a thread, a clock. Same actions and answers, same steps. What rounds say is
bounded by itself: every worker has one contribution under way, and gets its verdict from here. What
peers ask for while the disk refuses is not: so many answers are held for each, for all strangers
together, and for all peers (MAX_HELD_...). One more is dropped: whoever misses it asks again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, TypeAlias

from psq_proto.frames import Buffer
from psq_server.state import (
    Action,
    Adopt,
    Broadcast,
    Changed,
    Checkpoint,
    Committed,
    DurabilityLevel,
    Judge,
    Pushed,
    Reduce,
    Save,
    Send,
    SendFull,
    Started,
    Stop,
)
from psq_server.state.events import LOGGED
from psq_server.state.past import digest_of

__all__ = ["Append", "Changes", "Gate", "Keep", "RecordKind", "Step", "Sync", "said_of", "start"]


class RecordKind(IntEnum):
    """What a record of the journal says."""

    SHARD = 1
    JUDGE = 2
    ROUND = 3
    CHANGE = 4
    START = 5
    SAID = 6


@dataclass(frozen=True, slots=True)
class Append:
    """Put a record behind the others; nobody waits for it yet. The buffers may not change."""

    kind: RecordKind
    meta: Mapping[str, Any]
    buffers: tuple[Buffer, ...] = ()


@dataclass(frozen=True, slots=True)
class Sync:
    """Make all records so far durable, and answer with `Gate.done(ticket)`."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Keep:
    """Write a checkpoint of this version, as the state is now; answer if something waits for it."""

    version: int
    ticket: int | None = None


Step: TypeAlias = Action | Append | Sync | Keep
Changes: TypeAlias = Callable[[bool], Mapping[str, Any]]
"""Whether a round was committed -> what changed, for the record: `ServerState.changes`."""

_LEAVING: Final = (Send, Broadcast, SendFull, Save, Stop)
"""Not Echo: it says nothing of the job, anybody may ask for any number, and who sends bounds them.
"""
MAX_HELD_OF_A_PEER: Final = 64
"""Answers; as many as may wait in its outbox."""
MAX_HELD_OF_STRANGERS: Final = 256
"""Of all peers that speak for no rank, whatever they call themselves."""
MAX_HELD_ANSWERS: Final = 65_536
"""Of all peers: one that joins again and again has a new name each time."""
_OPEN: Final = -1
"""Waits for the ticket of the round under way, which has none yet."""
_ALL: Final = b"all"
_STRANGERS: Final = b"strangers"
"""Beside peers' names, which begin with another letter here."""


class Gate:
    """See the module's docstring.

    Args:
        level: of a job that goes on; a new one's comes with `Adopt`.
        whole: likewise.
        version: of a job that goes on: what is durable of it. None: there are no weights yet.

    Attributes:
        blocked: why the disk refuses; empty if it does not.
        dropped: how many answers were, because too many waited.
        durable_version: the newest version whose round is durable.
    """

    def __init__(
        self,
        level: DurabilityLevel = "off",
        *,
        whole: bool = False,
        version: int | None = None,
    ) -> None:
        self._level: DurabilityLevel = level
        self._whole = whole
        self._has_weights = version is not None
        self._judged = -1  # the round whose payloads are in a JUDGE record
        self._said: list[tuple[int, float, list[list[int | float]]]] = []
        """At "replay": of each shard that the open round has reduced, its rate and who said what.
        """
        self._reduced = -1  # that round
        self._issued = self._released = 0
        self._done: set[int] = set()
        self._is_open = False
        self._held: deque[tuple[int, Action]] = deque()
        self._answers: Counter[bytes] = Counter()
        self.dropped = 0
        self._versions: deque[tuple[int, int]] = deque()
        self.durable_version = -1 if version is None else version
        self.blocked = ""

    @property
    def level(self) -> DurabilityLevel:
        """What of the job is kept."""
        return self._level

    @property
    def waiting(self) -> bool:
        """Whether a ticket is out."""
        return self._issued > self._released

    @property
    def is_busy(self) -> bool:
        """Whether a crash could take back something of what the state machine knows now."""
        return self.waiting or self._is_open

    @property
    def held(self) -> int:
        """How many actions wait."""
        return len(self._held)

    @property
    def holds_stop(self) -> bool:
        """Whether the end of the process waits."""
        return bool(self._held) and isinstance(self._held[-1][1], Stop)

    @property
    def in_flight(self) -> int:
        """How many rounds are committed and not durable."""
        return len(self._versions)

    def admit(self, actions: Sequence[Action], changes: Changes) -> list[Step]:
        """What to do now of what one event brought about; the rest comes out of `done`."""
        steps: list[Step] = []
        ticket = self._record(actions, changes, steps)
        for action in actions:
            match action:
                case Adopt():
                    self._level, self._whole = action.level, action.whole
                    steps.append(action)
                case Judge() | Reduce():
                    self._log(action, steps)
                    steps.append(action)
                case Committed():
                    self._commit(action, ticket, steps)
                case Started() | Checkpoint():
                    self._keep(action, steps)
                case Changed():
                    pass
                case _:
                    self._pass(action, steps)
        return steps

    def done(self, ticket: int) -> list[Action]:
        """A ticket's answer has come: what is let out now, in order."""
        assert 0 < ticket <= self._issued, ticket  # noqa: S101 - our own mistake
        self._done.add(ticket)
        while self._released + 1 in self._done:
            self._released += 1
            self._done.discard(self._released)
        while self._versions and self._versions[0][0] <= self._released:
            self.durable_version = self._versions.popleft()[1]
        out: list[Action] = []
        while self._held and self._held[0][0] != _OPEN and self._held[0][0] <= self._released:
            out.append(self._held.popleft()[1])
            self._answers.subtract(_whose(out[-1]))
        self._answers = +self._answers
        return out

    def _record(self, actions: Sequence[Action], changes: Changes, steps: list[Step]) -> int:
        """The ticket of this list, if it says something that has to be durable; else 0.

        What the list says before it says so waits as well: a verdict comes before its commit.
        """
        if self._level not in LOGGED or not self._has_weights:
            return 0
        if any(isinstance(action, Committed) for action in actions):
            ticket = self._issue()
            self._log_said(steps)
            steps.append(Append(RecordKind.ROUND, changes(True)))  # noqa: FBT003 - see Changes
            self._is_open = False
            self._held = deque((ticket if t == _OPEN else t, action) for t, action in self._held)
            return ticket
        if any(isinstance(action, Changed) for action in actions):
            ticket = self._issue()
            steps.extend((Append(RecordKind.CHANGE, changes(False)), Sync(ticket)))  # noqa: FBT003
            return ticket
        return 0

    def _commit(self, action: Committed, ticket: int, steps: list[Step]) -> None:
        if ticket:
            self._versions.append((ticket, action.version))
            steps.append(Sync(ticket))
        steps.append(action)

    def _keep(self, action: Started | Checkpoint, steps: list[Step]) -> None:
        if self._level == "off":
            return
        if isinstance(action, Started):
            self._has_weights = True
            self._versions.append((self._issue(), 0))
            steps.append(Keep(0, self._issued))
        elif action.last:
            steps.append(Keep(action.version, self._issue()))
        else:
            steps.append(Keep(action.version))

    def _log(self, action: Judge | Reduce, steps: list[Step]) -> None:
        """Put down what a shard, or a judgement, is made of."""
        if self._level not in LOGGED:
            return
        self._is_open = self._is_open or self._whole
        bare = self._level == "replay"
        if isinstance(action, Judge):
            self._judged = action.round
            said = [one for each in action.said.values() for one in each]
            shards = {shard: said_of(each, bare=bare) for shard, each in action.said.items()}
            meta = {"round": action.round, "rate": action.rate, "said": shards}
            payloads = () if bare else tuple(one.payload for one in said)
            steps.append(Append(RecordKind.JUDGE, meta, payloads))
            return
        if bare:
            known = said_of(action.said, bare=action.round != self._judged)
            self._said.append((action.shard, action.rate, known))
            self._reduced = action.round
            return
        meta = {"round": action.round, "shard": action.shard, "rate": action.rate}
        meta["said"] = said_of(action.said)
        payloads = () if action.round == self._judged else action.payloads
        steps.append(Append(RecordKind.SHARD, meta, payloads))

    def _log_said(self, steps: list[Step]) -> None:
        """Put down, at "replay", what the round that ends now was made of."""
        if self._level == "replay":
            meta = {"round": self._reduced, "said": self._said}
            steps.append(Append(RecordKind.SAID, meta))
            self._said = []

    def _pass(self, action: Action, steps: list[Step]) -> None:
        is_leaving = isinstance(action, _LEAVING) and not (
            isinstance(action, Send) and action.early
        )
        if not is_leaving or not (self.waiting or self._is_open):
            steps.append(action)
        elif self._has_room(action):
            self._answers.update(_whose(action))
            self._held.append((_OPEN if self._is_open else self._issued, action))
        else:
            self.dropped += 1

    def _has_room(self, action: Action) -> bool:
        limits = {_STRANGERS: MAX_HELD_OF_STRANGERS, _ALL: MAX_HELD_ANSWERS}
        return all(
            self._answers[name] < limits.get(name, MAX_HELD_OF_A_PEER) for name in _whose(action)
        )

    def _issue(self) -> int:
        self._issued += 1
        return self._issued


def _whose(action: Action) -> tuple[bytes, ...]:
    """Whose room an action takes that a peer may have asked for."""
    match action:
        case Send(peer=peer):
            return (_ALL, _STRANGERS if action.stranger else b"p" + peer)
        case SendFull(peers=(peer,)):
            return (_ALL, b"p" + peer)
    return ()


def said_of(said: Sequence[Pushed], *, bare: bool = False) -> list[list[int | float]]:
    """Whose payloads these are, and how they count, for a record.

    The payloads go beside it; where they do not (`bare`), each one's length and digest belong to
    it.
    """
    listed: list[list[int | float]] = []
    for one in said:
        known = (one.payload.nbytes, digest_of(one.payload)) if bare else ()
        listed.append([one.rank, one.codec, one.weight, one.staleness, *known])
    return listed


def start(epoch: int, version: int) -> Append:
    """The first record of every start: what an earlier one left of an open round is void."""
    return Append(RecordKind.START, {"epoch": epoch, "version": version})

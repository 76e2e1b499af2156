"""One contribution on its way to one server: what was said of each shard, what became of it.

A contribution is named by `number`, the version of the weights that it was computed from. Of every
shard due in that round something is said once: a payload, or nothing (a skip). The verdict comes
for the whole of it and names the shards that were refused; only it says what counts, and silence
says nothing. Pure bookkeeping: no I/O, no arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from psq.errors import UsageError
from psq_proto.messages import Verdict

__all__ = ["Round", "RoundResult", "merge"]


@dataclass(frozen=True, slots=True)
class RoundResult:
    """How a step ended for this worker.

    Attributes:
        applied: something of what this worker said counts (a skip it asked for is something said).
        reason: why not, or why not all of it, in a server's words; empty when all counts.
        version: the version of the weights after the step; of several servers, the lowest.
        server_s: what the server's own work took; of several, the longest.
        rejected: the shards that were pushed and do not count, ascending; what they said is back
            in the residual.
        staleness: how many rounds old the weights were, that what counts was computed from; of
            several servers, the most.
    """

    applied: bool
    reason: str
    version: int
    server_s: float
    rejected: tuple[int, ...] = ()
    staleness: int = 0


@dataclass(slots=True)
class Round:
    """The state of one contribution.

    Attributes:
        number: its name, and its `seq`: the version it was computed from.
        rate: the learning rate this worker asks for.
        shards: what the server owns and its round moves: something is to be said of each.
        weight: how much it counts in a mean, beside the other workers'.
        weights: of the shards that have another.
        pushed, skipped: the shards of which something was said so far.
        skipped_whole: nothing was pushed, and one message says so of all shards.
        outcome: the verdict; empty until it is known.
        refused: the shards that the verdict names.
        forgotten: the shards of which nothing goes back, see `welcomed`.
        reason, server_s: see `RoundResult`.
        target: the version that the weights must reach before the next step.
        fence: how many heartbeats had been sent when something was said last; what the answers to
            these call missing may have arrived since.
    """

    number: int
    rate: float
    shards: Sequence[int]
    weight: int = 1
    weights: dict[int, int] = field(default_factory=dict)
    pushed: set[int] = field(default_factory=set)
    skipped: set[int] = field(default_factory=set)
    skipped_whole: bool = False
    outcome: Literal["", "applied", "rejected"] = ""
    refused: tuple[int, ...] = ()
    forgotten: frozenset[int] = frozenset()
    reason: str = ""
    server_s: float = 0.0
    target: int = 0
    fence: int = 0

    def __post_init__(self) -> None:
        """The next contribution is computed from a later version than this one."""
        self.target = self.number + 1

    def check_same(self, rate: float, weight: int) -> None:
        """What a process before this one began ends with the settings it had.

        Raises:
            UsageError: it is to end with others.
        """
        if (rate, weight) != (self.rate, self.weight):
            msg = (
                f"round {self.number} was begun with lr {self.rate!r} and weight "
                f"{self.weight}, before this process was started again; it cannot end with lr "
                f"{rate!r} and weight {weight}: start it with the settings it had"
            )
            raise UsageError(msg)

    def push(self, shard: int, weight: int | None = None) -> None:
        """Note that a shard's payload is said, with a weight of its own if one is given."""
        self._check_unsaid(shard)
        self.pushed.add(shard)
        if weight is not None:
            self.weights[shard] = weight

    def weight_of(self, shard: int) -> int:
        """How much a shard counts."""
        return self.weights.get(shard, self.weight)

    def skip(self, shard: int | None) -> list[int]:
        """Note that nothing is said of a shard, or of all that are left; returns which."""
        if shard is not None:
            self._check_unsaid(shard)
        new = self.unsaid() if shard is None else [shard]
        self.skipped_whole = shard is None and len(new) == len(self.shards)
        self.skipped.update(new)
        return new

    def unsaid(self) -> list[int]:
        """The shards of which nothing was said yet."""
        return [k for k in self.shards if k not in self.pushed and k not in self.skipped]

    def take(self, verdict: Verdict, version: int) -> None:
        """What the server says of it, and its version after the round that took it."""
        self.outcome, self.reason = verdict.outcome, verdict.reason
        self.refused, self.server_s = verdict.rejected, verdict.server_s
        self.target = max(self.target, version)

    def welcomed(self, version: int, *, is_reset: bool) -> None:
        """A new connection: no heartbeat is under way on it.

        After a reset the server does not know the history that this contribution belongs to, and
        nobody can say whether something of it counts: it is over, and what was pushed does not go
        back into a residual. If the server is still at its version, the next has the same number.
        """
        self.fence = 0
        if is_reset and not self.outcome:
            self.outcome, self.reason = "rejected", "the server does not know this residual"
            self.forgotten = frozenset(self.pushed)
            self.target = max(self.number, version)

    def rejected(self) -> list[int]:
        """The shards that were pushed, do not count, and go back into the residual."""
        lost = self.pushed if self.outcome == "rejected" else self.pushed.intersection(self.refused)
        return sorted(lost - self.forgotten)

    @property
    def counts(self) -> bool:
        """Whether anything of it counts."""
        return self.outcome == "applied" and (
            not self.pushed or len(self.rejected()) < len(self.pushed)
        )

    @property
    def staleness(self) -> int:
        """How many rounds others were ahead in the round that took it; 0 if none took it."""
        return self.target - 1 - self.number if self.counts else 0

    def _check_unsaid(self, shard: int) -> None:
        if shard in self.pushed or shard in self.skipped:
            msg = f"shard {shard} was pushed or skipped already in this step"
            raise UsageError(msg)


def merge(rounds: Iterable[Round], version: int) -> RoundResult:
    """How a step ended, given its contributions to one or several servers."""
    ended = list(rounds)
    return RoundResult(
        applied=any(each.counts for each in ended),
        reason=next((each.reason for each in ended if each.reason), ""),
        version=version,
        server_s=max((each.server_s for each in ended), default=0.0),
        rejected=tuple(sorted(shard for each in ended for shard in each.rejected())),
        staleness=max((each.staleness for each in ended), default=0),
    )

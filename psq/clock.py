"""When may work go on: the consistency decisions of a job, each a pure function of a few numbers.

Version v is the weights after v rounds; round r turns version r into r + 1. A contribution is named
by its base, the version it was computed from: in round r it is r - base rounds stale.

    bsp     every member contributes to every round, from the newest weights: nothing is ever stale
    ssp:K   a round closes without the members that are busy with older weights, unless one of them
            would then be more than K rounds stale: for that one it waits
    asp     a round closes as soon as anybody has contributed

A quorum lets a round close without members that are slow today: once so many have contributed and
the deadline has passed. Under bsp what they push later is rejected; under ssp it counts in a later
round. The deadline follows from how long contributions took lately, their median and so many median
absolute deviations (MADs), which a straggler does not move.

Never here: clocks, state, waits. Servers and workers both ask here and nowhere else, so another
rule changes this module and not the machinery around it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, cast, get_args

from psq.errors import ConfigError

__all__ = [
    "BSP",
    "DEADLINE_SAMPLES",
    "MAX_MADS",
    "MAX_QUORUM",
    "MAX_STALENESS",
    "MIN_SAMPLES",
    "Consistency",
    "ConsistencyKind",
    "closes",
    "deadline",
    "may_apply",
    "members",
    "parse_consistency",
]

ConsistencyKind = Literal["bsp", "ssp", "asp"]

MAX_STALENESS: Final = 1000
MAX_QUORUM: Final = 4096
MAX_MADS: Final = 1000.0
DEFAULT_MADS: Final = 6.0
DEADLINE_SAMPLES: Final = 64
"""The deadline follows from this many contributions, the last ones."""
MIN_SAMPLES: Final = 8
"""With fewer there is no deadline yet."""
LEAST_MAD: Final = 0.02
"""Of the median: durations that hardly differ would give a deadline that everybody misses."""

_LEAST_QUORUM: Final = {"bsp": 0, "ssp": 1, "asp": 1}
_GRAMMAR: Final = (
    "bsp[,quorum=Q][,mads=X], ssp:K[,quorum=Q][,mads=X] or asp, where K is 1..1000 rounds, "
    "Q is 1..4096 workers and X is 0..1000; bsp has mads only with a quorum"
)
_TEXT: Final = re.compile(
    r"(bsp|ssp|asp)(?::([0-9]{1,4}))?(?:,quorum=([0-9]{1,4}))?(?:,mads=([0-9]{1,4}(?:\.[0-9]{1,6})?))?"
)


@dataclass(frozen=True, slots=True)
class Consistency:
    """How far the workers of a job may drift apart; `parse_consistency` makes one from text.

    Attributes:
        kind: bsp, ssp or asp.
        max_staleness: in rounds; 0 for bsp, None (unbounded) for asp.
        quorum: how many must contribute before a round may close without the rest; 0 is all.
        deadline_mads: a round with a quorum waits for contributions that take up to this many MADs
            more than the median.
    """

    kind: ConsistencyKind = "bsp"
    max_staleness: int | None = 0
    quorum: int = 0
    deadline_mads: float = DEFAULT_MADS

    def __post_init__(self) -> None:
        """Refuse what no job can run, and settings that would have no effect."""
        legal = self.kind in get_args(ConsistencyKind) and all(
            (
                _fits_kind(self.kind, self.max_staleness),
                _LEAST_QUORUM[self.kind] <= self.quorum <= MAX_QUORUM,
                0.0 <= self.deadline_mads <= MAX_MADS,
                self.has_deadline or self.deadline_mads == DEFAULT_MADS,
                self.kind != "asp" or self.quorum == 1,
            )
        )
        if not legal:
            msg = f"consistency must be {_GRAMMAR}; got {self!r}"
            raise ConfigError(msg)

    @property
    def eager(self) -> bool:
        """Whether every member is in every round, so that no shard need wait for the round."""
        return self.kind == "bsp" and not self.quorum

    @property
    def has_deadline(self) -> bool:
        """Whether a round may close because time has passed."""
        return self.kind != "asp" and not self.eager

    @property
    def text(self) -> str:
        """The canonical text: equal consistencies have equal texts, defaults are left out."""
        words = f"ssp:{self.max_staleness}" if self.kind == "ssp" else self.kind
        if self.quorum != _LEAST_QUORUM[self.kind]:
            words += f",quorum={self.quorum}"
        if self.deadline_mads != DEFAULT_MADS:
            words += ",mads=" + f"{self.deadline_mads:.6f}".rstrip("0").rstrip(".")
        return words


def _fits_kind(kind: str, max_staleness: int | None) -> bool:
    if kind == "asp" or max_staleness is None:
        return kind == "asp" and max_staleness is None
    return max_staleness == 0 if kind == "bsp" else 1 <= max_staleness <= MAX_STALENESS


BSP: Final = Consistency()


def parse_consistency(text: str) -> Consistency:
    """The consistency named by a text such as "bsp", "bsp,quorum=3" or "ssp:4,mads=8".

    Raises:
        ConfigError: it names none; the message shows the grammar.
    """
    match = _TEXT.fullmatch(text)
    kind, rounds, quorum, mads = match.groups() if match else ("", None, None, None)
    misplaced = (rounds is None) == (kind == "ssp") or (kind == "asp" and (quorum or mads))
    if not kind or misplaced or (quorum and not int(quorum)):
        raise ConfigError(_misnamed(text))
    try:
        return Consistency(
            cast("ConsistencyKind", kind),
            None if kind == "asp" else int(rounds or 0),
            int(quorum) if quorum else _LEAST_QUORUM[kind],
            float(mads) if mads else DEFAULT_MADS,
        )
    except ConfigError as error:
        raise ConfigError(_misnamed(text)) from error


def _misnamed(text: str) -> str:
    return f"consistency must be {_GRAMMAR}; got {text!r:.80}"


def members(
    ranks: Iterable[int],
    finished: Collection[int],
    contributed: Collection[int],
    absent: Collection[int] = (),
) -> tuple[int, ...]:
    """The ranks whose word the open round needs, ascending.

    Of `ranks`, which are all that speak to this server: those that have not finished, and those
    that have spoken. A rank that left with its work done owes nothing more; one that was lost is
    still owed, and waited for, unless it is one of `absent`: those that the job goes on without.
    """
    return tuple(
        rank
        for rank in ranks
        if rank in contributed or (rank not in finished and rank not in absent)
    )


def closes(  # noqa: PLR0913 - the whole of a decision in one place
    ranks: Collection[int],
    complete: Collection[int],
    bases: Mapping[int, int] = MappingProxyType({}),
    *,
    round: int = 0,  # noqa: A002 - the word of the field, as in every header
    consistency: Consistency = BSP,
    overdue: bool = False,
    late: Collection[int] = (),
) -> bool:
    """Whether the open round may close: reduce what is there, and go on without the rest.

    Args:
        ranks: the round's members.
        complete: those that have said every shard.
        bases: the version each rank has at least, so that its next contribution is computed from
            no older one. A rank without one gets the newest when it joins.
        round: the open round.
        consistency: the job's.
        overdue: whether the deadline of this round has passed.
        late: ranks whose last contribution took longer than the deadline allows. Under ssp they are
            not waited for, because they would only be overdue; what they push counts in a later
            round, and shows when they are in time again.
    """
    there = frozenset(complete)
    missing = [rank for rank in ranks if rank not in there]
    if not missing or consistency.eager:
        return bool(ranks) and not missing
    if len(ranks) - len(missing) < max(1, min(consistency.quorum, len(ranks))):
        return False
    if consistency.kind == "asp":
        return True
    from_older = [round - bases[rank] for rank in missing if bases.get(rank, round) < round]
    if consistency.kind == "ssp" and any(
        not may_apply(0, stale + 1, consistency) for stale in from_older
    ):
        return False
    hopeless = late if consistency.kind == "ssp" else ()
    return overdue or all(bases.get(r, round) < round or r in hopeless for r in missing)


def may_apply(base: int, round: int, consistency: Consistency) -> bool:  # noqa: A002 - see closes
    """Whether a contribution computed from version `base` may count in this round."""
    stale = round - base
    bound = consistency.max_staleness
    return stale >= 0 and (bound is None or stale <= bound)


def deadline(durations_s: Iterable[float], mads: float) -> float | None:
    """How long a contribution may take before a round with a quorum closes without it.

    Args:
        durations_s: how long contributions took lately, from the broadcast of their base version
            until they were complete; the last DEADLINE_SAMPLES of them count.
        mads: how many median absolute deviations over the median.

    Returns:
        Seconds; None while there are fewer than MIN_SAMPLES.
    """
    lately = list(durations_s)[-DEADLINE_SAMPLES:]
    if len(lately) < MIN_SAMPLES:
        return None
    typical = _median(lately)
    deviation = _median([abs(duration - typical) for duration in lately])
    return typical + mads * max(deviation, LEAST_MAD * typical)


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return (ordered[middle] + ordered[~middle]) / 2

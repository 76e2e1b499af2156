"""The ledger of the data: whose every index of an epoch is, so that none is lost or visited twice.

An epoch is a permutation of [0, size) that every worker computes by itself (`psq.shuffle`); what is
booked here is positions in it, as spans [low, high), never as lists.

    pool --DRAW by (rank, seq)--> held --verdict "applied"--> visited
      ^                            |
      +----------------------------+--- "rejected", given up, left, fenced, not drawn after all

A range is bound to the contribution that it is drawn for: a rank draws once for a seq, and the same
DRAW again gets the same range. When all positions are visited the epoch is over and the next one
begins; while the last ones are held by others, who asks has to wait.

Where all ranks are in every round (bsp), the first DRAW of a round cuts a range for each of them,
by ascending rank: so who gets what does not depend on who asks first. What a rank does not draw
goes back when the round ends.

A rank may be taken over by another process while something that the old one said of its range is
reduced already: that range is nobody's then, and visited when the round commits.

Plain bookkeeping; what is asked of it, and told, is decided in `drawing` and `rounds`. Bounds: a
held range has at most MAX_SPANS spans, a rank holds one, so there are at most ranks x MAX_SPANS + 1
spans in the pool.

Invariant (`check`): pool, held, nobody's and visited are disjoint, and together [0, size).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple, TypeAlias

__all__ = ["MAX_SPANS", "Held", "Ledger", "Span", "Spans", "Terms", "count", "merge", "take"]

MAX_SPANS: Final = 64

Span: TypeAlias = tuple[int, int]
Spans: TypeAlias = tuple[Span, ...]


class Terms(NamedTuple):
    """What all ranks of a job have to agree on: the data set's size, a batch, the order's seed."""

    size: int
    batch: int
    seed: int


@dataclass(frozen=True, slots=True)
class Held:
    """The range bound to one contribution.

    Attributes:
        seq: the contribution's.
        spans: positions, ascending.
        drawn: the rank has asked for it; else it was only cut for it.
    """

    seq: int
    spans: Spans
    drawn: bool = True


@dataclass(slots=True)
class Ledger:
    """See the module's docstring.

    Attributes:
        terms: None before the first DRAW.
        epoch: the one that is being visited.
        pool, visited: spans.
        held: by rank.
        nobodys: of contributions that count and whose process is gone.
    """

    terms: Terms | None = None
    epoch: int = 0
    pool: Spans = ()
    visited: Spans = ()
    held: dict[int, Held] = field(default_factory=dict)
    nobodys: list[Held] = field(default_factory=list)

    @property
    def left(self) -> int:
        """How many positions of this epoch are not visited yet."""
        return self.terms.size - count(self.visited) if self.terms is not None else 0

    def begin(self, terms: Terms) -> None:
        """The first DRAW says what the data are."""
        self.terms = terms
        self.pool = ((0, terms.size),)

    def draw(self, rank: int, seq: int, ranks: Iterable[int] = ()) -> Spans:
        """The range of a rank's contribution; () if nothing is left in the pool.

        Args:
            rank: who asks.
            seq: for which contribution.
            ranks: for whom one is cut at the same time, `rank` among them; none: for this one.
        """
        for each in sorted({rank, *ranks}):
            before = self.held.get(each)
            if before is None or before.seq < seq:
                self._cut(each, seq, drawn=each == rank)
        mine = self.held.get(rank)
        if mine is None or mine.seq != seq:
            return ()
        self.held[rank] = replace(mine, drawn=True)
        return mine.spans

    def settle(self, rank: int, seq: int, *, applied: bool) -> None:
        """A contribution has its verdict; ranges drawn for earlier ones were never said."""
        mine = self.held.get(rank)
        if mine is None or mine.seq > seq:
            return
        if mine.seq == seq and applied and mine.drawn:
            del self.held[rank]
            self._visit(mine)
        else:
            self.release(rank)

    def release(self, rank: int) -> int | None:
        """Take a rank's range back; returns its seq if the rank may be computing from it."""
        mine = self.held.pop(rank, None)
        if mine is None:
            return None
        self.pool = merge(self.pool, mine.spans)
        return mine.seq if mine.drawn else None

    def disown(self, rank: int) -> None:
        """A rank's range counts although its process is gone."""
        mine = self.held.pop(rank, None)
        if mine is not None and mine.drawn:
            self.nobodys.append(mine)
        elif mine is not None:
            self.pool = merge(self.pool, mine.spans)

    def commit(self, number: int) -> None:
        """A round is over: nobody's ranges are visited, what was not drawn for it goes back."""
        for each in [one for one in self.nobodys if one.seq <= number]:
            self.nobodys.remove(each)
            self._visit(each)
        for rank in [r for r, one in self.held.items() if one.seq <= number and not one.drawn]:
            self.release(rank)

    def _cut(self, rank: int, seq: int, *, drawn: bool) -> None:
        assert self.terms is not None
        self.release(rank)
        spans, self.pool = take(self.pool, self.terms.batch)
        if spans:
            self.held[rank] = Held(seq, spans, drawn)

    def _visit(self, range_: Held) -> None:
        self.visited = merge(self.visited, range_.spans)
        if self.left == 0:
            assert self.terms is not None
            self.epoch += 1
            self.pool, self.visited = ((0, self.terms.size),), ()

    # ---- what outlives the process

    def capture(self) -> dict[str, Any]:
        """Everything, as lists and numbers."""
        return {
            "terms": None if self.terms is None else list(self.terms),
            "epoch": self.epoch,
            "visited": [list(span) for span in self.visited],
            "held": {r: [h.seq, h.drawn, [list(s) for s in h.spans]] for r, h in self.held.items()},
        }

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Become what was captured.

        Nobody's ranges go back into the pool: the round that they counted in was not committed.
        """
        self.terms = None if plain["terms"] is None else Terms(*plain["terms"])
        self.epoch = plain["epoch"]
        self.visited = tuple((low, high) for low, high in plain["visited"])
        self.held = {
            int(rank): Held(seq, tuple((low, high) for low, high in spans), drawn)
            for rank, (seq, drawn, spans) in plain["held"].items()
        }
        self.nobodys = []
        if self.terms is not None:
            taken = merge(self.visited, (span for one in self.held.values() for span in one.spans))
            self.pool = _between(taken, self.terms.size)

    def check(self) -> None:
        """Every position is in one place.

        Raises:
            AssertionError: one is lost, or in two.
        """
        ranges = [*self.held.values(), *self.nobodys]
        everything = sorted(
            [*self.pool, *self.visited, *(span for one in ranges for span in one.spans)]
        )
        at = 0
        for low, high in everything:
            assert low == at < high, f"epoch {self.epoch}: expected a span from {at}, got {low}"
            at = high
        size = 0 if self.terms is None else self.terms.size
        assert at == size, f"epoch {self.epoch}: {at} of {size} positions are accounted for"
        assert all(len(one.spans) <= MAX_SPANS for one in ranges)


# ---- spans


def count(spans: Iterable[Span]) -> int:
    """How many positions these are."""
    return sum(high - low for low, high in spans)


def merge(spans: Iterable[Span], more: Iterable[Span]) -> Spans:
    """Both together, ascending, neighbours joined; they do not overlap."""
    joined: list[Span] = []
    for low, high in sorted([*spans, *more]):
        if joined and joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return tuple(joined)


def take(spans: Spans, most: int) -> tuple[Spans, Spans]:
    """The first `most` positions, of MAX_SPANS spans at most, and the rest."""
    taken: list[Span] = []
    rest = list(spans)
    while rest and most and len(taken) < MAX_SPANS:
        low, high = rest.pop(0)
        cut = min(high, low + most)
        taken.append((low, cut))
        most -= cut - low
        if cut < high:
            rest.insert(0, (cut, high))
    return tuple(taken), tuple(rest)


def _between(taken: Iterable[Span], size: int) -> Spans:
    """What of [0, size) is in none of these spans."""
    free: list[Span] = []
    at = 0
    for low, high in taken:
        if low > at:
            free.append((at, low))
        at = high
    return (*free, (at, size)) if at < size else tuple(free)

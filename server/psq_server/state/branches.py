"""Who speaks to a server of a tree: leaves by themselves, and aggregators for several of them.

    "0-3,4-7"     two aggregators: rank 0 speaks for the workers 0..3, rank 4 for 4..7
    "0,1,2,3"     four workers
    "0-3,4,5"     one aggregator and two workers

A leaf has the rank that it has in the job, whoever it talks to; an aggregator speaks above as the
lowest rank of its leaves. So a rank is the same number everywhere in the tree, and so is the plan.
A server's branches follow one upon the other without a gap. Pure data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from psq.errors import ConfigError

__all__ = ["Branch", "Branches", "parse_branches"]

MAX_DIGITS: Final = 4
_ITEM: Final = re.compile(rf"([0-9]{{1,{MAX_DIGITS}}})(?:-([0-9]{{1,{MAX_DIGITS}}}))?")


@dataclass(frozen=True, slots=True)
class Branch:
    """One conversation: `rank` speaks for the leaves rank..last."""

    rank: int
    last: int

    @property
    def is_aggregator(self) -> bool:
        """Whether it speaks for others than itself."""
        return self.last > self.rank

    @property
    def text(self) -> str:
        """As it is written in a list of branches."""
        return f"{self.rank}-{self.last}" if self.is_aggregator else f"{self.rank}"


@dataclass(frozen=True, slots=True)
class Branches:
    """All branches of one server, ascending.

    Raises:
        ConfigError: none, one with its ends the wrong way round, an overlap or a gap.
    """

    items: tuple[Branch, ...]

    def __post_init__(self) -> None:
        """They follow one upon the other."""
        if not self.items:
            msg = "children: expected one rank at least"
            raise ConfigError(msg)
        for branch in self.items:
            if branch.last < branch.rank:
                msg = f"children: {branch.rank}-{branch.last} has its ends the wrong way round"
                raise ConfigError(msg)
        for before, after in zip(self.items, self.items[1:], strict=False):
            if after.rank != before.last + 1:
                msg = (
                    f"children: after {before.text} expected rank {before.last + 1}, got "
                    f"{after.text}: the ranks of one subtree follow one upon the other"
                )
                raise ConfigError(msg)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that speak, ascending."""
        return tuple(branch.rank for branch in self.items)

    @property
    def first(self) -> int:
        """The lowest leaf: as which an aggregator speaks above."""
        return self.items[0].rank

    @property
    def last(self) -> int:
        """The highest leaf."""
        return self.items[-1].last

    @property
    def text(self) -> str:
        """As `parse_branches` reads it."""
        return ",".join(branch.text for branch in self.items)

    def of(self, rank: int) -> Branch | None:
        """The branch that speaks as this rank."""
        return next((branch for branch in self.items if branch.rank == rank), None)

    def misfit(self, world_size: int, *, is_root: bool) -> str:
        """Why these cannot be branches of a job of so many workers, in words; empty if they can."""
        if self.last >= world_size:
            return f"children: {self.text} has rank {self.last}, the job has {world_size} workers"
        if is_root and (self.first, self.last) != (0, world_size - 1):
            return (
                f"children: {self.text} are ranks {self.first} to {self.last}, the job has 0 to "
                f"{world_size - 1}: the server without --parent needs all of them below it"
            )
        return ""


def parse_branches(text: str) -> Branches:
    """The branches that a text such as "0-3,4-7" names.

    Raises:
        ConfigError: it names none.
    """
    return Branches(tuple(_parse(text)))


def _parse(text: str) -> Iterable[Branch]:
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            msg = (
                f"children: expected ranks such as 0,1,2 or ranges for aggregators such as "
                f"0-3,4-7, got {text!r:.80}"
            )
            raise ConfigError(msg)
        rank, last = match.groups()
        yield Branch(int(rank), int(last or rank))

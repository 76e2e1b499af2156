"""What happens often is said seldom: the first time, and then now and then with how often it was.

    seldom = Seldom(every=10.0)
    seldom.note("rank 3", at=0.0)    -> Due(1, 1)      the first is said at once
    seldom.note("rank 3", at=4.0)    -> None           counted
    seldom.note("rank 3", at=12.0)   -> Due(3, 2)      three in all, two since the last time

`at` is whatever the owner counts by: seconds, or rounds. No clock, no log; a caller's keys are few.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Due", "Seldom"]


class Due(NamedTuple):
    """It is to be said now: how often it has happened, and how often since it was said last."""

    total: int
    since: int


@dataclass(slots=True)
class _Said:
    at: float
    total: int = 1
    since: int = 0


class Seldom:
    """See the module's docstring.

    Args:
        every: from one time that something is said to the next, at least.
    """

    def __init__(self, every: float) -> None:
        self._every = every
        self._said: dict[Hashable, _Said] = {}

    def note(self, key: Hashable, at: float) -> Due | None:
        """It has happened (again); None if it is not to be said now."""
        known = self._said.get(key)
        if known is None:
            self._said[key] = _Said(at)
            return Due(1, 1)
        known.total += 1
        known.since += 1
        if at - known.at < self._every:
            return None
        due = Due(known.total, known.since)
        known.at, known.since = at, 0
        return due

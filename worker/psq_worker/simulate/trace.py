"""What a simulated job came to, step by step: plain values, in the order in which they were known.

A step is one of every worker: its point is made when the last of those that still take part has
done it, whoever was ahead. Under bsp that is a round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Point", "Score", "Trace", "Usage"]


class Usage(NamedTuple):
    """Virtual seconds since all workers began, and bytes of one since then, on the wire."""

    virtual_s: float
    up_bytes: float
    down_bytes: float


@dataclass(frozen=True, slots=True)
class Point:
    """One step of all workers.

    Attributes:
        step: how many they have done, from 1.
        loss: the mean of those that computed; NaN if nobody did.
        losses: of each of them, by rank.
        usage: when the last of them had done it; bytes of one when it had: the mean over all.
        staleness: the most rounds that a contribution of this step was old.
        bits: what a value that was pushed took, the mean over all; None where none was.
    """

    step: int
    loss: float
    losses: Mapping[int, float]
    usage: Usage
    staleness: int = 0
    bits: float | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """What rank 0's model was worth after so many of its steps; usage is rank 0's."""

    step: int
    scores: Mapping[str, float]
    usage: Usage


@dataclass(slots=True)
class _Step:
    losses: dict[int, float] = field(default_factory=dict)
    usages: list[Usage] = field(default_factory=list)
    staleness: int = 0
    said_bytes: int = 0
    said_numel: int = 0


class Trace:
    """Collects what workers report.

    Args:
        workers: how many there are.
        on_point: called with each point.
        on_score: called with each score.
    """

    def __init__(
        self,
        workers: int,
        on_point: Callable[[Point], None] | None,
        on_score: Callable[[Score], None] | None,
    ) -> None:
        self.points: list[Point] = []
        self.scores: list[Score] = []
        self._on_point, self._on_score = on_point, on_score
        self._open: dict[int, _Step] = {}
        self._done = dict.fromkeys(range(workers), 0)

    def step(  # noqa: PLR0913 - what is known of a step
        self,
        rank: int,
        done: int,
        loss: float | None,
        *,
        staleness: int,
        usage: Usage,
        said: tuple[int, int],
    ) -> None:
        """A worker has done so many steps.

        Args:
            rank: which.
            done: how many.
            loss: of the last, if it computed one.
            staleness: in rounds.
            usage: since all began.
            said: bytes of the payloads that it pushed in that step, and how many values they say.
        """
        here = self._open.setdefault(done, _Step())
        if loss is not None:
            here.losses[rank] = loss
        here.usages.append(usage)
        here.staleness = max(here.staleness, staleness)
        here.said_bytes += said[0]
        here.said_numel += said[1]
        self._done[rank] = done
        self._close()

    def leave(self, rank: int) -> None:
        """Nobody waits for this rank any more."""
        self._done.pop(rank, None)
        self._close()

    def score(self, made: Score) -> None:
        """Rank 0 was evaluated."""
        self.scores.append(made)
        if self._on_score is not None:
            self._on_score(made)

    def _close(self) -> None:
        floor = min(self._done.values(), default=max(self._open, default=0))
        for step in sorted(step for step in self._open if step <= floor):
            self._make(step, self._open.pop(step))

    def _make(self, step: int, known: _Step) -> None:
        losses = dict(sorted(known.losses.items()))
        mean = sum(losses.values()) / len(losses) if losses else math.nan
        seconds, ups, downs = zip(*known.usages, strict=True)
        usage = Usage(max(seconds), sum(ups) / len(ups), sum(downs) / len(downs))
        bits = 8 * known.said_bytes / known.said_numel if known.said_numel else None
        point = Point(step, mean, losses, usage, known.staleness, bits)
        self.points.append(point)
        if self._on_point is not None:
            self._on_point(point)

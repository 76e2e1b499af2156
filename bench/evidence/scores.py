"""Statistics of cells: means, and differences to plain Adam paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

# Two-sided 95 % points of Student's t by degrees of freedom; beyond them the last, which is wider.
STUDENT_95: Final = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
PAIR: Final = 2


def score_of(result: dict[str, Any] | None) -> float | None:
    """The last score; None for what failed, was not run, or ended as no number."""
    if result is None or "failure" in result or not result["scores"]:
        return None
    score: float | None = result["scores"][-1][1]
    return score


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % interval: infinite for a single value."""

    mean: float
    half: float

    def holds(self, limit: float) -> bool:
        """Whether it includes 0, or its mean is no further below 0 than the limit."""
        return self.mean + self.half >= 0.0 or self.mean >= -limit


def interval(differences: Sequence[float]) -> Interval:
    """Mean of paired differences, and how sure it is."""
    mean = statistics.mean(differences)
    if len(differences) < PAIR:
        return Interval(mean, math.inf)
    spread = statistics.stdev(differences) / len(differences) ** 0.5
    return Interval(mean, STUDENT_95[min(len(differences) - 1, len(STUDENT_95)) - 1] * spread)

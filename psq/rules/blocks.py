"""What rules in NumPy share: cuts of memory that stay in the cache, and checked rates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from psq.errors import UsageError

__all__ = ["BLOCK_NUMEL", "MAX_RATE", "blocks", "check_rate", "is_worth_nothing"]

BLOCK_NUMEL: Final = 1 << 14
"""Values that are worked on at once: with a scratch of as many, they stay in a core's cache."""
MAX_RATE: Final = 1e6
"""The largest learning rate of a push: times the largest message it still is a number in f32."""
MAX_RATIO: Final = 2.0**32
"""Of two learning rates, between which what waits still changes its unit."""


def blocks(numel: int, start: int = 0) -> Iterator[slice]:
    """Cuts of BLOCK_NUMEL values, the last one shorter, from `start` on."""
    stop = start + numel
    for at in range(start, stop, BLOCK_NUMEL):
        yield slice(at, min(at + BLOCK_NUMEL, stop))


def check_rate(lr: float) -> float:
    """The learning rate.

    Raises:
        UsageError: it is negative or not finite.
    """
    if not (math.isfinite(lr) and lr >= 0.0):
        msg = f"the learning rate must be a finite number >= 0, got {lr!r}"
        raise UsageError(msg)
    return lr


def is_worth_nothing(lr: float, before: float) -> bool:
    """Whether a step of this rate moves nothing, beside what waits from a step of the rate before.

    Brought to its unit, what waits would be so large that no message could say it.
    """
    return lr == 0.0 or before / lr > MAX_RATIO

"""What goes wrong in a simulated job, and for whom: drawn from the seed, before anything runs.

    stragglers   a share of the workers computes slower by a factor, always
    slow links   a share of the workers has a link slower by a factor, always
    pauses       any step of any worker may take so much longer, by chance
    crashes      a worker's process ends before its step number so and so, without a word; a new
                 one takes its rank after a while, with a new residual and new moments, or none does
    leaves       the same, but it says goodbye, as one whose work is done

A crash is seen by the server as it is in a cluster: the connection is gone, the rank is lost, and
who must wait for it does so until it is back.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

from psq.errors import ConfigError

__all__ = ["Crash", "Faults", "Speeds", "speeds_of"]

MAX_FACTOR: Final = 1e6


@dataclass(frozen=True, slots=True)
class Crash:
    """The end of one worker's process.

    Attributes:
        rank: whose.
        step: before which of its steps, counted from 0.
        away_s: until a new process takes the rank; infinite: none does.
        leaves: it says goodbye, and the job goes on without it.
    """

    rank: int
    step: int
    away_s: float = math.inf
    leaves: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot happen."""
        if self.rank < 0 or self.step < 0 or not self.away_s >= 0.0:
            msg = f"crash: rank, step and seconds must be 0 or more, got {self!r}"
            raise ConfigError(msg)
        if self.leaves and math.isfinite(self.away_s):
            msg = f"crash: a worker that leaves does not come back, got {self!r}"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class Faults:
    """See the module's docstring.

    Attributes:
        stragglers: (share of the workers, factor).
        slow_links: likewise.
        pause_chance: of each step.
        pause_s: the mean; durations are exponential.
        crashes: of these, one a rank at most.
    """

    stragglers: tuple[float, float] = (0.0, 1.0)
    slow_links: tuple[float, float] = (0.0, 1.0)
    pause_chance: float = 0.0
    pause_s: float = 0.0
    crashes: tuple[Crash, ...] = ()

    def __post_init__(self) -> None:
        """Shares and chances lie in 0..1, factors at 1 or above."""
        for name in ("stragglers", "slow_links"):
            share, factor = getattr(self, name)
            if not (0.0 <= share <= 1.0 and 1.0 <= factor <= MAX_FACTOR):
                msg = (
                    f"{name}: expected a share 0..1 of the workers and how many times slower they "
                    f"are, 1..{MAX_FACTOR:g}, got {share!r} and {factor!r}"
                )
                raise ConfigError(msg)
        if not 0.0 <= self.pause_chance <= 1.0 or not 0.0 <= self.pause_s < math.inf:
            msg = (
                "pauses: expected a chance 0..1 and a mean of 0 s or more, "
                f"got {self.pause_chance!r} and {self.pause_s!r}"
            )
            raise ConfigError(msg)
        ranks = [crash.rank for crash in self.crashes]
        if len(set(ranks)) < len(ranks):
            msg = f"crashes: each rank may crash or leave once, got ranks {sorted(ranks)}"
            raise ConfigError(msg)

    def crash_of(self, rank: int) -> Crash | None:
        """What happens to this rank, if anything."""
        return next((crash for crash in self.crashes if crash.rank == rank), None)


@dataclass(frozen=True, slots=True)
class Speeds:
    """By rank: how many times longer than the others its computing and its link take."""

    compute: tuple[float, ...]
    link: tuple[float, ...]


def speeds_of(faults: Faults, workers: int, seed: int) -> Speeds:
    """Who is slow.

    Raises:
        ConfigError: a crash is of a rank that the job does not have.
    """
    strange = [crash.rank for crash in faults.crashes if crash.rank >= workers]
    if strange:
        msg = f"crashes: rank {strange[0]} is outside 0..{workers - 1} of this job"
        raise ConfigError(msg)
    return Speeds(
        _factors(faults.stragglers, workers, f"stragglers {seed}"),
        _factors(faults.slow_links, workers, f"slow links {seed}"),
    )


def _factors(chosen: tuple[float, float], workers: int, seed: str) -> tuple[float, ...]:
    share, factor = chosen
    count = round(share * workers) or (1 if share else 0)
    slow = set(random.Random(seed).sample(range(workers), count))  # noqa: S311 - a simulation
    return tuple(factor if rank in slow else 1.0 for rank in range(workers))

"""What a simulated job came to: a plain value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psq.recipe import Recipe
from psq_worker.job import Job
from psq_worker.simulate.trace import Point, Score, Usage

__all__ = ["SimResult"]

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SimResult:
    """What a simulated job came to.

    Attributes:
        task, metric, recipe: names; the recipe as a value.
        workers, numel: counts.
        job: how long, at which rate.
        points, scores: see `trace`.
        weights: the last of rank 0, f32[numel] by tensor name, shaped.
        usage: virtual seconds, and bytes of one worker: the mean over all.
        wall_s: what computing all of that took.
        bits_up, bits_down: of payload per parameter, worker and step.
        rounds: that server 0 has made.
        rejected, skipped: contributions of which the servers took less than all; steps with
            gradients that were not finite.
        resent_frames, lost_frames: of all links.
        resets: residuals that had to start from zero.
    """

    task: str
    metric: str
    recipe: Recipe
    workers: int
    numel: int
    job: Job
    points: tuple[Point, ...]
    scores: tuple[Score, ...]
    weights: Mapping[str, Floats]
    usage: Usage
    wall_s: float
    bits_up: float
    bits_down: float
    rounds: int
    rejected: int
    skipped: int
    resent_frames: int
    lost_frames: int
    resets: int

    @property
    def score(self) -> float | None:
        """The last score that counts."""
        return self.scores[-1].scores.get(self.metric) if self.scores else None

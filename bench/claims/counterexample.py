"""The counterexample to Adam with too short a memory, after 1811.09358, by the real optim.Adam.

F is the mean of one steep function and nine shallow ones that point the other way; one of the ten
is drawn in each step:

    f_0 = 5.5 x^2  for |x| <= 1,  11 |x| - 5.5  beyond            drawn one time in ten
    f_i = -0.5 x^2 for |x| <= 1,  -|x| + 0.5    beyond            the other nine

so F = 0.1 x^2 near its only minimum, 0. With alpha_t = 0.5 / sqrt(t) and theta_t = 1 - (0.01 +
0.99 r) / t^r the condition of `psq.theory.check_schedule` holds for r > 0 and stalls at r = 0,
where theta_t is 0.99. A memory so short that it forgets the steep function before it comes again,
theta = 0.5, makes the nine shallow ones win for good. Many runs go side by side, one in each value
of the vector, each with draws of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psq.optim import Adam
from psq.recipe import AdamConfig, OneMinusPower, Power, Schedule, schedule_value
from psq.theory import ScheduleReport, check_schedule

STEPS = 30_000
START = 1.0
STEEP, SHALLOW = 11.0, -1.0
SHARE = 0.1
ALPHA = Power(0.5, 0.5)
FORGETFUL = 0.5


@dataclass(frozen=True)
class Paths:
    """Where the runs were: |x| f64[times, runs] at the steps named."""

    steps: tuple[int, ...]
    distances: NDArray[np.float64]


def theta_of(r: float) -> OneMinusPower:
    return OneMinusPower(0.01 + 0.99 * r, r)


def verdict_of(theta: Schedule, beta: float, steps: int = STEPS) -> ScheduleReport:
    return check_schedule(ALPHA, theta, steps, beta=beta)


def gradient(x: NDArray[np.float32], slope: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of the drawn functions, STEEP or SHALLOW."""
    return slope * np.clip(x, np.float32(-1), np.float32(1))


def walk(theta: Schedule, beta: float, *, runs: int, seed: int, at: Sequence[int]) -> Paths:
    """`runs` runs of max(at) steps from START, in the paper's form: no bias correction."""
    adam = Adam(AdamConfig(beta=beta, theta=theta, bias_correction=False), runs)
    x, u = np.full(runs, START, np.float32), np.empty(runs, np.float32)
    rng, wanted, seen = np.random.default_rng(seed), set(at), []
    for t in range(1, max(at) + 1):
        slope = np.where(rng.random(runs) < SHARE, STEEP, SHALLOW).astype(np.float32)
        adam.direction(gradient(x, slope), schedule_value(ALPHA, t), u)
        x -= u
        if t in wanted:
            seen.append(np.abs(x.astype(np.float64)))
    return Paths(tuple(sorted(wanted)), np.array(seen))


def spaced(steps: int, count: int = 60) -> list[int]:
    """Steps to look at, evenly on a logarithmic axis, the last one included."""
    return sorted({round(t) for t in np.logspace(0.0, np.log10(steps), count)})

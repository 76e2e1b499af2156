"""How many steps to a given gradient, with batches of B, or with W workers through psq.

The problem is smooth, not convex, and ruled by noise: f(x) = sum_j h_j (1 - cos x_j), with h_j
spread over a factor of 4 and starts up to 2.2, where curvature is negative; a sample's gradient is
the true one plus Gaussian noise, 50 times as large as the true one is at the goal. The goal: the
root mean square of the true gradient at GOAL.

Adam divides by the size of what it sees, which is the noise, and a batch of B shrinks noise by
sqrt(B): so alpha = alpha_1 sqrt(B) is the step size of a B-fold batch [derived], and then W workers
are to take 1/W of the steps. The same alpha is used for the same number of samples everywhere, by
plain Adam and by recipes; nothing is tuned but alpha_1, once, for plain Adam with B = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from psq.codec import ShardCodec, get_codec
from psq.feedback import Compressor
from psq.optim import Adam
from psq.plan import Plan
from psq.presets import preset
from psq.recipe import AdamConfig, Recipe
from psq_server.reduce import Reducer

NUMEL = 2048
NOISE = 6.0
GOAL = 0.12
ALPHA_1 = 0.0025
MAX_STEPS = 40_000

Floats = NDArray[np.float32]
Draw = Callable[[Floats], Floats]


class Problem:
    """See the module's docstring.

    Args:
        seed: of the noise; the problem itself is always the same.
    """

    def __init__(self, seed: int) -> None:
        fixed = np.random.default_rng(0)
        self.h = np.exp(fixed.uniform(np.log(0.5), np.log(2.0), NUMEL)).astype(np.float32)
        signs = fixed.choice([-1.0, 1.0], NUMEL)
        self.start = (signs * fixed.uniform(0.5, 2.2, NUMEL)).astype(np.float32)
        self._rng = np.random.default_rng(seed)

    def gradient(self, x: Floats) -> Floats:
        return self.h * np.sin(x)

    def size(self, x: Floats) -> float:
        """The root mean square of the true gradient."""
        return float(np.sqrt(np.mean(np.square(self.gradient(x), dtype=np.float64))))

    def sample(self, x: Floats, batch: int = 1) -> Floats:
        """The mean gradient of so many samples: of Gaussian noise one draw is that of the mean."""
        noise = self._rng.standard_normal(NUMEL, dtype=np.float32)
        return self.gradient(x) + noise * np.float32(NOISE / batch**0.5)


def alpha_of(samples: int) -> float:
    """The step size for so many samples a step."""
    return ALPHA_1 * samples**0.5


def steps_of_batches(batch: int, seed: int, alpha: float | None = None) -> int:
    """How many steps plain Adam takes with batches of this size."""
    problem = Problem(seed)
    return _count(problem, _batches(problem, batch, alpha or alpha_of(batch)))


def steps_of_workers(name: str, workers: int, seed: int, alpha: float | None = None) -> int:
    """How many rounds a recipe takes with so many workers, of one sample each."""
    problem = Problem(seed)
    job = Job(preset(name), workers, problem)
    return _count(problem, job.rounds(alpha or alpha_of(workers)))


def _count(problem: Problem, path: Iterator[Floats]) -> int:
    for step, x in zip(range(1, MAX_STEPS + 1), path, strict=False):
        if problem.size(x) <= GOAL:
            return step
    msg = f"the goal was not reached in {MAX_STEPS:,} steps"
    raise RuntimeError(msg)


def _batches(problem: Problem, batch: int, alpha: float) -> Iterator[Floats]:
    adam, x, u = Adam(AdamConfig(), NUMEL), problem.start.copy(), np.empty(NUMEL, np.float32)
    while True:
        adam.direction(problem.sample(x, batch), alpha, u)
        x -= u
        yield x


class Job:
    """A server and its workers in one process: real codecs, residuals and server arithmetic."""

    def __init__(self, recipe: Recipe, workers: int, problem: Problem) -> None:
        plan = Plan.of([("x", (NUMEL,))], recipe, workers)
        (shard,) = plan.layout.shards
        self.problem = problem
        self.x = problem.start.copy()
        self.workers = [Compressor(plan, rank) for rank in range(workers)]
        self.server = Reducer(plan)
        self.server.init(0, 0, self.x)
        self.downlink = ShardCodec(get_codec(recipe.downlink.codec), shard)
        self.adds = recipe.downlink.kind == "delta"
        self.payloads = [np.empty(self.workers[0].nbytes(0), np.uint8) for _ in self.workers]

    def bits(self) -> tuple[float, float]:
        """Of a value, up and down."""
        return 8 * self.payloads[0].size / NUMEL, 8 * self.downlink.nbytes / NUMEL

    def rounds(self, alpha: float) -> Iterator[Floats]:
        take = self.downlink.decode_add if self.adds else self.downlink.decode
        while True:
            for worker, payload in zip(self.workers, self.payloads, strict=True):
                worker.compress(0, [self.problem.sample(self.x)], alpha, payload)
            take(self.server.reduce(0, self.payloads, alpha), self.x)
            yield self.x

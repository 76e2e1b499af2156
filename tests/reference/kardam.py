"""kardam: a server that believes gradients which change as fast as the others' do (1802.07928).

K_p = |g - g'| / |x - x'| of a worker's last two gradients, the largest of its last `window`; what a
message has against the gradient that moved the weights last must not be over the (n - f)-th
smallest K_p (with noise: it may change as much as that worker's own did, however short the way),
and its sender not among those of the last 2 f accepted. n refusals in a row, and the next one is
accepted. What the first filter did not pass is shortened to the median length. Refused
messages go back to the residual. Rounds in step: nothing is late.
"""

from collections import deque
from statistics import median

import numpy as np

from reference.common import Job, Vector, Weights


def train(job: Job, f: int, window: int = 25, *, noise: bool = True) -> Weights:
    """Yield the server's weights."""
    x, before = job.x, job.rates[0]
    e = [job.zeros for _ in job.ranks]
    judge = Judge(job.workers, f, window, noise=noise)
    for t, lr in job.rounds():
        seen, said = job.down(x), []
        for i in job.ranks:
            c = job.gradient(i, t, seen) + e[i] * (before / lr)
            said.append(job.up(c))
            e[i] = c - said[i]
        before = lr
        weights = judge.weigh(x, said)
        for i in job.ranks:
            if weights[i] is None:
                e[i] = e[i] + said[i]
        taken = [(w, d) for w, d in zip(weights, said, strict=True) if w is not None]
        total = job.zeros
        for weight, d in taken:
            total = total + weight / len(taken) * d
        x = x - lr * total if taken else x
        yield x


class Judge:
    """What the server remembers."""

    def __init__(self, workers: int, f: int, window: int, *, noise: bool) -> None:
        self.n, self.f, self.noise = workers, f, noise
        self.coefficients = [deque(maxlen=window) for _ in range(workers)]
        self.senders, self.refusals = deque(maxlen=2 * f), 0
        self.gradients, self.weights, self.norms = [None] * workers, None, {}
        self.accepted = self.moved = None  # (gradient, the weights before it was applied)

    def weigh(self, x: Vector, said: list[Vector]) -> list[float | None]:
        """Each message's weight; None refuses it."""
        if self.accepted is not None and length(x - self.accepted[1]) > 0.0:
            self.moved = self.accepted
        apart = 0.0 if self.weights is None else length(x - self.weights)
        verdicts = [self.verdict(rank, g, x, apart) for rank, g in enumerate(said)]
        self.weights = x
        return verdicts

    def verdict(self, rank: int, g: Vector, x: Vector, apart: float) -> float | None:
        """One message's weight."""
        self.norms[rank] = length(g)
        if apart > 0.0:
            change = length(g - self.gradients[rank])
            self.coefficients[rank].append((change / apart, change if self.noise else 0.0))
        self.gradients[rank] = g
        if len(self.norms) < 2 * self.f + 1:
            return None
        passed = self.is_smooth(g, x)
        if (rank in self.senders or passed is False) and self.refusals < self.n:
            self.refusals += 1
            return None
        self.refusals, self.accepted = 0, (g, x)
        weight = 1.0
        if passed is not True or rank in self.senders:
            weight = min(1.0, median(self.norms.values()) / self.norms[rank])
        self.senders.append(rank)
        return weight

    def is_smooth(self, g: Vector, x: Vector) -> bool | None:
        """Whether it changes as others do; None while too little is known."""
        if self.moved is None or sum(map(bool, self.coefficients)) < self.n - self.f:
            return None
        change, move = length(g - self.moved[0]), length(x - self.moved[1])
        allowed = [max(max(k * move, c) for k, c in each) for each in self.coefficients if each]
        return change <= sorted(allowed)[self.n - self.f - 1]


def length(vector: Vector) -> float:
    """L2."""
    return float(np.sqrt(np.sum(np.square(vector, dtype=np.float64))))

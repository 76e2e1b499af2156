"""dq-sgd: gradients in as many bits as their norm is worth, rounded without bias (2107.14575).

    B = log2(k norm + 1) + 1, rounded        k: what fits the budget, if norms stay as they are

Each worker finds its k anew in each round. Its budget is `bits` for each value so far and in the
HORIZON rounds to come, less what it has spent. Nothing is fed back.
"""

import numpy as np

from reference.common import Job, Vector, Weights, mean

HORIZON, DECAY, BLOCK = 100, 0.95, 1024
LEAST, MOST = 2, 8


def train(job: Job, bits: float = 4.0) -> Weights:
    """Yield the server's weights."""
    x = job.x
    bankers = [Banker(job, bits) for _ in job.ranks]
    for t, lr in job.rounds():
        seen, said = job.down(x), []
        for i in job.ranks:
            g = job.gradient(i, t, seen)
            said.append(job.up(g, bits=bankers[i].choose(g), rank=i, step=t))
        x = x - lr * mean(said)
        yield x


class Banker:
    """One worker's budget."""

    def __init__(self, job: Job, bits: float) -> None:
        self.job, self.bits = job, bits
        self.numels = np.array([layer.stop - layer.start for layer in job.layers])
        self.spent = self.said = 0.0
        self.t, self.norms = 0, np.zeros(len(job.layers))

    def choose(self, g: Vector) -> list[int]:
        """Bits for each layer."""
        k = self.find_k() if self.t else None
        norms = [self.norm(g, layer) for layer in self.job.layers]
        chosen = []
        for numel, norm in zip(self.numels, norms, strict=True):
            wanted = self.bits if k is None else np.log2(k * norm + 1) + 1
            reserve = LEAST * HORIZON * self.numels.sum() - self.bits * numel
            most = (self.left() - reserve) / numel  # if all that is to come had the least
            widths = [b for b in range(LEAST, MOST + 1) if b <= max(most, LEAST)]
            chosen.append(min(widths, key=lambda b: (abs(b - wanted), -b)))
            self.spent += chosen[-1] * numel
            self.said += numel
        self.t += 1
        self.norms = DECAY * self.norms + (1 - DECAY) * np.array(norms)
        return chosen

    def left(self) -> float:
        """Bits that it may still spend."""
        return self.bits * (self.said + HORIZON * self.numels.sum()) - self.spent

    def find_k(self) -> float:
        """The largest k of which the rounds to come cost what is left, by bisection of log2 k."""
        usual = self.norms / (1 - DECAY**self.t)
        low, high = -200.0, 200.0
        while high - low > 1e-9:
            middle = (low + high) / 2
            each = np.clip(np.log2(2.0**middle * usual + 1) + 1, LEAST, MOST)
            fits = HORIZON * np.sum(self.numels * each) <= self.left()
            low, high = (middle, high) if fits else (low, middle)
        return 2.0**low

    def norm(self, g: Vector, layer: slice) -> float:
        """Root mean square, over a layer's values, of the largest of each value's block."""
        total = 0.0
        for tensor in self.job.tensors:
            if layer.start <= tensor.start < layer.stop:
                for start in range(tensor.start, tensor.stop, BLOCK):
                    block = g[start : min(start + BLOCK, tensor.stop)]
                    total += block.size * float(np.abs(block).max()) ** 2
        return (total / (layer.stop - layer.start)) ** 0.5

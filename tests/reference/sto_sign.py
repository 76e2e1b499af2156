"""sto-sign: signs that noise makes right on average, and the majority's come back (2002.10940).

P(sign = +1) = (b + g) / (2 b), b the largest |g| of a block: the sign of g + uniform(-b, b).
Nothing is fed back.
"""

import numpy as np

from reference.common import Job, Vector, Weights, majority

BLOCK = 1024


def train(job: Job) -> Weights:
    """Yield everybody's weights."""
    x = job.x
    for t, lr in job.rounds():
        said = [dithered(job, job.gradient(i, t, x), job.noise(i, t)) for i in job.ranks]
        x = x - lr * majority(said)
        yield x


def dithered(job: Job, g: Vector, uniform: Vector) -> Vector:
    """G + uniform(-b, b), block by block."""
    c = np.empty_like(g)
    for tensor in job.tensors:
        for start in range(tensor.start, tensor.stop, BLOCK):
            at = slice(start, min(start + BLOCK, tensor.stop))
            c[at] = g[at] + np.abs(g[at]).max() * uniform[at]
    return c

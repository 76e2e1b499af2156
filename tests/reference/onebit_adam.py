"""onebit-adam: Adam in full precision for `steps` rounds; then v stays as it is (2102.02888).

From then on the momentum that all hold goes round, one bit each way with feedback on both sides.
"""

import numpy as np

from reference.common import Job, Weights, mean

FLOOR = 1e-3


def train(
    job: Job, steps: int, beta: float = 0.9, theta: float = 0.999, eps: float = 1e-8
) -> Weights:
    """Yield everybody's weights."""
    x = job.x
    m, v, server_e = job.zeros, job.zeros, job.zeros
    e = [job.zeros for _ in job.ranks]
    for t, lr in job.rounds():
        g = [job.gradient(i, t, x) for i in job.ranks]
        if t <= steps:
            mean_g = mean(g)
            m = beta * m + (1 - beta) * mean_g
            v = theta * v + (1 - theta) * (mean_g * mean_g)
            vhat = v * (1 / (1 - theta**t))
            root = np.sqrt(vhat) + eps
        else:
            if t == steps + 1:
                root = floored(job, root, v, 1 / (1 - theta**steps))
            said = []
            for i in job.ranks:
                c = (beta * m + (1 - beta) * g[i]) + e[i]
                d = job.up(c)
                e[i] = c - d
                said.append(d)
            z = mean(said) + server_e
            m = job.down(z)
            server_e = z - m
        x = x - lr / (1 - beta**t) * m / root
        yield x


def floored(job, root, v, scale):
    """Where v happened to be tiny, steps over it would be huge for ever."""
    root = root.copy()
    for at in job.tensors:
        mean_square = np.mean(v[at], dtype=np.float64) * np.float32(scale)
        root[at] = np.maximum(root[at], np.float32(FLOOR * mean_square**0.5))
    return root

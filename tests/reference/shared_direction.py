"""shared-direction: all hold a direction d in units of s, about sqrt(v), and say how to turn it.

In the first rounds and in every `period`-th the gradient itself is said, in more bits, without the
residuals: it refreshes v and s. Residuals are in units of s and change with it.
"""

import numpy as np

from reference.common import Job, Vector, Weights, mean

EPS, FLOOR = 1e-8, 1e-3


def train(job: Job, first: int, period: int, beta: float = 0.9, theta: float = 0.999) -> Weights:
    """Yield everybody's weights."""
    x = job.x
    v, s, d, server_e, last = job.zeros, job.zeros, job.zeros, job.zeros, 0
    e = [job.zeros for _ in job.ranks]
    for t, lr in job.rounds():
        g = [job.gradient(i, t, x) for i in job.ranks]
        if t <= first or t % period == 0:
            mean_g = job.down(mean([job.up(each, marked=True) for each in g]), marked=True)
            kept = theta ** (t - last)
            v = kept * v + (1 - kept) * (mean_g * mean_g)
            unit = unit_of(job, np.sqrt(v * (1 / (1 - theta**t))))
            factor = s / unit if last else np.ones_like(unit)
            e, server_e = [each * factor for each in e], server_e * factor
            d = beta * (d * factor) + (1 - beta) * (mean_g / unit)
            s, last = unit, t
        else:
            said = []
            for i in job.ranks:
                c = (beta * d + (1 - beta) * (g[i] / s)) + e[i]
                q = job.up(c)
                e[i] = c - q
                said.append(q)
            z = mean(said) + server_e
            d = job.down(z)
            server_e = z - d
        x = x - lr / (1 - beta**t) * d
        yield x


def unit_of(job: Job, root: Vector) -> Vector:
    """sqrt(v), but nowhere far below what is usual in its tensor."""
    unit = np.empty_like(root)
    for at in job.tensors:
        usual = np.mean(np.square(root[at]), dtype=np.float64) ** 0.5
        unit[at] = np.maximum(root[at] + EPS, np.float32(FLOOR * usual))
    return unit

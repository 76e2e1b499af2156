"""sto-sign-ef: the mean of noisy signs; what the way down loses waits at the server (2002.10940).

The workers feed nothing back: their signs are right on average.
"""

from reference.common import Job, Weights, mean
from reference.sto_sign import dithered


def train(job: Job) -> Weights:
    """Yield everybody's weights."""
    x, server_e = job.x, job.zeros
    for t, lr in job.rounds():
        said = [job.up(dithered(job, job.gradient(i, t, x), job.noise(i, t))) for i in job.ranks]
        z = -(lr * mean(said)) + server_e
        d = job.down(z)
        server_e = z - d
        x = x + d
        yield x

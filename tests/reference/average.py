"""average: the server returns the mean gradient, and each worker's own optimizer, here SGD, steps.

Both ways are quantized with feedback.
"""

from reference.common import Job, Weights, mean


def train(job: Job) -> Weights:
    """Yield every worker's weights."""
    x, server_e = job.x, job.zeros
    e = [job.zeros for _ in job.ranks]
    for t, lr in job.rounds():
        said = []
        for i in job.ranks:
            c = job.gradient(i, t, x) + e[i]
            d = job.up(c)
            e[i] = c - d
            said.append(d)
        z = mean(said) + server_e
        d = job.down(z)
        server_e = z - d
        x = x - lr * d
        yield x

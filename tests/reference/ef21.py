"""ef21: a worker says how its gradient differs from h, all it has said so far (2106.05203).

The server's h is the mean of theirs, and it steps along it.
"""

from reference.common import Job, Weights, mean


def train(job: Job) -> Weights:
    """Yield everybody's weights."""
    x, server_e, server_h = job.x, job.zeros, job.zeros
    h = [job.zeros for _ in job.ranks]
    for t, lr in job.rounds():
        said = []
        for i in job.ranks:
            d = job.up(job.gradient(i, t, x) - h[i])
            h[i] = h[i] + d
            said.append(d)
        server_h = server_h + mean(said)
        z = -(lr * server_h) + server_e
        d = job.down(z)
        server_e = z - d
        x = x + d
        yield x

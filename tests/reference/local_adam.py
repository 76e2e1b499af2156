"""local-adam: qadam-1bit, but a worker says how far `steps` steps of its own have led it."""

from reference.adam import Adam, CorrectedAdam
from reference.common import Job, Weights, mean


def train(job: Job, steps: int) -> Weights:
    """Yield everybody's weights."""
    x, server_e = job.x, job.zeros
    e = [job.zeros for _ in job.ranks]
    adam = [Adam() if job.workers == 1 else CorrectedAdam(job.workers) for _ in job.ranks]
    for t, lr in job.rounds():
        said = []
        for i in job.ranks:
            y = x
            for step in range((t - 1) * steps + 1, t * steps + 1):
                y = y - adam[i].step(job.gradient(i, step, y), lr)
            c = (x - y) + e[i]
            d = job.up(c)
            e[i] = c - d
            said.append(d)
        z = -mean(said) + server_e
        d = job.down(z)
        server_e = z - d
        x = x + d
        yield x

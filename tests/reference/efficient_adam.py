"""efficient-adam: workers say Adam's step; the server says how its weights change (2205.14473).

Both feed back what their codec leaves out, so all hold the same weights.
"""

from collections.abc import Callable

from reference.adam import Adam
from reference.common import Job, Weights, mean


def train(job: Job, make_adam: Callable[[], Adam] = Adam) -> Weights:
    """Yield everybody's weights."""
    x, server_e = job.x, job.zeros
    e = [job.zeros for _ in job.ranks]
    adam = [make_adam() for _ in job.ranks]
    for t, lr in job.rounds():
        said = []
        for i in job.ranks:
            c = adam[i].step(job.gradient(i, t, x), lr) + e[i]
            d = job.up(c)
            e[i] = c - d
            said.append(d)
        z = -mean(said) + server_e
        d = job.down(z)
        server_e = z - d
        x = x + d
        yield x

"""qadam: workers say Adam's step, with feedback; the server answers with its weights (2004.14180).

Gradients are taken at what the codec makes of the weights; the server's own stay as they are.
"""

from reference.adam import Adam
from reference.common import Job, Weights, mean


def train(job: Job) -> Weights:
    """Yield the server's weights."""
    x = job.x
    e = [job.zeros for _ in job.ranks]
    adam = [Adam() for _ in job.ranks]
    for t, lr in job.rounds():
        seen = job.down(x)
        said = []
        for i in job.ranks:
            c = adam[i].step(job.gradient(i, t, seen), lr) + e[i]
            d = job.up(c)
            e[i] = c - d
            said.append(d)
        x = x - mean(said)
        yield x

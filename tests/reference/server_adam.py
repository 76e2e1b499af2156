"""server-adam: workers say gradients, the server steps Adam and says how its weights change."""

from reference.adam import Adam
from reference.common import Job, Weights, mean


def train(job: Job, theta: float = 0.999, *, amsgrad: bool = False) -> Weights:
    """Yield everybody's weights."""
    x, server_e = job.x, job.zeros
    e = [job.zeros for _ in job.ranks]
    adam = Adam(theta=theta, amsgrad=amsgrad)
    for t, lr in job.rounds():
        said = []
        for i in job.ranks:
            c = job.gradient(i, t, x) + e[i]
            d = job.up(c)
            e[i] = c - d
            said.append(d)
        z = -adam.step(mean(said), lr) + server_e
        d = job.down(z)
        server_e = z - d
        x = x + d
        yield x

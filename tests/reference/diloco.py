"""diloco: how far `steps` Adam steps have led workers is a gradient for the server (2311.08105).

The server's is SGD with Nesterov momentum, at a rate of its own.
"""

from reference.adam import Adam
from reference.common import Job, Weights, mean


def train(job: Job, steps: int, rate: float = 0.7, mu: float = 0.9) -> Weights:
    """Yield everybody's weights."""
    x, server_e, velocity = job.x, job.zeros, job.zeros
    e = [job.zeros for _ in job.ranks]
    adam = [Adam() for _ in job.ranks]
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
        g = mean(said)
        velocity = mu * velocity + g
        z = -(rate * (g + mu * velocity)) + server_e
        d = job.down(z)
        server_e = z - d
        x = x + d
        yield x

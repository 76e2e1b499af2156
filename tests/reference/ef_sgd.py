"""ef-sgd: SGD in one bit each way with feedback on both sides (1901.09847).

The residual waits in gradients, and counts with the rate of its own step: when the rate changes it
is rescaled (1905.10936).
"""

from reference.common import Job, Weights, mean


def train(job: Job, beta: float = 0.0) -> Weights:
    """Yield everybody's weights. beta: of a worker's Nesterov momentum; 0 is none."""
    x, server_e, before = job.x, job.zeros, job.rates[0]
    e = [job.zeros for _ in job.ranks]
    m = [job.zeros for _ in job.ranks]
    for t, lr in job.rounds():
        said = []
        for i in job.ranks:
            g = job.gradient(i, t, x)
            m[i] = beta * m[i] + g
            c = (g + beta * m[i]) + e[i] * (before / lr)
            d = job.up(c)
            e[i] = c - d
            said.append(d)
        before = lr
        z = -(lr * mean(said)) + server_e
        d = job.down(z)
        server_e = z - d
        x = x + d
        yield x

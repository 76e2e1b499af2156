"""sign-majority: the sign of each worker's momentum, and the majority's comes back (1810.05291)."""

from reference.common import Job, Weights, majority


def train(job: Job, beta: float = 0.9) -> Weights:
    """Yield everybody's weights."""
    x = job.x
    m = [job.zeros for _ in job.ranks]
    for t, lr in job.rounds():
        for i in job.ranks:
            m[i] = beta * m[i] + (1 - beta) * job.gradient(i, t, x)
        x = x - lr * majority(m)
        yield x

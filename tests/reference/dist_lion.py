"""dist-lion: Lion on each worker, and the majority's sign comes back (2404.00438).

One average of the gradients is said, another one is kept.
"""

from reference.common import Job, Weights, majority


def train(job: Job, beta1: float = 0.9, beta2: float = 0.99) -> Weights:
    """Yield everybody's weights."""
    x = job.x
    m = [job.zeros for _ in job.ranks]
    for t, lr in job.rounds():
        said = []
        for i in job.ranks:
            g = job.gradient(i, t, x)
            said.append(beta1 * m[i] + (1 - beta1) * g)
            m[i] = beta2 * m[i] + (1 - beta2) * g
        x = x - lr * majority(said)
        yield x

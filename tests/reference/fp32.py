"""fp32: Adam on the mean gradient. Nothing is quantized: job.up and job.down are not asked."""

from reference.adam import Adam
from reference.common import Job, Weights, mean


def train(job: Job) -> Weights:
    """Yield everybody's weights."""
    x, adam = job.x, Adam()
    for t, lr in job.rounds():
        x = x - adam.step(mean([job.gradient(i, t, x) for i in job.ranks]), lr)
        yield x

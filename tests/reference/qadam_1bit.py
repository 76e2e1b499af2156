"""qadam-1bit: efficient-adam in one bit, with each worker's v corrected to that of all."""

from reference.adam import Adam, CorrectedAdam
from reference.common import Job, Weights
from reference.efficient_adam import train as train_efficient


def train(job: Job) -> Weights:
    """Yield everybody's weights."""
    alone = job.workers == 1  # then its v is that of all
    return train_efficient(job, Adam if alone else lambda: CorrectedAdam(job.workers))

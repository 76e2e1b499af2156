"""dist-ef-sgdm: ef-sgd with Nesterov momentum on each worker (1905.10936)."""

from reference.common import Job, Weights
from reference.ef_sgd import train as train_ef_sgd


def train(job: Job) -> Weights:
    """Yield everybody's weights."""
    return train_ef_sgd(job, beta=0.9)

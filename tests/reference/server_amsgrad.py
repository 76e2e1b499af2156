"""server-amsgrad: server-adam that divides by the largest v so far (COMP-AMS, 2205.05632)."""

from reference.common import Job, Weights
from reference.server_adam import train as train_adam


def train(job: Job, theta: float = 0.999) -> Weights:
    """Yield everybody's weights."""
    return train_adam(job, theta, amsgrad=True)

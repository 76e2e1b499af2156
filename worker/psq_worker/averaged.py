"""A task with the recipe "average": torch's Adam, one on every worker, takes the steps.

The recipe brings the mean gradient back and leaves the step to an optimizer of the user's own. A
task has none, so it gets the one that its learning rate is meant for, with the job's schedule; a
simulated job does the same.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Final

import torch
from torch import nn

from psq.torch import StepReport, Worker
from psq_worker.job import Job

__all__ = ["AdamSteps", "own_adam"]


def own_adam(model: nn.Module, job: Job) -> torch.optim.Optimizer:
    """What steps on every worker alike: torch's Adam as it comes, at the job's first rate."""
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=job.lr)


class AdamSteps:
    """A worker whose steps an optimizer takes, which is told the job's rate before each.

    Args:
        worker: joined, with `optimizer`.
        optimizer: as `own_adam` makes it.
        job: says the rates.
    """

    def __init__(self, worker: Worker, optimizer: torch.optim.Optimizer, job: Job) -> None:
        self._worker: Final = worker
        self._optimizer: Final = optimizer
        self._job: Final = job
        self.rank: Final = worker.rank
        self.world_size: Final = worker.world_size
        self.data_rank: Final = worker.data_rank
        self.data_world_size: Final = worker.data_world_size

    def replica(self) -> AbstractContextManager[None]:
        """The worker's."""
        return self._worker.replica()

    def step(self, loss: float | None = None, samples: int = 0) -> StepReport:
        """The worker's step, at this step's learning rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._job.lr_at(self._worker.steps)
        return self._worker.step(loss=loss, samples=samples)

"""The yardstick: the same job in one process with torch's own Adam, nothing quantized or sent.

The loop, the initial weights, the samples of every global batch and the learning rates are those of
the cluster, so any difference in the score is the cluster's doing. The bytes reported are what one
worker of the cluster would send and receive with dense fp32 gradients and weights, no headers.
"""

from __future__ import annotations

import dataclasses
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch import nn

from psq.adam_text import missing_in_torch
from psq.errors import ConfigError, UsageError
from psq.recipe import AdamConfig, schedule_value
from psq.torch import StepReport
from psq_worker.job import History, Job, OnRecord
from psq_worker.loop import train
from psq_worker.tasks import Task, check_model

__all__ = ["PlainAdam", "torch_adam", "train_baseline"]

FP32_BYTES: Final = 4


def train_baseline(
    task: Task, job: Job, *, world_size: int, on_record: OnRecord | None = None
) -> History:
    """Trains what `world_size` workers would train, on the global batch.

    Args:
        task: gives model, batches, loss and scores.
        job: as for the cluster, from step 0 on; `batch_size` is per worker, so a batch here holds
            `world_size` times as many samples.
        world_size: workers of the cluster compared with.
        on_record: called with each record as it is made.

    Returns:
        The history, with the bytes of dense fp32.

    Raises:
        ConfigError: the model has nothing to train.
        UsageError: the job starts later than at step 0: plain Adam's moments are kept nowhere.
    """
    if job.start_step:
        msg = f"the baseline starts at step 0, the job at step {job.start_step}"
        raise UsageError(msg)
    model = task.model(job.seed)
    check_model(task, model)
    whole = dataclasses.replace(job, batch_size=world_size * job.batch_size)
    history = train(task, model, PlainAdam(model, job), whole, on_record)
    return dataclasses.replace(history, world_size=world_size)


def torch_adam(
    parameters: list[nn.Parameter], lr: float, adam: AdamConfig
) -> torch.optim.Optimizer:
    """Torch's own Adam or AdamW with these settings.

    Raises:
        ConfigError: torch has no such setting; it is named.
    """
    missing = missing_in_torch(adam)
    if missing:
        msg = f"adam: torch.optim.Adam has no {missing}"
        raise ConfigError(msg)
    kind = torch.optim.AdamW if adam.decoupled and adam.weight_decay else torch.optim.Adam
    return kind(
        parameters,
        lr=lr,
        betas=(schedule_value(adam.beta, 1), schedule_value(adam.theta, 1)),
        eps=adam.eps,
        weight_decay=adam.weight_decay,
        amsgrad=adam.amsgrad,
    )


class PlainAdam:
    """`torch.optim.Adam` behind the interface of a worker: the only rank of a job of one."""

    rank: Final = 0
    world_size: Final = 1
    data_rank: Final = 0
    data_world_size: Final = 1

    def __init__(self, model: nn.Module, job: Job, adam: AdamConfig | None = None) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer: Final = torch_adam(trained, job.lr, adam or AdamConfig())
        self._job: Final = job
        self._dense_bytes: Final = FP32_BYTES * sum(parameter.numel() for parameter in trained)
        self._done = job.start_step
        self._since = time.perf_counter()

    def replica(self) -> AbstractContextManager[None]:
        """The model has the weights always."""
        return nullcontext()

    def step(self, loss: float | None = None, samples: int = 0) -> StepReport:  # noqa: ARG002 - a worker's signature
        """Adam's step with this step's learning rate; the gradients are cleared."""
        step, lr = self._done, self._job.lr_at(self._done)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._done += 1
        now = time.perf_counter()
        compute_s, self._since = now - self._since, now
        return StepReport(
            step=step,
            version=self._done,
            applied=True,
            lr=lr,
            compute_s=compute_s,
            sent_bytes=self._dense_bytes,
            received_bytes=self._dense_bytes,
        )

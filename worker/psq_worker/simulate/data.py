"""Which samples a virtual worker sees, and in which rounds it takes part.

As they are, tasks give each rank its slice of each global batch: all workers draw from the same
samples. Non-iid data is made of these: one pool of samples is drawn from the task, and the samples
of each class are dealt to the workers in proportions drawn from a Dirichlet distribution. A small
alpha gives each worker few classes and very different numbers of samples, a large one is iid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from psq.errors import ConfigError
from psq_worker.job import Job
from psq_worker.tasks import Batch, Task
from psq_worker.tasks.base import EpochOrder

__all__ = ["Dirichlet", "Samples", "TaskSamples", "takes_part"]

Indices = NDArray[np.int64]
POOL: Final = 10_000
"""Samples that non-iid data is made of, at least `LEAST_OF_WORKER` for each worker."""
LEAST_OF_WORKER: Final = 20
_SPLIT: Final = 0x5B11  # what tells this random stream from others of the same seed
_ROUNDS: Final = 0x4EA7


class Samples(Protocol):
    """Gives each worker its batches."""

    def batches(self, rank: int, start_step: int) -> Iterator[Batch]:
        """This rank's batches from a step on, without end."""
        ...


class TaskSamples:
    """The task's own order: what processes of a cluster see."""

    def __init__(self, task: Task, job: Job, workers: int) -> None:
        self._task, self._job, self._workers = task, job, workers

    def batches(self, rank: int, start_step: int) -> Iterator[Batch]:
        """See `Samples`."""
        return self._task.batches(
            rank=rank,
            world_size=self._workers,
            batch_size=self._job.batch_size,
            seed=self._job.seed,
            start_step=start_step,
        )


class Dirichlet:
    """See the module's docstring.

    Args:
        task: gives the pool: its batches must be (inputs, labels), labels i64[n].
        job: batch size and seed.
        workers: how many.
        alpha: of the distribution, above 0.

    Raises:
        ConfigError: alpha is not above 0, or the task's batches have no class labels.
    """

    def __init__(self, task: Task, job: Job, workers: int, alpha: float) -> None:
        if not (math.isfinite(alpha) and alpha > 0.0):
            msg = f"non-iid: the alpha of a Dirichlet distribution is above 0, got {alpha!r}"
            raise ConfigError(msg)
        self._job = job
        size = max(POOL, workers * LEAST_OF_WORKER)
        pool = next(iter(task.batches(rank=0, world_size=1, batch_size=size, seed=job.seed)))
        self._inputs, self._labels = _labelled(task, pool)
        self.parts = _deal(self._labels.numpy(), workers, alpha, job.seed)

    def batches(self, rank: int, start_step: int) -> Iterator[Batch]:
        """See `Samples`: this rank's own samples, in an order that is new in each epoch."""
        mine, size = self.parts[rank], self._job.batch_size
        order = EpochOrder(len(mine), self._job.seed + rank)
        step = start_step
        while True:
            chosen = torch.from_numpy(mine[order.take(step * size, size)])
            yield self._inputs[chosen], self._labels[chosen]
            step += 1


def _labelled(task: Task, pool: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    match pool:
        case (torch.Tensor() as inputs, torch.Tensor() as labels) if (
            labels.dim() == 1 and labels.dtype == torch.int64 and len(inputs) == len(labels)
        ):
            return inputs, labels
    msg = (
        f"non-iid: task {task.name!r} has no class labels: its batches must be (inputs, labels) "
        "with labels i64[n]"
    )
    raise ConfigError(msg)


def _deal(labels: NDArray[np.int64], workers: int, alpha: float, seed: int) -> list[Indices]:
    """Which samples each worker has: at least one."""
    rng = np.random.default_rng([seed, _SPLIT])
    parts: list[list[Indices]] = [[] for _ in range(workers)]
    for label in np.unique(labels):
        places = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(workers, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(places)).astype(np.int64)
        for part, piece in zip(parts, np.split(places, cuts), strict=True):
            part.append(piece)
    dealt = [np.concatenate(part) for part in parts]
    return [part if len(part) else rng.integers(0, len(labels), 1) for part in dealt]


def takes_part(rank: int, round_: int, *, share: float, workers: int, seed: int) -> bool:
    """Whether a rank is among those drawn for a round: a share of all, rounded up."""
    if share >= 1.0:
        return True
    count = max(1, math.ceil(share * workers))
    drawn = np.random.default_rng([seed, _ROUNDS, round_]).permutation(workers)[:count]
    return bool((drawn == rank).any())

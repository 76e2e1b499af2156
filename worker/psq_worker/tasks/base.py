"""What a task is: a model, its loss, its data in a fixed order, and a score.

The order of samples is the heart of it. One *global batch* of `world_size * batch_size` samples
makes one step; which samples global batch g holds depends on the seed and on g alone, and rank i
takes the i-th slice of it. So the same job runs on one process or on eight, can go on from any
step, and can be compared with plain training sample for sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from psq.errors import UsageError

__all__ = [
    "Batch",
    "EpochOrder",
    "JobDefaults",
    "Schedule",
    "Task",
    "job_defaults",
    "seeded",
    "slice_of",
]

Schedule = Literal["constant", "linear", "cosine"]
Batch = Any
"""What `Task.batches` yields and `Task.loss` takes; the loop only passes it on."""


@dataclass(frozen=True, slots=True)
class JobDefaults:
    """Settings with which a task trains well; a command line overrides each.

    Attributes:
        steps: global batches to train on.
        batch_size: samples per worker and step, with two workers.
        lr: Adam's learning rate at the start.
        schedule: "constant", or "linear" or "cosine" down to zero at the last step.
        eval_every: steps between evaluations.
    """

    steps: int = 1_000
    batch_size: int = 32
    lr: float = 1e-3
    schedule: Schedule = "constant"
    eval_every: int = 100


@runtime_checkable
class Task(Protocol):
    """A job that psq can train. Anything with these attributes is one; no base class is needed.

    `defaults: JobDefaults` may be given besides, and `description: str`, which is printed before
    training.
    """

    @property
    def name(self) -> str:
        """Short name for tables and files."""
        ...

    @property
    def metric(self) -> str:
        """The entry of `evaluate`'s result that counts, such as "accuracy"."""
        ...

    def model(self, seed: int) -> nn.Module:
        """A new model; the same seed gives the same weights, whatever was drawn before."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The mean loss of a batch, a scalar to call `backward` on."""
        ...

    def batches(
        self, *, rank: int, world_size: int, batch_size: int, seed: int, start_step: int = 0
    ) -> Iterator[Batch]:
        """This rank's slices of global batch `start_step` and all that follow, without end."""
        ...

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """Scores on data not trained on, `metric` among them; the model stays in training mode."""
        ...


def job_defaults(task: Task) -> JobDefaults:
    """The task's own settings, or the general ones."""
    defaults = getattr(task, "defaults", None)
    return defaults if isinstance(defaults, JobDefaults) else JobDefaults()


class EpochOrder:
    """The endless order in which samples are drawn: each epoch is a new permutation of all of them.

    Global batches may straddle epochs, so no sample is dropped and any batch size fits.
    """

    def __init__(self, samples: int, seed: int) -> None:
        if samples < 1:
            msg = f"an order needs at least one sample, got {samples}"
            raise UsageError(msg)
        self._samples: Final = samples
        self._seed: Final = seed
        self._epoch = -1
        self._permutation: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def take(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Sample numbers at places [start, start + count) of the order: i64[count]."""
        places = np.arange(start, start + count)
        epochs, offsets = np.divmod(places, self._samples)
        out = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self._permute(int(epoch))[offsets[here]]
        return out

    def _permute(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self._seed, epoch]).permutation(
                self._samples
            )
            self._epoch = epoch
        return self._permutation


def slice_of(*, rank: int, world_size: int, batch_size: int) -> slice:
    """Rank's part of a global batch.

    Raises:
        UsageError: a count is not positive, or the rank is outside [0, world_size).
    """
    if world_size < 1 or batch_size < 1:
        msg = f"world size {world_size} and batch size {batch_size} must both be at least 1"
        raise UsageError(msg)
    if not 0 <= rank < world_size:
        msg = f"rank {rank} is outside 0..{world_size - 1} of a job with {world_size} workers"
        raise UsageError(msg)
    return slice(rank * batch_size, (rank + 1) * batch_size)


class seeded:  # noqa: N801 - reads as a statement: with seeded(7): ...
    """Context with torch's CPU random numbers started from a seed; the state outside is kept.

    Only the CPU's generator is used, so the weights do not depend on the machine's devices.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._outside = torch.get_rng_state()

    def __enter__(self) -> None:
        self._outside = torch.get_rng_state()
        torch.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self._outside)

"""What is trained for how long, and what was seen on the way: plain values, no training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch

from psq.errors import ConfigError
from psq.schedules import parse_schedule, schedule_value
from psq_worker.tasks import Schedule, Task, job_defaults

__all__ = ["History", "Job", "LossMeter", "OnRecord", "Record", "job_for"]


@dataclass(frozen=True, slots=True)
class Job:
    """One training run.

    Attributes:
        steps: the step to train up to, counted from 0 and not from `start_step`.
        batch_size: samples per worker and step.
        lr: learning rate at the start.
        schedule: how the learning rate goes on from there: "constant", "linear" or "cosine" down
            to 0 at the last step, or a factor of t = step + 1 as a text, see
            `psq.schedules.parse_schedule`.
        seed: of the initial weights and of the order of samples.
        eval_every: steps between evaluations; the last step is always evaluated.
        start_step: global batches already done; 0 for a new run.
        round_steps: steps from one round to the next: replicas are equal after these.
        threads: CPU threads of this process.
    """

    steps: int
    batch_size: int
    lr: float
    schedule: str = "constant"
    seed: int = 0
    eval_every: int = 100
    start_step: int = 0
    round_steps: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        """Counts are positive, the learning rate is a positive number."""
        for name in ("steps", "batch_size", "eval_every", "round_steps", "threads"):
            if getattr(self, name) < 1:
                msg = f"job: {name} must be at least 1, got {getattr(self, name)}"
                raise ConfigError(msg)
        if not 0 <= self.start_step <= self.steps:
            msg = f"job: start_step must lie in 0..{self.steps}, got {self.start_step}"
            raise ConfigError(msg)
        if not (math.isfinite(self.lr) and self.lr > 0.0):
            msg = f"job: lr must be a number above 0, got {self.lr!r}"
            raise ConfigError(msg)
        if self.schedule not in get_args(Schedule) and parse_schedule(self.schedule) is None:
            words = ", ".join(get_args(Schedule))
            msg = f"job: schedule must be {words}, or a factor, got {self.schedule!r}"
            raise ConfigError(msg)
        for step in (0, self.steps - 1):
            self.lr_at(step)

    def lr_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0.

        Raises:
            ConfigError: a factor that is no number there, or below 0.
        """
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "linear":
            return self.lr * max(0.0, 1.0 - step / self.steps)
        if self.schedule == "cosine":
            return self.lr * _half_cosine(min(1.0, step / self.steps))
        factor = parse_schedule(self.schedule)
        assert factor is not None  # noqa: S101 - looked at when the job was made
        rate = self.lr * schedule_value(factor, step + 1)
        if not (math.isfinite(rate) and rate >= 0.0):
            msg = f"schedule {self.schedule} asks for the learning rate {rate!r} in step {step}"
            raise ConfigError(msg)
        return rate

    def is_evaluated(self, done: int) -> bool:
        """Whether scores are taken once `done` steps are done: with the round that makes it due."""
        if done == self.steps:
            return True
        due = done // self.eval_every > (done - self.round_steps) // self.eval_every
        return due and done % self.round_steps == 0

    def in_rounds(self, round_steps: int) -> Job:
        """The same job where a round takes so many steps: it ends with one, a little later."""
        steps = -(-self.steps // round_steps) * round_steps
        return dataclasses.replace(self, steps=steps, round_steps=round_steps)


def _half_cosine(share: float) -> float:
    """(1 + cos(pi share)) / 2, by sums and products alone: all ranks have to name the same rate.

    A machine's own cosine may differ from another's in the last bit. The error is below 1e-15.
    """
    square = share * share * math.pi * math.pi / 4.0
    cosine = 1.0
    for k in range(20, 0, -2):
        cosine = 1.0 - square * cosine / (k * (k - 1))
    return cosine * cosine


def job_for(task: Task, **chosen: Any) -> Job:
    """The task's own settings with those replaced that were chosen; None means not chosen.

    Args:
        task: whose defaults to start from.
        chosen: any field of `Job`.
    """
    settings = dataclasses.asdict(job_defaults(task))
    settings.update({name: value for name, value in chosen.items() if value is not None})
    return Job(**settings)


@dataclass(frozen=True, slots=True)
class Record:
    """What was known when `step` steps were done.

    Attributes:
        step: steps done.
        loss: mean training loss of this process's samples since the record before.
        scores: what `Task.evaluate` returned; empty on ranks other than 0.
        sent_bytes: bytes this process has sent, since the start, headers included.
        received_bytes: bytes it has received.
        seconds: time spent training since the start, evaluations not counted.
    """

    step: int
    loss: float
    scores: Mapping[str, float]
    sent_bytes: int
    received_bytes: int
    seconds: float


OnRecord = Callable[[Record], None]


@dataclass(frozen=True, slots=True)
class History:
    """A whole run: its records in order, and where the time went.

    Attributes:
        task: the task's name.
        metric: the score that counts.
        numel: trained parameters.
        world_size: workers of the job.
        records: the last one is of the last step; none where no step was left to make.
        phases_s: seconds in each of `psq_worker.events.PHASES`, summed over the steps.
        skipped: steps this process contributed nothing to, because of non-finite gradients.
    """

    task: str
    metric: str
    numel: int
    world_size: int
    records: tuple[Record, ...]
    phases_s: Mapping[str, float]
    skipped: int = 0

    @property
    def final(self) -> float | None:
        """The score that counts after the last step; None where nothing was evaluated."""
        return self.records[-1].scores.get(self.metric) if self.records else None

    def to_plain(self) -> dict[str, Any]:
        """Maps, lists, strings and numbers only, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> History:
        """Inverse of `to_plain`."""
        records = tuple(Record(**record) for record in plain["records"])
        return cls(**{**plain, "records": records})


class LossMeter:
    """Mean of the losses since it was last read."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0

    def add(self, loss: torch.Tensor) -> float:
        """Counts one loss and returns it as a number."""
        value = float(loss.detach())
        self._sum += value
        self._count += 1
        return value

    def take(self) -> float:
        """The mean since the last call; NaN if there was no loss."""
        mean = self._sum / self._count if self._count else math.nan
        self._sum, self._count = 0.0, 0
        return mean

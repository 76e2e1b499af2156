"""The training loop of `psq-worker --task`: what a user's own script would do, written once.

Every rank draws its slice of each global batch, computes gradients and calls the worker's `step`;
rank 0 evaluates every so often. The loop never touches the network, the weights or the optimizer:
those are the worker's. Evaluations happen between rounds, when all replicas are equal.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from itertools import islice
from typing import Protocol

import torch
from torch import nn

from psq.torch import LOCAL, StepReport
from psq_worker.events import PHASES
from psq_worker.job import History, Job, LossMeter, OnRecord, Record
from psq_worker.tasks import Task, check_model

__all__ = ["Stepper", "train"]


class Stepper(Protocol):
    """What the loop needs of a `psq.torch.Worker`."""

    @property
    def rank(self) -> int:
        """This worker's number."""
        ...

    @property
    def world_size(self) -> int:
        """How many workers the job has."""
        ...

    @property
    def data_rank(self) -> int:
        """Whose data this worker is to train on."""
        ...

    @property
    def data_world_size(self) -> int:
        """How many workers have data of their own."""
        ...

    def step(self, loss: float | None = None, samples: int = 0) -> StepReport:
        """Hands the gradients over, brings the new weights, clears the gradients."""
        ...

    def replica(self) -> AbstractContextManager[None]:
        """A block in which the model has the job's weights, which it may have left."""
        ...


def train(
    task: Task, model: nn.Module, worker: Stepper, job: Job, on_record: OnRecord | None = None
) -> History:
    """Trains from `job.start_step` to `job.steps`.

    Args:
        task: gives batches, loss and scores.
        model: the model that `worker` was made with.
        worker: a `psq.torch.Worker`, joined; its learning rate should be `job.lr_at`.
        job: how long, on what.
        on_record: called with each record as it is made.

    Returns:
        The history; scores are there on rank 0 only.

    Raises:
        ConfigError: the model has nothing to train.
        RemoteError: whatever the worker meets on the way.
    """
    check_model(task, model)
    torch.set_num_threads(job.threads)
    batches = task.batches(
        rank=worker.data_rank,
        world_size=worker.data_world_size,
        batch_size=job.batch_size,
        seed=job.seed,
        start_step=job.start_step,
    )
    trace = _Trace(task, model, job, worker=worker, on_record=on_record)
    for batch in islice(batches, job.steps - job.start_step):
        loss = task.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        report = worker.step(loss=trace.losses.add(loss), samples=job.batch_size)
        trace.add(report)
    return trace.history(worker.world_size)


class _Trace:
    """Adds up the steps' reports and makes the records."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        job: Job,
        *,
        worker: Stepper,
        on_record: OnRecord | None,
    ) -> None:
        self._task = task
        self._model = model
        self._job = job
        self._worker = worker
        self._on_record = on_record
        self._records: list[Record] = []
        self._phases_s = dict.fromkeys(PHASES, 0.0)
        self._done = job.start_step
        self._skipped = 0
        self._sent_bytes = 0
        self._received_bytes = 0
        self._seconds = 0.0
        self._since = time.perf_counter()
        self.losses = LossMeter()

    def add(self, report: StepReport) -> None:
        """Counts one step, and makes a record when one is due."""
        self._done += 1
        self._skipped += not report.applied and report.reason != LOCAL
        self._sent_bytes += report.sent_bytes
        self._received_bytes += report.received_bytes
        for phase in PHASES:
            self._phases_s[phase] += getattr(report, f"{phase}_s")
        if self._job.is_evaluated(self._done):
            self._record()

    def history(self, world_size: int) -> History:
        """Everything seen."""
        return History(
            task=self._task.name,
            metric=self._task.metric,
            numel=sum(p.numel() for p in self._model.parameters() if p.requires_grad),
            world_size=world_size,
            records=tuple(self._records),
            phases_s=self._phases_s,
            skipped=self._skipped,
        )

    def _record(self) -> None:
        self._seconds += time.perf_counter() - self._since
        record = Record(
            step=self._done,
            loss=self.losses.take(),
            scores=self._scores() if self._worker.rank == 0 else {},
            sent_bytes=self._sent_bytes,
            received_bytes=self._received_bytes,
            seconds=self._seconds,
        )
        self._records.append(record)
        if self._on_record is not None:
            self._on_record(record)
        self._since = time.perf_counter()

    def _scores(self) -> Mapping[str, float]:
        with self._worker.replica():
            return self._task.evaluate(self._model)

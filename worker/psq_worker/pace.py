"""A worker's own pace: where rounds are not everybody's, a schedule follows the worker's steps.

Under bsp a version is a step of every worker, so `Worker.steps` says how far a job is. Under ssp
and asp each push may make a version of its own: W workers are through a schedule of so many
versions after a W-th of their steps, and a rate that falls to 0 would end the job there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Final

from psq.clock import parse_consistency
from psq.plan import Plan
from psq.torch import StepReport, Worker
from psq_worker.job import Job

__all__ = ["OwnPace", "is_own", "steps_behind"]


def is_own(plan: Plan) -> bool:
    """Whether each worker of a job goes at a pace of its own."""
    return parse_consistency(plan.consistency).max_staleness != 0


def steps_behind(plan: Plan, steps: int) -> int:
    """How many steps of a worker a job has behind it, about, after so many of `Worker.steps`."""
    return steps // plan.world_size if is_own(plan) else steps


class OwnPace:
    """A worker that is told the job's rate for its own next step.

    Args:
        worker: joined.
        job: says the rates, and at which step the worker begins.
    """

    def __init__(self, worker: Worker, job: Job) -> None:
        self._worker: Final = worker
        self._job: Final = job
        self._done = job.start_step
        self.rank: Final = worker.rank
        self.world_size: Final = worker.world_size
        self.data_rank: Final = worker.data_rank
        self.data_world_size: Final = worker.data_world_size
        self._set_rate()

    def replica(self) -> AbstractContextManager[None]:
        """The worker's."""
        return self._worker.replica()

    def step(self, loss: float | None = None, samples: int = 0) -> StepReport:
        """The worker's step; the next one's rate is set, for hooks may push before it is called."""
        report = self._worker.step(loss=loss, samples=samples)
        self._done += 1
        self._set_rate()
        return report

    def _set_rate(self) -> None:
        self._worker.lr = self._job.lr_at(min(self._done, self._job.steps - 1))

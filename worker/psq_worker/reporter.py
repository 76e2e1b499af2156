"""A worker's side of the events: adds up what each step reports and says it now and then.

`psq.torch.observers` calls it for a user's script; the baseline's stepper is wrapped to call it. It
never touches weights or the network; the clock and the place where events go are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from psq.torch import LOCAL, SAT_OUT
from psq_worker.events import PHASES, Evaluation, Event, Progress, Started, Summary

__all__ = ["Reporter", "StepNumbers"]


class StepNumbers(Protocol):
    """What is read of a step's report; bytes and seconds are of this step alone."""

    @property
    def applied(self) -> bool:
        """Whether the gradient was used, all of it."""
        ...

    @property
    def reason(self) -> str:
        """Why it was not; LOCAL where a later step says it."""
        ...

    @property
    def sent_bytes(self) -> int:
        """Bytes sent during the step."""
        ...

    @property
    def received_bytes(self) -> int:
        """Bytes received during the step."""
        ...

    @property
    def payload_bytes(self) -> int:
        """Of what was said in the step, without headers."""
        ...

    @property
    def said_numel(self) -> int:
        """How many values that says."""
        ...

    @property
    def left_out(self) -> tuple[int, ...]:
        """The shards whose gradients were not finite."""
        ...

    @property
    def staleness(self) -> int:
        """Rounds that others were ahead when the gradient counted."""
        ...

    @property
    def exposed_s(self) -> float:
        """Waiting that no computing hid."""
        ...


@dataclass(slots=True)
class _Totals:
    step: int = 0
    samples: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    payload_bytes: int = 0
    said_numel: int = 0
    skipped: int = 0
    rejected: int = 0
    timed_steps: int = 0
    exposed_s: float = 0.0
    staleness_sum: int = 0
    staleness_max: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    loss: float | None = None


class Reporter:
    """Counts steps and emits events.

    Args:
        emit: where events go.
        every_s: least time between two progress events; the last step always makes one.
        clock: monotonic seconds.
        evaluates_after: whether this process evaluates once so many steps are done.
        started: who this is; its `steps` is 0 where nobody knows how long a script will train.
    """

    def __init__(
        self,
        emit: Callable[[Event], None],
        started: Started,
        *,
        every_s: float,
        clock: Callable[[], float],
        evaluates_after: Callable[[int], bool] = lambda _: False,
    ) -> None:
        self._emit = emit
        self._started = started
        self._every_s = every_s
        self._clock = clock
        self._evaluates_after = evaluates_after
        self._totals = _Totals()
        self._phases_s = dict.fromkeys(PHASES, 0.0)
        self._since_s = clock()
        self._said_s = -math.inf
        self._typical = False  # the first step pays for warming up
        self._metric = ""
        self._scores: dict[str, float] = {}
        emit(started)

    def step(self, numbers: StepNumbers, loss: float | None, samples: int) -> None:
        """One step was made."""
        totals = self._totals
        totals.step += 1
        totals.samples += samples
        totals.sent_bytes += numbers.sent_bytes
        totals.received_bytes += numbers.received_bytes
        totals.payload_bytes += numbers.payload_bytes
        totals.said_numel += numbers.said_numel
        totals.skipped += bool(numbers.left_out)
        refused = not numbers.applied and numbers.reason not in {LOCAL, SAT_OUT}
        totals.rejected += refused and not numbers.left_out
        totals.staleness_sum += numbers.staleness
        totals.staleness_max = max(totals.staleness_max, numbers.staleness)
        if loss is not None and math.isfinite(loss):
            totals.loss_sum += loss
            totals.loss_count += 1
        if self._typical:
            totals.timed_steps += 1
            totals.exposed_s += numbers.exposed_s
            for phase in PHASES:
                self._phases_s[phase] += getattr(numbers, f"{phase}_s")
        self._typical = True
        now_s = self._clock()
        pauses = self._evaluates_after(totals.step) or totals.step == self._started.steps
        if pauses or now_s - self._said_s >= self._every_s:
            self._said_s = now_s
            self._emit(self._progress())

    def evaluated(self, metric: str, scores: Mapping[str, float]) -> None:
        """The model was scored after the last step; the next step's times are not counted."""
        self._typical = False
        self._said_s = self._clock()  # else the pause itself would be a reason to speak
        self._metric, self._scores = metric, dict(scores)
        if scores:
            self._emit(
                Evaluation(
                    rank=self._started.rank,
                    step=self._totals.step,
                    metric=metric,
                    scores=self._scores,
                    sent_bytes=self._totals.sent_bytes,
                    received_bytes=self._totals.received_bytes,
                    elapsed_s=self._clock() - self._since_s,
                )
            )

    def summary(self) -> Summary:
        """Everything counted so far."""
        return Summary(
            **self._counts(),
            world_size=self._started.world_size,
            task=self._started.task,
            recipe=self._started.recipe,
            consistency=self._started.consistency,
            metric=self._metric,
            scores=self._scores,
        )

    def _progress(self) -> Progress:
        totals = self._totals
        progress = Progress(
            **self._counts(),
            steps=self._started.steps,
            doing="evaluating" if self._evaluates_after(totals.step) else "training",
        )
        totals.loss_sum, totals.loss_count = 0.0, 0
        return progress

    def _counts(self) -> dict[str, Any]:
        """The fields of `Counts`, as things are now."""
        totals = self._totals
        return {
            "rank": self._started.rank,
            "step": totals.step,
            "loss": self._mean_loss(),
            "samples": totals.samples,
            "elapsed_s": self._clock() - self._since_s,
            "sent_bytes": totals.sent_bytes,
            "received_bytes": totals.received_bytes,
            "payload_bytes": totals.payload_bytes,
            "said_numel": totals.said_numel,
            "numel": self._started.numel,
            "skipped": totals.skipped,
            "rejected": totals.rejected,
            "timed_steps": totals.timed_steps,
            "phases_s": dict(self._phases_s),
            "exposed_s": totals.exposed_s,
            "staleness_sum": totals.staleness_sum,
            "staleness_max": totals.staleness_max,
        }

    def _mean_loss(self) -> float | None:
        """The mean since the last progress event, or the mean before where no step came since."""
        if self._totals.loss_count:
            self._totals.loss = self._totals.loss_sum / self._totals.loss_count
        return self._totals.loss

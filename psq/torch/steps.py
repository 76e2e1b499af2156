"""The kinds of steps a worker takes, each as one call that tells where its time went.

    round          say what is left, zero the gradients, wait, take the new weights
    sit_out        say nothing, wait, take the new weights
    step_locally   move this worker's own weights, tell nobody

`Steps` counts and reports; it knows neither what the user may set nor whether the worker is open.
What it finds wrong with a gradient it logs and says in the report; errors it lets through.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from psq.client import RoundResult
from psq.plan import Plan
from psq.timeline import NOWHERE, Phase, Timeline
from psq.torch.asked import Asked
from psq.torch.exchange import Exchange
from psq.torch.parameters import ParameterTable
from psq.torch.report import LOCAL, SAT_OUT, StepReport

__all__ = ["Steps"]

_log = logging.getLogger("psq.torch")


class Steps:
    """The steps of one worker.

    Args:
        table: of its parameters.
        exchange: what it says and hears.
        plan: the job.
        timeline: records the phases of each step.

    Attributes:
        skipped: how many steps left something out that was not finite.
        local_step: how many local steps there are since the last round.
        returned_s: when the step before had its weights.
    """

    def __init__(
        self, table: ParameterTable, exchange: Exchange, plan: Plan, timeline: Timeline | None
    ) -> None:
        self._table = table
        self._exchange = exchange
        self._client = exchange.client
        self._timeline = timeline
        self._local_steps = plan.recipe.direction.local_steps
        self._shards = len(plan.layout.shards)
        self.skipped = 0
        self.local_step = 0
        self.returned_s = time.monotonic()
        self._counted = (self._client.sent_bytes, self._client.received_bytes)

    def begin_counting(self) -> None:
        """The worker has joined: what it said and waited for until now is of no step."""
        self.returned_s = time.monotonic()
        self._count_bytes()

    @property
    def count(self) -> int:
        """How many steps of every worker the job has behind it."""
        return self._client.version * self._local_steps + self.local_step

    @property
    def pushes(self) -> bool:
        """Whether the next step is one that pushes."""
        return self.local_step == self._local_steps - 1

    def round(self, asked: Asked) -> StepReport:
        """A step that pushes."""
        return self._round(asked, self._exchange.say_rest)

    def sit_out(self, asked: Asked) -> StepReport:
        """A round of the others: nothing is said, nothing waits in the residual."""
        return self._round(asked, self._exchange.say_nothing)

    def _round(self, asked: Asked, say: Callable[[], None]) -> StepReport:
        started_s, exchange, client = time.monotonic(), self._exchange, self._client
        exchange.begin(asked)
        self.record(Phase.COMPUTE, exchange.step, self.returned_s, started_s)
        early_s = exchange.encode_s
        watch = _Watch(exchange, started_s)
        say()
        encode_s, fault = watch.lap_s(), self._fault()
        zero_at_s = watch.now_s
        self._table.zero_gradients(client.poll)
        zeroing_s, stood_s = watch.lap_s(), client.waited_s
        self.record(Phase.ZERO, exchange.step, zero_at_s, watch.now_s)
        result = exchange.finish()
        waited_s, stood_s = watch.lap_s(), client.waited_s - stood_s
        exchange.publish()
        self.local_step = 0
        exchange.close_round()
        publish_s = watch.lap_s()
        server_s = min(result.server_s, waited_s)
        before_s, self.returned_s = self.returned_s, watch.now_s
        sent_bytes, received_bytes = self._count_bytes()
        reason = fault or _refusal(result) or (SAT_OUT if exchange.is_silent else "")
        return StepReport(
            step=exchange.step,
            version=result.version,
            applied=result.applied and not reason,
            reason=reason,
            lr=asked.rate,
            compute_s=started_s - before_s - early_s + zeroing_s,
            encode_s=early_s + encode_s,
            wire_s=waited_s - server_s,
            server_s=server_s,
            decode_s=exchange.decode_s + publish_s,
            exposed_s=stood_s,
            left_out=tuple(sorted(exchange.left_out)),
            rejected=result.rejected,
            staleness=result.staleness,
            sent_bytes=sent_bytes,
            received_bytes=received_bytes,
            payload_bytes=exchange.payload_bytes,
            said_numel=exchange.said_numel,
        )

    def step_locally(self, asked: Asked) -> StepReport:
        """A step of this worker alone."""
        exchange, version, started_s = self._exchange, self._client.version, time.monotonic()
        exchange.step_locally(asked)
        fault = self._fault()
        self.local_step += 1
        self._table.zero_gradients()
        before_s, self.returned_s = self.returned_s, time.monotonic()
        self.record(Phase.COMPUTE, version, before_s, started_s)
        self.record(Phase.LOCAL, version, started_s, self.returned_s)
        sent_bytes, received_bytes = self._count_bytes()
        return StepReport(
            step=version,
            version=version,
            applied=False,
            reason=fault or LOCAL,
            lr=asked.rate,
            compute_s=self.returned_s - before_s - exchange.encode_s,
            encode_s=exchange.encode_s,
            left_out=tuple(sorted(exchange.left_out)),
            sent_bytes=sent_bytes,
            received_bytes=received_bytes,
        )

    def drop_local_steps(self) -> None:
        """The worker leaves: the steps since the last round are nobody's."""
        if not self.local_step:
            return
        words = "%d local steps of rank %d came after the last round: nobody will hear of them"
        _log.info(words, self.local_step, self._client.rank)
        self.local_step = 0

    def record(self, phase: Phase, step: int, start_s: float, end_s: float) -> None:
        """Add a span to the timeline, if there is one."""
        if self._timeline is not None:
            self._timeline.add(phase, start_s, end_s, NOWHERE, step)

    def _count_bytes(self) -> tuple[int, int]:
        """Sent and received since the step before."""
        sent, received = self._client.sent_bytes, self._client.received_bytes
        before, self._counted = self._counted, (sent, received)
        return sent - before[0], received - before[1]

    def _fault(self) -> str:
        """What was wrong with this step's gradients; empty when nothing was."""
        left_out = self._exchange.left_out
        if not left_out:
            return ""
        self.skipped += 1
        fault = left_out[min(left_out)]
        shards = f"{len(left_out)} of {self._shards} shards"
        if self._local_steps == 1:
            words = "step %d: %s; rank %d sits this round out for %s"
        else:
            words = "step %d: %s; rank %d does not take this step, for %s"
        _log.warning(words, self.count, fault, self._client.rank, shards)
        return fault


class _Watch:
    """Seconds from one lap to the next, without those spent in decoding."""

    def __init__(self, exchange: Exchange, now_s: float) -> None:
        self._exchange = exchange
        self._decoded_s = exchange.decode_s
        self.now_s = now_s

    def lap_s(self) -> float:
        before_s, self.now_s = self.now_s, time.monotonic()
        decoded_s, self._decoded_s = self._decoded_s, self._exchange.decode_s
        return max(0.0, self.now_s - before_s - (self._decoded_s - decoded_s))


def _refusal(result: RoundResult) -> str:
    """Why the server did not count all that was said; empty when it did."""
    if result.reason or not result.rejected:
        return result.reason
    return f"the server refused shards {', '.join(map(str, result.rejected))}"

"""One virtual worker: the steps of `psq.torch.Worker`, cut where the real one would wait.

    joining -> ready -> computing -> waiting -> computing ... -> leaving -> gone
                             '-> crashed [-> joining, as another process]

While it computes, what comes lies in its inbox, as in a real process: only its heartbeats go out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Literal, Protocol

from psq.torch.asked import Asked
from psq_worker.job import Job
from psq_worker.pace import is_own, steps_behind
from psq_worker.simulate.clock import Events
from psq_worker.simulate.faults import Crash
from psq_worker.simulate.link import VirtualExchange
from psq_worker.simulate.table import Table
from psq_worker.tasks import Batch

__all__ = ["Host", "State", "VirtualWorker"]

State = Literal["joining", "ready", "computing", "waiting", "leaving", "gone", "crashed"]
BEAT_S = 1.0
"""Between two looks of the heartbeat thread while a worker computes."""


class Host(Protocol):
    """What a worker needs of the simulation around it."""

    events: Events

    def open(self, worker: VirtualWorker) -> tuple[Table, VirtualExchange]:
        """A new process: its memory and its connections."""
        ...

    def compute(self, worker: VirtualWorker) -> float:
        """Show the gradients of this step to the worker's table; returns the loss."""
        ...

    def batches(self, rank: int, start_step: int) -> Iterator[Batch]:
        """This rank's samples from a step on."""
        ...

    def ready(self, worker: VirtualWorker) -> None:
        """A worker has its first weights, and waits for `begin`."""
        ...

    def takes_part(self, rank: int, round_: int) -> bool:
        """Whether this rank has been drawn for a round."""
        ...

    def stepped(self, worker: VirtualWorker, loss: float | None, staleness: int) -> None:
        """A worker has done a step."""
        ...

    def left(self, worker: VirtualWorker) -> None:
        """A worker will not do any more."""
        ...


class VirtualWorker:
    """See the module's docstring.

    Args:
        rank: its number.
        host: the simulation.
        job: how long, at which rate.
        compute_s: what its steps take.
        pause: draws what a step takes longer.
        crash: what happens to it, if anything.
    """

    def __init__(  # noqa: PLR0913 - what makes this worker another than the next
        self,
        rank: int,
        host: Host,
        job: Job,
        *,
        compute_s: float,
        pause: Callable[[random.Random], float],
        crash: Crash | None,
    ) -> None:
        self.rank = rank
        self.state: State = "joining"
        self.steps_done = 0
        self.made = 0
        """Steps of this process."""
        self.done_s = 0.0
        """When the present computing ends."""
        self.processes = 0
        self.rejected = self.skipped = 0
        self._host, self._events, self._job = host, host.events, job
        self._compute_s, self._pause, self._crash = compute_s, pause, crash
        self._rng = random.Random(f"pauses {job.seed} {rank}")  # noqa: S311 - a simulation
        self._wake_s: float | None = None
        self._woken = False
        self._local_step = 0
        self.sits_out = False
        self._loss: float | None = None
        self.table, self.exchange = host.open(self)
        self._batches: Iterator[Batch] = iter(())
        self._start()

    # ---- life of a process

    def _start(self) -> None:
        self.processes += 1
        self.state = "joining"
        self.made = self._local_step = 0
        self.wake()

    def _end(self) -> None:
        """The process is gone without a word."""
        crash, self._crash = self._crash, None
        self.state = "crashed"
        self.exchange.virtual_client.drop()
        assert crash is not None  # noqa: S101 - the caller looked
        if math.isfinite(crash.away_s):
            self._events.at(self._events.now_s + crash.away_s, self._come_back)
        else:
            self._host.left(self)

    def _come_back(self) -> None:
        self.table, self.exchange = self._host.open(self)
        self._start()

    # ---- what happens

    def wake(self) -> None:
        """Something has come, or is due."""
        if not self._woken:
            self._woken = True
            self._events.at(self._events.now_s, self._look)

    def _look(self) -> None:
        self._woken = False
        if self.state in {"gone", "crashed"}:
            return
        client = self.exchange.virtual_client
        if self.state == "computing":
            client.beat()
        else:
            client.poll()
            while client.unread:
                client.poll()
            self._go_on()
        self._wake_later()

    def _go_on(self) -> None:
        client = self.exchange.virtual_client
        if self.state == "joining" and client.ready:
            self.exchange.publish()
            begun = steps_behind(self.exchange.client.plan, self._steps)
            self.steps_done = min(begun, self._job.steps)
            self._batches = self._host.batches(self.rank, self.steps_done)
            self.state = "ready"
            self._host.ready(self)
        elif self.state == "waiting" and client.over:
            self._finish()
        elif self.state == "leaving" and client.gone:
            self.state = "gone"
            client.drop()

    def _wake_later(self) -> None:
        if self.state in {"gone", "crashed"}:
            return
        due_s = self.exchange.virtual_client.due_s
        now_s = self._events.now_s
        if self.state == "computing":
            due_s = max(due_s, now_s + BEAT_S)
        if due_s < math.inf and (self._wake_s is None or not now_s < self._wake_s <= due_s):
            self._wake_s = due_s
            self._events.at(due_s, self.wake)

    # ---- a step, as `psq.torch.Worker.step` makes it

    @property
    def _steps(self) -> int:
        """How many steps of every worker the job has behind it."""
        return self.exchange.client.version * self._job.round_steps + self._local_step

    @property
    def said(self) -> tuple[int, int]:
        """Bytes of this step's payloads, and how many values they say; none after a local one."""
        pushed = not self._local_step
        return (self.exchange.payload_bytes, self.exchange.said_numel) if pushed else (0, 0)

    def next_batch(self) -> Batch:
        """The samples of this step."""
        return next(self._batches)

    def begin(self) -> None:
        """Go on with the next step, or end."""
        if self._crash is not None and self.steps_done >= self._crash.step:
            if not self._crash.leaves:
                self._end()
                return
            self._leave()
        elif self.steps_done >= self._job.steps:
            self._leave()
        else:
            self.sits_out = not self._local_step and not self._host.takes_part(
                self.rank, self.exchange.client.version
            )
            self.state = "computing"
            took_s = 0.0 if self.sits_out else self._compute_s + self._pause(self._rng)
            self.done_s = self._events.now_s + took_s
            self._events.at(self.done_s, self._computed)

    def _leave(self) -> None:
        self.state = "leaving"
        self.exchange.virtual_client.bid_farewell()
        self._host.left(self)
        self.wake()

    def _computed(self) -> None:
        """The gradients are there: say them."""
        own = is_own(self.exchange.client.plan)
        asked = Asked(self._job.lr_at(self.steps_done if own else self._steps))
        if self.sits_out:
            self._sit_out(asked)
            return
        self._loss = self._host.compute(self)
        self.made += 1
        if self._local_step < self._job.round_steps - 1:
            self.exchange.step_locally(asked)
            self.skipped += bool(self.exchange.left_out)
            self._local_step += 1
            self._count(1, 0)
            self.begin()
        else:
            self._set_rate(asked.rate)
            self.exchange.begin(asked)
            self.exchange.say_rest()
            self._wait()

    def _sit_out(self, asked: Asked) -> None:
        """Say nothing in this round, and take what the others make of it."""
        for _ in range(self._job.round_steps):
            next(self._batches)  # these samples were this round's
        self._loss = None
        self.exchange.begin(asked)
        self.exchange.say_nothing()
        self._wait()

    def _set_rate(self, rate: float) -> None:
        """Where a torch optimizer takes the steps, it has the rate."""
        if self.exchange.averaging is not None:
            for group in self.exchange.averaging.optimizer.param_groups:
                group["lr"] = rate

    def _wait(self) -> None:
        self.skipped += bool(self.exchange.left_out)
        self.table.drop_gradients()
        self.state = "waiting"
        self.wake()

    def _finish(self) -> None:
        result = self.exchange.finish()
        self.exchange.publish()
        self.rejected += bool(result.rejected) or not result.applied
        steps = self._job.round_steps if self.sits_out else 1
        self._local_step = 0
        self._count(steps, result.staleness)
        self.begin()

    def _count(self, steps: int, staleness: int) -> None:
        self.steps_done += steps
        self._host.stepped(self, self._loss, staleness)

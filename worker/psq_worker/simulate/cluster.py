"""`simulate`: makes the machines of a job and lets virtual time pass until all work is done."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator
from typing import Final

import torch

from psq.config import WorkerConfig
from psq.errors import GaveUpError
from psq.plan import Plan
from psq.presets import preset
from psq.rules import is_apart
from psq_worker.simulate.attacks import Liars, spoil
from psq_worker.simulate.build import (
    Pause,
    averaging_of,
    gradients_of,
    initial_of,
    is_shared,
    job_of,
    samples_of,
)
from psq_worker.simulate.clock import Events
from psq_worker.simulate.config import SimConfig
from psq_worker.simulate.data import takes_part
from psq_worker.simulate.faults import speeds_of
from psq_worker.simulate.link import VirtualExchange
from psq_worker.simulate.network import Port, ServerPort, Traffic, WorkerPort, WorkerPorts
from psq_worker.simulate.result import SimResult
from psq_worker.simulate.server import VirtualServer
from psq_worker.simulate.table import Replicas, Table
from psq_worker.simulate.trace import Point, Score, Trace, Usage
from psq_worker.simulate.worker import VirtualWorker
from psq_worker.tasks import Batch, Task, check_model, get_task

__all__ = ["SimResult", "dense_usage", "simulate"]

LOOK_S: Final = 0.001
"""Between two looks at whether the first weights have come."""
DENSE_STEPS: Final = 3
"""So many steps of dense fp32 tell what one takes: they are all alike, but for chance."""
MAX_DENSE_STEPS: Final = 12
"""So many where chance has a say."""


def simulate(
    config: SimConfig,
    *,
    on_point: Callable[[Point], None] | None = None,
    on_score: Callable[[Score], None] | None = None,
) -> SimResult:
    """Run a job in this process, in virtual time.

    Args:
        config: the job.
        on_point: called with each step of all workers as it is done.
        on_score: called with each evaluation of rank 0.

    Raises:
        ConfigError: what is asked for cannot be.
        GaveUpError: workers wait for somebody who never comes, in virtual time.
    """
    task = get_task(config.task) if isinstance(config.task, str) else config.task
    simulation = _Simulation(config, task)
    return simulation.run(on_point, on_score)


def dense_usage(config: SimConfig) -> Usage:
    """A step of the same job in dense fp32 both ways, on average: nothing is learnt."""
    chance = config.faults.pause_chance or config.network.loss or config.participation < 1.0
    steps = min(config.steps or MAX_DENSE_STEPS, MAX_DENSE_STEPS if chance else DENSE_STEPS)
    faults = dataclasses.replace(config.faults, crashes=())
    dense = dataclasses.replace(
        config, recipe="fp32", steps=steps, faults=faults, attack=None, residual="f32"
    )
    task = get_task(dense.task) if isinstance(dense.task, str) else dense.task
    usage = _Simulation(dense, task, learns=False).run(None, None).usage
    return Usage(*(total / steps for total in usage))


class _Simulation:
    """Everything in one job; it is what `VirtualWorker` calls its host."""

    def __init__(self, config: SimConfig, task: Task, *, learns: bool = True) -> None:
        self.config, self.task = config, task
        self.events = Events()
        self.recipe = preset(config.recipe) if isinstance(config.recipe, str) else config.recipe
        self.job = job_of(config, task, self.recipe)
        self.model = task.model(self.job.seed)
        check_model(task, self.model)
        specs = [(n, tuple(p.shape)) for n, p in self.model.named_parameters() if p.requires_grad]
        self.plan = Plan.of(
            specs,
            self.recipe,
            config.workers,
            servers=config.servers,
            consistency=config.consistency,
        )
        self.samples = samples_of(config, task, self.job, self.plan)
        self.gradients = gradients_of(config, task, self.model, self.plan, learns=learns)
        self.liars = Liars(self.gradients, self._busy, config.workers, self.job.seed)
        self._learns = learns
        self.traffic = Traffic()
        self.speeds = speeds_of(config.faults, config.workers, self.job.seed)
        self.replicas = Replicas(initial_of(self.plan, self.model), shared=is_shared(self.plan))
        self.apart = is_apart(self.recipe)
        self.began_s = 0.0
        self.waiting: list[VirtualWorker] | None = []
        self.before: dict[int, tuple[int, int]] = {}
        self.workers: list[VirtualWorker] = []
        self.active: set[int] = set(range(config.workers))
        self.resent_frames = self.resets = 0

    # ---- running

    def run(
        self,
        on_point: Callable[[Point], None] | None,
        on_score: Callable[[Score], None] | None,
    ) -> SimResult:
        started_s = time.perf_counter()
        threads = torch.get_num_threads()
        torch.set_num_threads(self.config.threads)
        try:
            self._open_servers()
            self.trace = Trace(self.config.workers, on_point, on_score)
            self._open_workers()
            self._pass_time()
        finally:
            torch.set_num_threads(threads)
        return self._result(time.perf_counter() - started_s)

    def _open_servers(self) -> None:
        config, seed = self.config, self.job.seed
        self.server_ports = [
            ServerPort(
                number,
                config.network,
                self.events,
                self.traffic,
                random.Random(f"losses {seed} {number}"),  # noqa: S311 - a simulation
            )
            for number in range(config.servers)
        ]
        self.servers = [
            VirtualServer(
                port,
                self.events,
                reduce_s=config.reduce_s,
                give_up_after_s=config.give_up_after_s,
            )
            for port in self.server_ports
        ]

    def _open_workers(self) -> None:
        faults = self.config.faults
        pause = Pause(faults.pause_chance, faults.pause_s)
        for rank in range(self.config.workers):
            worker = VirtualWorker(
                rank,
                self,
                self.job,
                compute_s=self.config.compute_s * self.speeds.compute[rank],
                pause=pause,
                crash=faults.crash_of(rank),
            )
            self.workers.append(worker)
        for server in self.servers:
            server.wake()

    def _begin(self) -> None:
        """All workers have weights, and nothing else is on its way."""
        waiting, self.waiting = self.waiting or [], None
        self.began_s = self.events.now_s
        for worker in sorted(waiting, key=lambda one: one.rank):
            rank = worker.rank
            self.before[rank] = (self.traffic.up_bytes[rank], self.traffic.down_bytes[rank])
            worker.begin()

    def _pass_time(self) -> None:
        while any(worker.state not in {"gone", "crashed"} for worker in self.workers):
            if not self.events.turn():
                msg = "the simulated job stands still and nobody will ever wake it"
                raise GaveUpError(msg)
            if not self.active and all(port.closed for port in self.server_ports):
                break

    # ---- what a worker asks of its host

    def open(self, worker: VirtualWorker) -> tuple[Table, VirtualExchange]:
        """A new process of a rank: its memory, its ports, its connections."""
        rank, config = worker.rank, self.config
        self._note_counters(worker)
        self.gradients.forget(rank)
        rate_bit_s = config.network.bandwidth_bit_s / self.speeds.link[rank]
        up, down = Port(rate_bit_s), Port(rate_bit_s)
        ports = WorkerPorts(
            [WorkerPort(rank, port, up, down, worker.wake) for port in self.server_ports]
        )
        table = Table(self.plan.layout, self.replicas, apart=self.apart)
        told = WorkerConfig(
            rank=rank,
            world_size=config.workers,
            seed=self.job.seed,
            residual=config.residual,
            give_up_after_s=config.give_up_after_s,
        )
        exchange = VirtualExchange(
            table,
            self.plan,
            told,
            ports=ports,
            events=self.events,
            traffic=self.traffic,
            seed=f"worker {self.job.seed} {rank} {worker.processes}",
            spoil=spoil if self._lies(rank, "nan") else None,
            averaging=averaging_of(self.plan, table, self.job.lr),
        )
        return table, exchange

    def compute(self, worker: VirtualWorker) -> float:
        """Its gradients, honest or not."""
        attack = self.config.attack
        if attack is None or not attack.lies(worker.rank, self.config.workers):
            return self.gradients.compute(worker, self._busy)
        return self.liars.compute(worker, attack)

    def ready(self, worker: VirtualWorker) -> None:
        """A worker has its first weights: all begin together, when the last one has them."""
        if self.waiting is None:
            worker.begin()
            return
        self.waiting.append(worker)
        if len(self.waiting) == self.config.workers:
            self._begin_when_idle()

    def _begin_when_idle(self) -> None:
        """Begin once nothing of the start is on its way any more.

        Who waited for long for its first weights has asked for them again, and gets them again.
        """
        if any(server.has_weights_under_way for server in self.servers):
            self.events.at(self.events.now_s + LOOK_S, self._begin_when_idle)
        else:
            self._begin()

    def batches(self, rank: int, start_step: int) -> Iterator[Batch]:
        """This rank's samples from a step on."""
        return self.samples.batches(self.plan.data_rank(rank), start_step)

    def takes_part(self, rank: int, round_: int) -> bool:
        """Whether a rank says something in a round: those that compute the same do so together."""
        drawn = takes_part(
            self.plan.data_rank(rank),
            round_,
            share=self.config.participation,
            workers=self.plan.data_world_size,
            seed=self.job.seed,
        )
        return drawn and not self._lies(rank, "silent")

    def stepped(self, worker: VirtualWorker, loss: float | None, staleness: int) -> None:
        """A worker has done a step."""
        usage = self._usage(worker.rank)
        self.trace.step(
            worker.rank,
            worker.steps_done,
            loss,
            staleness=staleness,
            usage=usage,
            said=worker.said,
        )
        if worker.rank == 0 and self._learns and self.job.is_evaluated(worker.steps_done):
            scores = self.task.evaluate(self.gradients.replica(worker))
            self.trace.score(Score(worker.steps_done, dict(scores), usage))

    def left(self, worker: VirtualWorker) -> None:
        """A worker will not do any more."""
        self.active.discard(worker.rank)
        self.trace.leave(worker.rank)

    # ---- odds and ends

    def _busy(self) -> list[VirtualWorker]:
        """Those that compute now, who is done first coming first."""
        busy = [w for w in self.workers if w.state == "computing" and not w.sits_out]
        return sorted(busy, key=lambda worker: (worker.done_s, worker.rank))

    def _lies(self, rank: int, kind: str) -> bool:
        attack = self.config.attack
        return attack is not None and attack.kind == kind and attack.lies(rank, self.config.workers)

    def _usage(self, rank: int) -> Usage:
        """Since all began: seconds, and this rank's bytes up and down."""
        up, down = self.before.get(rank, (0, 0))
        traffic = self.traffic
        return Usage(
            max(0.0, self.events.now_s - self.began_s),
            traffic.up_bytes[rank] - up,
            traffic.down_bytes[rank] - down,
        )

    def _note_counters(self, worker: VirtualWorker) -> None:
        """A process ends: what it counted is kept."""
        exchange = getattr(worker, "exchange", None)
        if exchange is not None:
            self.resent_frames += exchange.client.resent_frames
            self.resets += exchange.client.resets

    def _result(self, wall_s: float) -> SimResult:
        for worker in self.workers:
            self._note_counters(worker)
        last = self.trace.points[-1] if self.trace.points else None
        steps = max(1, sum(worker.steps_done for worker in self.workers))
        values = self.plan.layout.numel * steps
        return SimResult(
            task=self.task.name,
            metric=self.task.metric,
            recipe=self.recipe,
            workers=self.config.workers,
            numel=self.plan.layout.numel,
            job=self.job,
            points=tuple(self.trace.points),
            scores=tuple(self.trace.scores),
            weights=self.workers[0].table.named(),
            usage=last.usage if last else Usage(0.0, 0, 0),
            wall_s=wall_s,
            bits_up=8 * self.traffic.pushed_bytes / values,
            bits_down=8 * self.traffic.answered_bytes / values,
            rounds=self.servers[0].state.counts.rounds,
            rejected=sum(worker.rejected for worker in self.workers),
            skipped=sum(worker.skipped for worker in self.workers),
            resent_frames=self.resent_frames,
            lost_frames=self.traffic.lost_frames,
            resets=self.resets,
        )

"""One seed: the job, its faults, its end; and many seeds, one after the other."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from psq_server.state import StopRequested

from .case import Case
from .clock import Schedule, Violation
from .copies import Copies
from .disk import Disk
from .faults import Faults
from .network import Network
from .oracle import Oracle
from .server import Server
from .worker import Kept, Worker

__all__ = ["Failure", "Outcome", "Simulation", "Tally", "replay_command", "run_seed", "run_seeds"]

MAX_EVENTS: Final = 20_000
RETRY_S: Final = 0.1
SUPERVISE_S: Final = 1.0
END_S: Final = 60.0
"""How long after the last fault a job may take to end."""


class Failure(AssertionError):  # noqa: N818 - a seed that fails
    """A seed under which something happened that must not; says how to see it again."""


@dataclass(slots=True)
class Outcome:
    """What a seed came to."""

    case: Case
    events: int
    struck: dict[str, int] = field(default_factory=dict)
    undisturbed: bool = False


class Simulation:
    """A job of one case; see the package's docstring."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.schedule = Schedule()
        rng = random.Random(f"{case.seed}/network")  # noqa: S311 - a simulation
        self.network = Network(self.schedule, rng)
        self.oracle = Oracle(case)
        self.servers = [
            Server(
                index,
                case,
                self.schedule,
                self.network,
                self.oracle,
                Disk(self.schedule, random.Random(f"{case.seed}/disk{index}")),  # noqa: S311
            )
            for index in range(case.servers)
        ]
        self.copies = {
            rank: Copies(self.schedule, random.Random(f"{case.seed}/copies{rank}"), case.copies)  # noqa: S311
            for rank in range(case.workers)
        }
        self.workers: dict[int, Worker] = {}
        self.everyone: list[Worker] = []
        for server in self.servers:
            server.start()
        for rank in range(case.workers):
            self.start_worker(rank)
        self.faults = Faults(self)
        self.schedule.after(SUPERVISE_S, self._supervise)

    def _supervise(self) -> None:
        """What a launcher does: start who is missing, and stop servers that nobody will tell.

        A worker that is done and finds no server takes it that the job has ended. If the server was
        only down, nobody has told it.
        """
        self.schedule.after(SUPERVISE_S, self._supervise)
        current = list(self.workers.values())
        for worker in current:
            others = any(w.alive for w in self.everyone if w.rank == worker.rank)
            if not others and self._is_missing(worker):
                self.start_worker(worker.rank)
        if not all(self._is_done(worker) for worker in self.workers.values()):
            return
        for server in self.servers:
            alone = any(w.fate == "done" and w.left_alone[server.index] for w in self.everyone)
            process = server.process
            if alone and process is not None and process.alive and not server.stopping:
                server.stopping = True
                process.happen(StopRequested("SIGTERM"))

    def _is_missing(self, worker: Worker) -> bool:
        """Whether this process is gone and the job goes on: who is done, too, if that is lost."""
        if worker.fate in {"fenced", "rolled-back"}:
            return True
        forgotten = worker.fate == "done" and self.oracle.has_forgotten
        return forgotten and any(
            server.process is not None
            and server.process.alive
            and worker.rank not in server.process.state._world.finished
            for server in self.servers
        )

    def _is_done(self, worker: Worker) -> bool:
        """Whether the rank is done; where a server was set back, its present process."""
        if self.oracle.has_forgotten:
            return worker.fate == "done"
        return any(w.rank == worker.rank and w.fate == "done" for w in self.everyone)

    def start_worker(self, rank: int, kept: Kept | None = None) -> Worker:
        """A process for a rank; it may go on from what the one before has kept."""
        owner = len(self.everyone) if kept is None else kept.owner
        worker = Worker(
            rank,
            owner,
            self.case,
            self.schedule,
            self.network,
            self.oracle,
            self.copies[rank],
            len(self.everyone),
            kept,
        )
        self.everyone.append(worker)
        self.workers[rank] = worker
        for server in range(self.case.servers):
            self.connect(worker, server)
        return worker

    def connect(self, worker: Worker, server: int) -> None:
        """Connect a worker to a server, if both are there and they are not."""
        link, process = worker.links[server], self.servers[server].process
        if not worker.alive or link.connection is not None or self.servers[server].ended:
            return
        if process is not None and process.alive:
            process.connect(link.connect(process), link)
        else:
            self.schedule.after(RETRY_S, lambda: self.connect(worker, server))

    @property
    def over(self) -> bool:
        """Whether every server has ended the job, and every rank's last process is gone.

        One that came too late to join, or hangs while another has its rank, would give up some day.
        """
        return self.is_stranded or (all(server.ended for server in self.servers) and self._are_gone)

    @property
    def is_stranded(self) -> bool:
        """Whether one server was set back after another had ended the job: nobody can go on."""
        ended = self.oracle.has_forgotten and any(server.ended for server in self.servers)
        return ended and any(
            worker.alive and worker.phase in {"offering", "joining"}
            for worker in self.workers.values()
        )

    @property
    def _are_gone(self) -> bool:
        return not any(
            worker.alive
            and worker.phase not in {"offering", "joining"}
            and worker.rank not in self.oracle.contested
            and not self.case.min_workers
            for worker in self.workers.values()
        )

    def run(self) -> Outcome:
        """Let everything happen.

        Raises:
            Violation: something happened that must not.
        """
        schedule, oracle = self.schedule, self.oracle
        while not self.over:
            if not schedule.step():
                msg = "nothing happens any more"
                raise Violation(msg)
            oracle.check()
            if oracle.failed:
                raise Violation(oracle.failed)
            if schedule.now_s > self.case.calm_s + END_S or schedule.events > MAX_EVENTS:
                raise Violation(self._stuck())
        self._check_end()
        return Outcome(self.case, schedule.events, self.network.struck, oracle.is_undisturbed)

    def _stuck(self) -> str:
        said = [
            f"server {server.index}: "
            + (server.process.state.snapshot(server.clock.now_s()).text if server.process else "")
            for server in self.servers
        ]
        told = [f"rank {w.rank}: {w.phase} at {w.version}" for w in self.everyone if w.alive]
        return f"no end {END_S} s after the last fault; " + "; ".join(said + told)

    def _check_end(self) -> None:
        is_stranded = self.is_stranded
        for worker in self.everyone:
            if worker.alive:
                worker.stop("dead")
            allowed = {"done", "dead", "late"} | (
                {"rolled-back"} if self.oracle.has_forgotten else set()
            )
            if worker.rank in self.oracle.contested:
                allowed.add("fenced")
            if worker.fate not in allowed:
                msg = f"rank {worker.rank} ended with {worker.fate}"
                raise Violation(msg)
        for server in self.servers:
            if not is_stranded and (server.ended is None or server.ended.exit_code):
                msg = f"server {server.index} ended with {server.ended}"
                raise Violation(msg)
        self.oracle.check_end({w.owner for w in self.everyone if w.fate == "done"})


def run_seed(case: Case) -> Outcome:
    """Run one case.

    Raises:
        Failure: it violates something; the message says what, how it came to it, and how to see it
            again.
    """
    simulation = Simulation(case)
    try:
        return simulation.run()
    except Exception as error:
        text = (
            f"seed {case.seed}: {type(error).__name__}: {error}\n"
            f"{case}\nlast events:\n{simulation.schedule.story()}\n"
            f"again: {replay_command(case)}"
        )
        raise Failure(text) from error


def replay_command(case: Case) -> str:
    """The command that shows this case again."""
    return f"python -m tests.simulation --seed {case.seed} {case.difference()}".rstrip()


@dataclass(slots=True)
class Tally:
    """What many seeds came to.

    Attributes:
        seeds: how many there were.
        events: in all of them.
        struck: how often each kind of fault struck.
        undisturbed: how many had to end with the weights of the undisturbed run, and did.
    """

    seeds: int = 0
    events: int = 0
    undisturbed: int = 0
    struck: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        """Count one more seed."""
        self.seeds += 1
        self.events += outcome.events
        self.undisturbed += outcome.undisturbed
        self.struck.update(outcome.struck)

    def join(self, other: Tally) -> None:
        """Count another tally's seeds."""
        self.seeds += other.seeds
        self.events += other.events
        self.undisturbed += other.undisturbed
        self.struck.update(other.struck)

    def text(self) -> str:
        """In words."""
        faults = ", ".join(f"{count} {kind}" for kind, count in sorted(self.struck.items()))
        return (
            f"{self.seeds} seeds, {self.events} events, 0 violations; faults: {faults}; "
            f"{self.undisturbed} seeds had to end as the undisturbed run does, and did"
        )


def run_seeds(seeds: Iterable[int], given: Mapping[str, Any] | None = None) -> Tally:
    """Run one seed after another.

    Raises:
        Failure: one violates something.
    """
    tally = Tally()
    for seed in seeds:
        tally.add(run_seed(Case.of(seed, given)))
    return tally

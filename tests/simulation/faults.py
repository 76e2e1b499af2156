"""Who does something bad, and when: drawn from the case before anything happens.

Each fault strikes at a moment before the calm; what it strikes is drawn when it does. What a fault
breaks is mended by itself: a connection is made again, a process that died is started again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from .disk import Killed
from .network import NOTICE_S, RECONNECT_S, Connection
from .server import Server
from .worker import Kept, Worker

if TYPE_CHECKING:
    from .run import Simulation

__all__ = ["Faults"]

FIRST_S: Final = 0.005
HOLD_S: Final = (0.05, 3.0)
JUMP_S: Final = (0.5, 20.0)
STALL_S: Final = (0.1, 3.0)
DOWN_S: Final = (0.0, 1.5)


class Faults:
    """Plans all faults of a case, and lets them happen."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        case = simulation.case
        self.rng = random.Random(f"{case.seed}/faults")  # noqa: S311 - a simulation
        kinds: list[tuple[int, Callable[[], None]]] = [
            (case.cuts, self._cut),
            (case.holds, self._hold),
            (case.jumps, self._jump),
            (case.stalls, self._stall),
            (case.worker_crashes, self._crash_worker),
            (case.takeovers, self._take_over),
            (case.server_crashes, self._crash_server),
            (case.disk_errors, self._break_disk),
            (case.slow_disks, self._slow_disk),
        ]
        for count, strike in kinds:
            for _ in range(count):
                simulation.schedule.at(self._when_s(), strike)
        simulation.network.flips = case.flips
        simulation.network.doubles = case.doubles

    def _when_s(self) -> float:
        """Most faults strike early: a short job must have its share."""
        calm_s = self.simulation.case.calm_s
        return FIRST_S + (calm_s - FIRST_S) * self.rng.random() ** 3

    def _strike(self, kind: str, *details: object) -> None:
        self.simulation.network.strike(kind)
        self.simulation.schedule.note(kind, *details)

    def _worker(self) -> Worker | None:
        alive = [worker for worker in self.simulation.workers.values() if worker.alive]
        return self.rng.choice(alive) if alive else None

    # ---- the network

    def _cut(self) -> None:
        worker = self._worker()
        if worker is None:
            return
        server = self.rng.randrange(self.simulation.case.servers)
        if worker.links[server].connection is not None:
            self._strike("cuts", worker.rank, server)
            self.cut(worker, server)

    def cut(self, worker: Worker, server: int) -> None:
        """Break a connection; each end notices when it does, and the worker makes a new one."""
        link, schedule, rng = worker.links[server], self.simulation.schedule, self.rng
        soon = rng.random() < 0.7
        connection = link.cut(at_once=soon)
        if connection is None:
            return
        noticed_s = 0.0 if soon else rng.uniform(0.0, NOTICE_S)
        self._server_notices(connection)
        if not soon:
            schedule.after(noticed_s, lambda: link.drop(connection))
        back_s = noticed_s + rng.uniform(*RECONNECT_S)
        schedule.after(back_s, lambda: self.simulation.connect(worker, server))

    def _server_notices(self, connection: Connection) -> None:
        """The server hears of it at once, later, or when it has something to say."""
        rng, schedule = self.rng, self.simulation.schedule
        if rng.random() < 0.3:
            schedule.after(rng.uniform(0.0, NOTICE_S), lambda: _close(connection, heard=True))
        else:
            _close(connection, heard=rng.random() < 0.5)

    def _hold(self) -> None:
        """Nothing passes one way for a while, then all of it."""
        case, network = self.simulation.case, self.simulation.network
        rank, server = self.rng.randrange(case.workers), self.rng.randrange(case.servers)
        way = self.rng.choice(("up", "down"))
        until_s = self.simulation.schedule.now_s + self.rng.uniform(*HOLD_S)
        self._strike("holds", rank, server, way, until_s)
        network.held_until_s[rank, server, way] = until_s

    # ---- processes

    def _jump(self) -> None:
        simulation = self.simulation
        clocks = [worker.clock for worker in simulation.workers.values()]
        clocks += [server.clock for server in simulation.servers]
        self._strike("jumps")
        self.rng.choice(clocks).jump(self.rng.uniform(*JUMP_S))

    def _stall(self) -> None:
        worker = self._worker()
        if worker is not None:
            self._strike("stalls", worker.rank)
            now_s = self.simulation.schedule.now_s
            worker.stalled_until_s = now_s + self.rng.uniform(*STALL_S)

    def _crash_worker(self) -> None:
        worker = self._worker()
        if worker is None or worker.phase == "leaving":
            return  # who has said goodbye is not started again
        self._strike("worker_crashes", worker.rank, worker.owner)
        for link in worker.links:
            connection = link.cut(at_once=True)
            if connection is not None:
                self._server_notices(connection)
        contested = worker.rank in self.simulation.oracle.contested
        keeps = self.rng.random() < self.simulation.case.keeps and not contested
        kept = worker.keep() if keeps else None
        worker.stop("dead", keeps=kept is not None)
        self._start_again(worker.rank, kept)

    def _take_over(self) -> None:
        """A process hangs, somebody starts another in its place, and then it goes on."""
        worker = self._worker()
        if worker is None or worker.phase == "leaving":
            return
        self._strike("takeovers", worker.rank, worker.owner)
        self.simulation.oracle.contested.add(worker.rank)
        worker.stalled_until_s = self.simulation.schedule.now_s + self.rng.uniform(*STALL_S)
        self._start_again(worker.rank)

    def _server(self) -> Server | None:
        alive = [s for s in self.simulation.servers if s.process is not None and s.process.alive]
        return self.rng.choice(alive) if alive else None

    def _crash_server(self) -> None:
        """A server's process dies now, or amid what it next does with its disk."""
        server = self._server()
        if server is None:
            return
        if self.rng.random() < 0.5:
            self._strike("server_crashes", server.index)
            self._kill_server(server)
            return
        steps = self.rng.randint(1, 12)

        def trap() -> None:
            nonlocal steps
            steps -= 1
            if not steps:
                server.disk.trap = _nothing
                self._strike("server_crashes", server.index, "at its disk")
                self._kill_server(server)
                raise Killed

        server.disk.trap = trap

    def _kill_server(self, server: Server) -> None:
        schedule, rng = self.simulation.schedule, self.rng
        server.crash()
        if self.simulation.case.rot > rng.random() and server.disk.rot():
            self._strike("rotten", server.index)
        back_s = rng.uniform(*DOWN_S)
        schedule.after(back_s, server.start)
        for worker in self.simulation.everyone:
            if not worker.alive:
                continue
            link = worker.links[server.index]
            connection = link.cut(at_once=rng.random() < 0.8)
            if connection is None:
                continue
            connection.lost_up_s = schedule.now_s
            self._meet_again(worker, server, connection, back_s)

    def _meet_again(
        self, worker: Worker, server: Server, connection: Connection, back_s: float
    ) -> None:
        """The worker tries until the server is there."""
        link, schedule, rng = worker.links[server.index], self.simulation.schedule, self.rng
        schedule.after(rng.uniform(0.0, back_s), lambda: link.drop(connection))
        again_s = back_s + rng.uniform(*RECONNECT_S)
        schedule.after(again_s, lambda: self.simulation.connect(worker, server.index))

    def _break_disk(self) -> None:
        server = self._server()
        if server is not None and self.simulation.case.durability != "off":
            self._strike("disk_errors", server.index)
            until_s = self.simulation.schedule.now_s + self.rng.uniform(*HOLD_S)
            server.disk.broken_until_s = until_s

    def _slow_disk(self) -> None:
        server = self._server()
        if server is not None and self.simulation.case.durability != "off":
            self._strike("slow_disks", server.index)
            server.disk.slow_until_s = self.simulation.schedule.now_s + self.rng.uniform(*HOLD_S)

    def _start_again(self, rank: int, kept: Kept | None = None) -> None:
        down_s = self.rng.uniform(*DOWN_S)
        if self.simulation.case.min_workers:
            down_s *= 3  # so that rounds go on without it
        self.simulation.schedule.after(down_s, lambda: self.simulation.start_worker(rank, kept))


def _nothing() -> None:
    """No trap is set."""


def _close(connection: Connection, *, heard: bool) -> None:
    connection.open_at_server = False
    if heard:
        connection.server.on_gone(connection)

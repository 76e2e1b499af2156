"""A small job of real processes whose workers keep their state, and are killed and started again.

Used by the tests in tests/cluster that are about that; `train_kept.py` there is what workers run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).parent / "cluster" / "train_kept.py"
STEPS = 8


class Job:
    """A server and the places of its workers, who come and go."""

    def __init__(  # noqa: PLR0913 - what a job may be
        self, cluster, name, *options, recipe="server-adam", size=2, servers=1, kept=None, gate=None
    ):
        self.folder = cluster.folder / name
        self.folder.mkdir()
        self._cluster, self._options, self.gate = cluster, options, gate
        self._server_options = ["--world-size", str(size)]
        if kept is not None:
            self._server_options += ["--state-dir", str(self.folder / "server"), *kept]
        started = [cluster.server(*self._server_options) for _ in range(servers)]
        self._variables = {
            "PSQ_CONNECT": ",".join(each.endpoint for each in started),
            "PSQ_WORLD_SIZE": str(size),
            "PSQ_STATE_DIR": str(self.folder / "state"),
            "PSQ_RECIPE": recipe,
        }
        self.server = started[0]
        self.workers = [self.start(rank) for rank in range(size)]

    def start_server(self):
        """Another server in the place of the one that has ended."""
        endpoint = self.server.endpoint
        self.server = self._cluster.server("--bind", endpoint, *self._server_options)

    def start_workers(self):
        """All of them, once more."""
        self.workers = [self.start(rank) for rank in range(len(self.workers))]

    def end(self, number):
        """Send everybody a signal, workers first, as a launcher does; their exit codes."""
        for each in (*self.workers, self.server):
            each.signal(number)
        return [each.wait() for each in (*self.workers, self.server)]

    def turn_off(self):
        """The machine loses its memory: what is on the disk is left."""
        for rank in range(len(self.workers)):
            shutil.rmtree(fast_folder(self.folder / "state", rank))

    def start(self, rank, *more, die=None, **variables):
        told = {k: v for k, v in self._variables.items() if k != "PSQ_CONNECT"}
        words = ["--steps", str(STEPS), "--out", str(self.folder / f"rank{rank}.npz")]
        words += ["--die", die] if die else []
        words += ["--gate", str(self.gate)] if self.gate else []
        return self._cluster.worker(
            rank,
            self._variables["PSQ_CONNECT"],
            *words,
            *self._options,
            *more,
            script=SCRIPT,
            **told,
            **variables,
        )

    def result(self):
        for worker in self.workers:
            assert worker.wait() == 0, worker.err()
        return {
            rank: dict(np.load(self.folder / f"rank{rank}.npz"))
            for rank in range(len(self.workers))
        }


def assert_same(got, expected):
    for rank, arrays in expected.items():
        differ = [k for k in arrays if arrays[k].tobytes() != got[rank][k].tobytes()]
        assert (rank, differ) == (rank, [])


class DyingJob(Job):
    """One whose worker of rank 1 dies at a place."""

    def __init__(self, cluster, name, *options, dies, **given):
        self._dies = dict(dies)
        super().__init__(cluster, name, *options, **given)

    def start(self, rank, *more, **given):
        return super().start(rank, *more, die=self._dies.pop(rank, None), **given)

    def restart(self, rank):
        """The process of a rank was killed: start another."""
        assert self.workers[rank].wait() == -signal.SIGKILL, self.workers[rank].err()
        self.workers[rank] = self.start(rank)
        return self.workers[rank]


def fast_folder(state_dir: Path, rank: int) -> Path:
    path = os.fsencode(state_dir.resolve() / f"worker-{rank}")
    return Path("/dev/shm") / f"psq-{os.getuid()}-{hashlib.sha256(path).hexdigest()[:16]}"  # noqa: S108

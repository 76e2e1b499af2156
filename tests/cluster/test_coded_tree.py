"""Groups that compute the same, below aggregators: real processes.

root        --children 0-3,4-7
aggregator  --children 0,1,2,3     groups 0 1 and 2 3
aggregator  --children 4,5,6,7     groups 4 5 and 6 7
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field

import numpy as np
import pytest

WORKERS = 8
STEPS = 6
STRAGGLERS = (0, 3, 4, 7)
"""One of each group; of two groups it is the rank that would speak."""
GATE_STEP = 3


@dataclass
class Job:
    """A tree, and the workers below it."""

    cluster: object
    folder: object
    root: object = None
    aggregators: list = field(default_factory=list)

    def open(self):
        self.root = self.cluster.server("--json", "--lease", "5", "--children", "0-3,4-7")
        self.aggregators = [
            self.cluster.server(
                "--parent", self.root.endpoint, "--children", words, "--json", "--lease", "5"
            )
            for words in ("0,1,2,3", "4,5,6,7")
        ]
        return self

    def start(self, rank, *options):
        out = str(self.folder / f"rank{rank}.npz")
        words = ["--world-size", str(WORKERS), "--steps", str(STEPS), "--out", out]
        connect = self.aggregators[rank // 4].endpoint
        return self.cluster.worker(rank, connect, *words, *options, PSQ_RECIPE="coded")

    def close(self):
        """What every server said in the end."""
        programs = [self.root, *self.aggregators]
        assert [program.wait() for program in programs] == [0] * len(programs)
        return [json.loads(program.out().splitlines()[-1]) for program in programs]

    def weights(self, ranks=range(WORKERS)):
        """What these ranks hold, the same in each to the bit."""
        found = [dict(np.load(self.folder / f"rank{rank}.npz")) for rank in ranks]
        for other in found[1:]:
            for name, value in found[0].items():
                assert value.tobytes() == other[name].tobytes(), name
        return found[0]


@pytest.fixture
def job(cluster):
    return Job(cluster, cluster.folder)


def run_with_stragglers(job):
    """One of each group stands still before its fourth step, until the others have done all.

    These others begin when the stragglers stand: who comes when the first round is over is cold.
    """
    quick = [rank for rank in range(WORKERS) if rank not in STRAGGLERS]
    gates = {rank: job.folder / f"gate{rank}" for rank in range(WORKERS)}
    for gate in gates.values():
        os.mkfifo(gate)
    workers = {}
    for ranks, step in (((0, *quick), 0), (STRAGGLERS[1:], GATE_STEP)):
        for rank in ranks:
            stop = GATE_STEP if rank == 0 else step
            words = ("--gate", str(gates[rank]), "--gate-step", str(stop))
            workers[rank] = job.start(rank, *words)
        for rank in set(ranks) - {0}:
            workers[rank].wait_line("^gate$")
    workers[0].wait_line("^gate$")
    for rank in quick:
        gates.pop(rank).write_bytes(b"go")
    for rank in quick:
        workers[rank].wait_line(f"^step {STEPS - 1}$")
    for rank in gates:
        assert f"step {GATE_STEP}" not in workers[rank].out(), "it was not held up"
    for gate in gates.values():
        gate.write_bytes(b"go")
    assert [workers[rank].wait() for rank in range(WORKERS)] == [0] * WORKERS
    return job.weights()


def run_in_time(job):
    workers = [job.start(rank) for rank in range(WORKERS)]
    assert [worker.wait() for worker in workers] == [0] * WORKERS
    return job.weights()


def test_a_straggler_in_each_group_is_ignored_and_the_weights_are_those_of_a_run_without(
    job, cluster
):
    late = run_with_stragglers(job.open())
    said = job.close()
    assert [each["rounds"] for each in said] == [STEPS] * len(said)
    assert sum(each["cold"] for each in said) == 0, "stragglers said what their twins had said"
    for each in said[1:]:
        mine = len(STRAGGLERS) // 2
        assert each["pushes"]["twin"] >= mine * (STEPS - GATE_STEP), "they were late"
    other = Job(cluster, cluster.folder).open()
    prompt = run_in_time(other)
    other.close()
    assert prompt.keys() == late.keys()
    for name, value in prompt.items():
        assert value.tobytes() == late[name].tobytes(), name


def test_the_loss_of_a_group_below_an_aggregator_ends_the_job_and_names_it(job):
    job.open()
    gates = {rank: job.folder / f"gate{rank}" for rank in (6, 7)}
    for gate in gates.values():
        os.mkfifo(gate)
    workers = [
        job.start(rank, *(("--gate", str(gates[rank]), "--gate-step", "2")
                          if rank in gates else ()))
        for rank in range(WORKERS)
    ]  # fmt: skip
    for rank in gates:
        workers[rank].wait_line("^gate$")
        workers[rank].signal(9)
        assert workers[rank].wait() == -9
    assert job.aggregators[1].wait() == 75
    assert "ranks 6 and 7 compute the same" in job.aggregators[1].err()
    assert job.root.wait() == 75
    assert re.search(r"aggregator of ranks 4-7, left .*ranks 6 and 7", job.root.err())
    assert workers[0].wait() == 75

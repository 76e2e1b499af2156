"""Workers in groups that compute the same: four real ones, and stragglers among them."""

from __future__ import annotations

import json
import os
import re
import signal

import numpy as np
import pytest

WORKERS = 4
RECIPE = {"PSQ_RECIPE": "coded"}


@pytest.fixture
def job(cluster):
    """A server, and a way to start ranks of a job of four in two groups."""
    server = cluster.server("--json", "--lease", "2")

    def start(rank, steps, *options):
        out = str(cluster.folder / f"rank{rank}.npz")
        words = ["--world-size", str(WORKERS), "--steps", str(steps), "--out", out]
        return cluster.worker(rank, server.endpoint, *words, *options, **RECIPE)

    start.server = server
    start.folder = cluster.folder
    return start


def gate_of(job, name="gate"):
    """A FIFO that a worker waits at until somebody writes to it."""
    path = job.folder / name
    os.mkfifo(path)
    return path


def replicas(job, ranks):
    return [dict(np.load(job.folder / f"rank{rank}.npz")) for rank in ranks]


def assert_alike(found):
    for other in found[1:]:
        for name, value in found[0].items():
            assert value.tobytes() == other[name].tobytes(), name


def summary_of(server):
    assert server.wait() == 0
    return json.loads(server.out().splitlines()[-1])


def test_rounds_go_on_without_a_slow_replica_which_stays_in_step(job):
    """Six rounds pass while rank 1 is at its fourth; then it says them all, as its twin did."""
    gate = gate_of(job)
    slow = job(1, 9, "--gate", str(gate), "--gate-step", "3")
    others = [job(rank, 9) for rank in (0, 2, 3)]
    slow.wait_line("^gate$")
    for worker in others:
        worker.wait_line("^step 8$")
    assert "step 3" not in slow.out(), "rank 1 was not held up"
    gate.write_bytes(b"go")
    for worker in (slow, *others):
        assert worker.wait() == 0
    assert [f"step {step}" for step in range(9)] == [
        line for line in slow.out().splitlines() if line.startswith("step")
    ]
    summary = summary_of(job.server)
    assert summary["cold"] == 0, "it said what its twin had said"
    assert summary["pushes"]["twin"] >= 6
    assert summary["rounds"] == 9
    assert_alike(replicas(job, range(WORKERS)))


def test_one_straggler_in_each_group_at_a_time_holds_up_nobody(job):
    """First ranks 0 and 2 stand still, then 1 and 3: each time the twins go on."""
    gates = [gate_of(job, f"gate{rank}") for rank in range(WORKERS)]
    workers = [
        job(rank, 12, "--gate", str(gates[rank]), "--gate-step", "2" if rank % 2 == 0 else "6")
        for rank in range(WORKERS)
    ]
    for rank in (0, 2):
        workers[rank].wait_line("^gate$")
    for rank in (1, 3):
        workers[rank].wait_line("^gate$")
        assert "step 5" in workers[rank].out(), "the twins went on alone"
    for rank in (0, 2):
        gates[rank].write_bytes(b"go")
    for rank in (0, 2):
        workers[rank].wait_line("^step 11$")
        assert "step 6" not in workers[rank + 1].out(), "the others stand still now"
    for rank in (1, 3):
        gates[rank].write_bytes(b"go")
    for worker in workers:
        assert worker.wait() == 0
    assert summary_of(job.server)["cold"] == 0
    assert_alike(replicas(job, range(WORKERS)))


def test_a_replica_that_is_too_late_is_cold_and_ends_with_the_same_weights(job):
    gate = gate_of(job)
    slow = job(1, 30, "--gate", str(gate), "--gate-step", "3")
    others = [job(rank, 30) for rank in (0, 2, 3)]
    slow.wait_line("^gate$")
    others[0].wait_line("^step 29$")
    gate.write_bytes(b"go")
    for worker in (slow, *others):
        assert worker.wait() == 0
    summary = summary_of(job.server)
    assert re.search(r"event=cold rank=1 .*more than \d+ rounds behind", job.server.err())
    assert summary["rounds"] == 30
    assert_alike(replicas(job, range(WORKERS)))


def test_a_stopped_process_holds_up_nobody(job):
    workers = [job(rank, 60) for rank in range(WORKERS)]
    workers[2].wait_line("^step 3$")
    workers[2].signal(signal.SIGSTOP)
    for rank in (0, 1, 3):
        assert workers[rank].wait() == 0
    assert "step 59" not in workers[2].out(), "rank 2 was not stopped in time"
    workers[2].signal(signal.SIGCONT)
    workers[2].wait()
    assert summary_of(job.server)["rounds"] == 60
    assert_alike(replicas(job, (0, 1, 3)))


def test_the_loss_of_a_replica_changes_nothing_and_of_both_ends_the_job_by_name(job):
    gates = [gate_of(job, f"gate{rank}") for rank in (1, 3)]
    options = {1: ("--gate", str(gates[0]), "--gate-step", "20"),
               3: ("--gate", str(gates[1]), "--gate-step", "20")}  # fmt: skip
    workers = [job(rank, 1000, *options.get(rank, ())) for rank in range(WORKERS)]
    workers[2].wait_line("^step 3$")
    workers[2].signal(signal.SIGKILL)
    assert workers[2].wait() == -signal.SIGKILL
    workers[3].wait_line("^gate$")  # it has gone on alone
    workers[3].signal(signal.SIGKILL)
    assert workers[3].wait() == -signal.SIGKILL
    assert job.server.wait() == 75
    assert "ranks 2 and 3 compute the same" in job.server.err()
    assert workers[0].wait() == 75

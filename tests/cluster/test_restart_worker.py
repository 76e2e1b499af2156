"""Workers that are killed with SIGKILL, and started again: what comes out is what would have.

Real processes: whatever is not in shared memory at the moment of the kill is gone.
"""

from __future__ import annotations

import os
import signal

import pytest
from kept_job import DyingJob, Job, assert_same, fast_folder

# A place, and when the worker comes there for the nth time it dies; its first round is special.
DEATHS = (
    "keeper.copy:9",
    "keeper.flip:10",
    "keeper.sent:5",
    "keeper.close:4",
    "keeper.closed:3",
    "keeper.weights:14",
)


@pytest.fixture(scope="module")
def whole():
    """How jobs end in which nobody dies, by their settings."""
    return {}


def expected_of(whole, cluster, *options, **given):
    key = (options, tuple(sorted(given.items())))
    if key not in whole:
        whole[key] = Job(cluster, "whole", *options, **given).result()
    return whole[key]


@pytest.mark.parametrize("death", DEATHS)
def test_a_worker_killed_at_any_place_of_a_round_and_started_again_changes_nothing(
    cluster, whole, death
):
    expected = expected_of(whole, cluster)
    job = DyingJob(cluster, "killed", dies={1: death})
    job.restart(1).wait_line(r"joined version=\d+ resumed=True resets=0")
    assert_same(job.result(), expected)


def test_both_workers_killed_in_one_round_change_nothing(cluster, whole):
    expected = expected_of(whole, cluster, recipe="qadam-1bit")
    dies = {0: "keeper.flip:11", 1: "keeper.sent:7"}
    job = DyingJob(cluster, "killed", dies=dies, recipe="qadam-1bit")
    for rank in dies:
        job.restart(rank)
    assert_same(job.result(), expected)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (("--overlap",), {"recipe": "server-adam"}),
        (("--local-steps", "2"), {"recipe": "local-adam"}),
        (("--every", "2"), {"recipe": "qadam-1bit"}),
        ((), {"recipe": "shared-direction"}),
        ((), {"recipe": "average"}),
        ((), {"recipe": "server-adam", "servers": 2}),
    ],
    ids=["overlap", "local", "turns", "mean", "average", "two servers"],
)
def test_each_kind_of_recipe_goes_on_after_a_kill(cluster, whole, options, given):
    expected = expected_of(whole, cluster, *options, **given)
    job = DyingJob(cluster, "killed", *options, dies={1: "keeper.flip:6"}, **given)
    job.restart(1).wait_line(r"resumed=True resets=0")
    assert_same(job.result(), expected)


def test_a_worker_killed_whenever_it_may_be_changes_nothing(cluster, whole):
    longer = ("--steps", "40")
    expected = expected_of(whole, cluster, *longer)
    job = DyingJob(cluster, "killed", *longer, dies={})
    for step in (1, 6, 11, 16):
        victim = step % 2
        job.workers[victim].wait_line(rf"^step {step}$")
        job.workers[victim].signal(signal.SIGKILL)
        job.restart(victim)
    assert_same(job.result(), expected)


def test_a_worker_whose_state_is_damaged_begins_with_a_residual_of_zeros_and_says_so(cluster):
    job = DyingJob(cluster, "killed", dies={1: "keeper.flip:9"})
    assert job.workers[1].wait() == -signal.SIGKILL
    for which in range(2):
        path = fast_folder(job.folder / "state", 1) / f"worker.{which}"
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
    worker = job.restart(1)
    worker.wait_line(r"resumed=False resets=1")
    job.result()
    assert "holds nothing that one could go on from: what this worker kept is torn" in worker.err()


def test_a_worker_of_other_settings_is_refused_and_leaves_what_is_there(cluster):
    job = DyingJob(cluster, "killed", dies={1: "keeper.flip:9"})
    assert job.workers[1].wait() == -signal.SIGKILL
    other = job.start(1, PSQ_SEED="1")
    assert other.wait() == 78
    assert "seed=0 is kept, seed=1 asked" in other.err()
    job.workers[1] = job.start(1)
    job.workers[1].wait_line(r"resumed=True resets=0")
    job.result()


def test_two_processes_cannot_be_one_worker(cluster):
    job = DyingJob(cluster, "twice", dies={})
    first = job.workers[1]
    first.wait_line(r"^step 0$")
    os.kill(first.pid, signal.SIGSTOP)  # so that it is there for as long as the other looks
    try:
        other = job.start(1)
        assert other.wait() == 65
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert f"in use by process {first.pid}: it is rank 1 already" in other.err()
    job.result()


def test_a_job_that_is_done_leaves_nothing_in_memory(cluster):
    job = DyingJob(cluster, "done", dies={})
    job.result()
    assert not fast_folder(job.folder / "state", 0).exists()

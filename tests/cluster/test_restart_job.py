"""A whole job that is stopped or killed, and started again: servers, workers, or the machine."""

from __future__ import annotations

import os
import signal

import pytest
from cluster.conftest import wait_until
from kept_job import DyingJob, Job, assert_same

KEPT = ("--checkpoint-every", "3")
KINDS = [
    ((), {"recipe": "server-adam"}),
    ((), {"recipe": "qadam-1bit"}),
    ((), {"recipe": "shared-direction"}),
    (("--local-steps", "2"), {"recipe": "local-adam"}),
]
IDS = ["server-adam", "qadam-1bit", "mean", "local"]


@pytest.fixture(scope="module")
def whole():
    """How jobs end that nobody disturbs, by their settings."""
    return {}


def expected_of(whole, cluster, *options, **given):
    key = (options, tuple(sorted(given.items())))
    if key not in whole:
        whole[key] = Job(cluster, "whole", *options, **given).result()
    return whole[key]


@pytest.mark.parametrize(("options", "given"), KINDS, ids=IDS)
def test_a_job_of_which_everything_is_killed_goes_on_as_if_nothing_had_been(
    cluster, whole, options, given
):
    expected = expected_of(whole, cluster, *options, **given)
    job = DyingJob(cluster, "killed", *options, dies={1: "keeper.flip:11"}, kept=KEPT, **given)
    assert job.workers[1].wait() == -signal.SIGKILL
    assert job.end(signal.SIGKILL) == [-signal.SIGKILL] * 3
    job.start_server()
    job.start_workers()
    for worker in job.workers:
        worker.wait_line(r"resumed=True resets=0")
    assert_same(job.result(), expected)


def test_a_job_that_was_stopped_goes_on_after_the_machine_was_off(cluster, whole):
    expected = expected_of(whole, cluster, recipe="qadam-1bit")
    job = DyingJob(cluster, "stopped", dies={}, kept=KEPT, recipe="qadam-1bit")
    job.workers[0].wait_line(r"^step 3$")
    assert job.end(signal.SIGTERM) == [143, 143, 0]
    job.turn_off()
    job.start_server()
    job.start_workers()
    for worker in job.workers:
        worker.wait_line(r"joined version=[3-8] resumed=True resets=0")
    assert_same(job.result(), expected)


def test_servers_that_keep_checkpoints_only_and_workers_go_back_to_one_that_they_share(
    cluster, whole
):
    expected = expected_of(whole, cluster, recipe="qadam-1bit")
    kept = ("--durability", "checkpoint", "--checkpoint-every", "3")
    gate = cluster.folder / "gate"
    os.mkfifo(gate)
    job = DyingJob(cluster, "killed", dies={}, kept=kept, recipe="qadam-1bit", gate=gate)
    for rank in range(2):
        copies = job.folder / "state" / f"worker-{rank}" / "copies"
        wait_until(lambda copies=copies: [*copies.glob("checkpoint-*3-0000")], f"{copies} of 3")
    job.server.wait_line("event=checkpointed version=3", err=True)
    for worker in job.workers:
        worker.wait_line(r"^step 3$")
    assert job.end(signal.SIGKILL) == [-signal.SIGKILL] * 3
    job.gate = None
    job.start_server()
    job.start_workers()
    for worker in job.workers:
        worker.wait_line(r"joined version=3 resumed=True resets=0")
    assert_same(job.result(), expected)
    assert "at version 4, the server at 3" in job.workers[0].err() + job.workers[1].err()


def test_a_worker_killed_while_it_writes_a_copy_has_the_one_before(cluster, whole):
    expected = expected_of(whole, cluster, recipe="qadam-1bit")
    kept = ("--durability", "checkpoint", "--checkpoint-every", "2")
    job = DyingJob(cluster, "killed", dies={1: "keeper.store:2"}, kept=kept, recipe="qadam-1bit")
    job.restart(1).wait_line(r"resumed=True resets=0")
    assert_same(job.result(), expected)


def test_a_machine_that_loses_its_memory_costs_the_residuals_and_that_is_said(cluster):
    job = DyingJob(cluster, "killed", dies={1: "keeper.flip:18"}, kept=KEPT, recipe="qadam-1bit")
    assert job.workers[1].wait() == -signal.SIGKILL
    job.end(signal.SIGKILL)
    job.turn_off()
    job.start_server()
    job.start_workers()
    for rank, worker in enumerate(job.workers):
        worker.wait_line(r"joined version=[45] resumed=False")
        # Whether its first copy had been written when it died is chance: if not, nothing is lost.
        had_kept = f"rank {rank} begins with a residual of zeros" in worker.err()
        worker.wait_line(rf"resumed=False resets={int(had_kept)}$")
    job.result()

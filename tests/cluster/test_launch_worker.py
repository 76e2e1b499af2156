"""psq-worker by itself: what it prints, how it leaves, and whom it listens to."""

from __future__ import annotations

import json
import signal
import sys

import pytest

from psq import kernels
from psq_worker.events import Evaluation, Progress, Started, Summary, parse_event

TASK = """
import signal

import torch
from torch import nn


class Tiny:
    name = "tiny"
    metric = "val_loss"

    def model(self, seed):
        torch.manual_seed(seed)
        return nn.Linear(10, 2, bias=False)

    def loss(self, model, batch):
        return ((model(batch) - batch[:, :2]) ** 2).mean()

    def batches(self, *, rank, world_size, batch_size, seed, start_step=0):
        draw = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(batch_size, 10, generator=draw)

    def evaluate(self, model):
        return {"val_loss": 0.5}


class Stuck(Tiny):
    # the fourth batch comes only to who begins with it

    def batches(self, *, start_step=0, **where):
        for step, batch in enumerate(super().batches(**where), start_step):
            if step == 3 > start_step:
                print("stuck", flush=True)
                signal.pause()
            yield batch
"""

ENDLESS = """
import torch
import psq.torch

model = torch.nn.Linear(10, 2)
ps = psq.torch.Worker(model)
while True:
    model(torch.ones(4, 10)).sum().backward()
    if ps.step().step == 2:
        print("training", flush=True)
"""


@pytest.fixture
def work(cluster):
    """Start psq-worker beside a task of its own."""
    (cluster.folder / "tiny.py").write_text(TASK)
    (cluster.folder / "endless.py").write_text(ENDLESS)

    def start(*words, **variables):
        command = [sys.executable, "-m", "psq_worker", *words]
        return cluster.command(*command, name="psq-worker", **variables)

    return start


TRAIN = ("--task", "tiny:Tiny", "--steps", "6", "--eval-every", "3", "--batch-size", "4")


def test_json_progress_is_events_in_order_and_the_summary_last(cluster, work):
    server = cluster.server()
    flags = ["--progress", "json", "--progress-every", "0", "--json"]
    worker = work(*TRAIN, *flags, "--connect", server.endpoint)
    assert worker.wait() == 0
    events = [parse_event(line) for line in worker.out().splitlines()]
    kinds = [type(event) for event in events]
    assert kinds == [
        *[Started, Started],
        *[Progress] * 3,
        Evaluation,
        *[Progress] * 3,
        Evaluation,
        Summary,
    ]
    summary = events[-1]
    assert (summary.step, summary.samples, summary.numel, summary.world_size) == (6, 24, 20, 1)
    assert summary.scores == {"val_loss": 0.5}
    assert 0 < summary.sent_bytes < 6 * 1000
    assert summary.timed_steps == 4
    assert server.wait() == 0


def test_without_flags_words_go_to_stderr_and_nothing_to_stdout(cluster, work):
    server = cluster.server()
    worker = work(*TRAIN, "--connect", server.endpoint, "--progress-every", "0")
    assert worker.wait() == 0
    assert worker.out() == ""
    codecs = "lloyd-max:bits=4,block=256 up, mean sign down"
    level = kernels.level()
    assert f"tiny: shared-adam ({codecs}), 20 parameters, {level} kernels\n" in worker.err()
    assert "rank 0  step 6/6  loss" in worker.err()
    assert "rank 0  done in" in worker.err()


def test_the_summary_is_one_line_of_json_when_asked_for(cluster, work):
    server = cluster.server()
    worker = work(*TRAIN, "--connect", server.endpoint, "--progress", "none", "--json")
    assert worker.wait() == 0
    (line,) = worker.out().splitlines()
    assert json.loads(line)["psq"] == "summary"
    assert worker.err() == ""


def test_variables_and_torchruns_rank_are_understood(cluster, work):
    server = cluster.server("--world-size", "2")
    for rank in "01":
        work(*TRAIN, PSQ_CONNECT=server.endpoint, RANK=rank, WORLD_SIZE="2", PSQ_RECIPE="fp32")
    assert server.wait() == 0


def test_a_worker_in_the_place_of_a_dead_one_makes_the_steps_that_are_left(cluster, work):
    server = cluster.server()
    flags = ("--steps", "5", "--progress", "none", "--json", "--connect", server.endpoint)
    dead = work("--task", "tiny:Stuck", *flags)
    dead.wait_line("stuck")
    dead.signal(signal.SIGKILL)
    heir = work("--task", "tiny:Stuck", *flags)
    assert heir.wait() == 0
    assert json.loads(heir.out().splitlines()[-1])["step"] == 2
    assert server.wait() == 0


@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [(signal.SIGTERM, 0, "interrupted"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_worker_that_is_told_to_end_says_so_to_the_server(cluster, work, number, code, reason):
    server = cluster.server()
    worker = work("--connect", server.endpoint, "endless.py")
    worker.wait_line("training")
    worker.signal(number)
    assert worker.wait() == code
    server.wait_line(f"event=left rank=0 reason={reason}", err=True)
    assert "Traceback" not in worker.err()


@pytest.mark.parametrize(
    ("ending", "code", "reason"),
    [
        ("", 0, "done"),
        ("raise SystemExit(0)", 0, "done"),
        ("raise SystemExit(3)", 3, "error"),
        ("raise ValueError('mine')", 1, "error"),
    ],
)
def test_however_a_script_ends_its_worker_leaves_with_the_reason(
    cluster, work, ending, code, reason
):
    script = "import torch, psq.torch\nps = psq.torch.Worker(torch.nn.Linear(2, 2))\n" + ending
    (cluster.folder / "train.py").write_text(script)
    server = cluster.server()
    worker = work("--connect", server.endpoint, "train.py")
    assert worker.wait() == code
    server.wait_line(f"event=left rank=0 reason={reason}", err=True)
    assert ("mine" in worker.err()) == ("mine" in ending)


def test_a_server_that_is_not_there_is_given_up_after_the_time_said(work):
    worker = work(*TRAIN, "--connect", "tcp://127.0.0.1:9", "--give-up-after", "0.5")
    assert worker.wait() == 75
    assert "psq-worker: error: gave up after" in worker.err()
    assert "tcp://127.0.0.1:9" in worker.err()


def test_a_server_that_trains_something_else_refuses_and_says_what(cluster, work):
    server = cluster.server("--recipe", "fp32")
    worker = work(*TRAIN, "--connect", server.endpoint)
    assert worker.wait() == 78
    assert "psq-worker: error: " in worker.err()
    assert "fp32" in worker.err()


def test_a_variable_that_means_nothing_is_warned_of(work):
    worker = work("--task", "tiny:Huge", PSQ_WORLDSIZE="2", PSQ_XYZZY="1")
    worker.wait()
    assert "WARNING PSQ_WORLDSIZE has no effect: did you mean PSQ_WORLD_SIZE?" in worker.err()
    assert "WARNING PSQ_XYZZY has no effect: psq reads no such variable" in worker.err()


def test_a_task_that_is_not_there_is_named(work):
    worker = work("--task", "tiny:Huge")
    assert worker.wait() == 78
    assert "module 'tiny' has no attribute 'Huge'" in worker.err()

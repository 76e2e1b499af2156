"""psq launch starts again what died, gives up in words, and goes on with a job that was stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest
from kept_job import fast_folder
from safetensors.numpy import load_file

DEADLINE_S = 100.0
TASK = '''
import os
import torch
from torch import nn


class Tiny:
    """Fit a line, with dropout: what it draws depends on the random numbers of the process."""

    name = "tiny"
    metric = "val_loss"

    def model(self, seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(10, 8), nn.Dropout(0.2), nn.Linear(8, 2))

    def loss(self, model, batch):
        return ((model(batch) - batch[:, :2]) ** 2).mean()

    def batches(self, *, rank, world_size, batch_size, seed, start_step=0):
        step = start_step
        while True:
            whole = torch.Generator().manual_seed(seed * 1000 + step)
            batch = torch.randn(world_size * batch_size, 10, generator=whole)
            if step == int(os.environ.get("TINY_FAILS", "-1")) and rank == 1:
                raise RuntimeError("the data is gone")
            yield batch[rank * batch_size : (rank + 1) * batch_size]
            step += 1

    def evaluate(self, model):
        with torch.no_grad():
            return {"val_loss": float(self.loss(model, torch.ones(4, 10)))}
'''


class Launches:
    """Runs of psq launch in a folder, each with its own state."""

    def __init__(self, folder):
        self.folder = folder
        self.started = []
        (folder / "tiny.py").write_text(TASK)

    def start(self, name, *options, steps=12, **variables):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PSQ_")}
        words = ["-n", "2", "--task", "tiny:Tiny", "--steps", str(steps), "--batch-size", "8"]
        words += ["--recipe", "qadam-1bit", "--save", f"{name}.safetensors", *options]
        process = subprocess.Popen(
            [sys.executable, "-m", "psq_worker.cli", "launch", *words],
            cwd=self.folder,
            env={**kept, "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1", **variables},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, name, *options, **given):
        """Run to the end: (exit code, what it said, the weights it saved)."""
        process = self.start(name, *options, **given)
        _, said = process.communicate(timeout=DEADLINE_S)
        saved = self.folder / f"{name}.safetensors"
        weights = load_file(saved) if saved.exists() else {}
        return process.returncode, said, {k: v.tobytes() for k, v in weights.items()}


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    made = Launches(tmp_path_factory.mktemp("launches"))
    yield made
    for process in made.started:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stderr.close()
    for state_dir in made.folder.glob("state-*"):
        for rank in range(2):
            shutil.rmtree(fast_folder(state_dir, rank), ignore_errors=True)


@pytest.fixture(scope="module")
def whole(launches):
    code, said, weights = launches.run("whole")
    assert code == 0, said
    return weights


@pytest.mark.parametrize(
    ("failpoint", "who"),
    [("keeper.flip:5", ("rank 0", "rank 1")), ("journal.append:7", ("server",))],
    ids=["workers", "server"],
)
def test_processes_that_die_are_started_again_and_nothing_else_changes(
    launches, whole, failpoint, who
):
    name = failpoint.split(".")[0]
    options = ("--state-dir", f"state-{name}", "--max-restarts", "2")
    code, said, weights = launches.run(name, *options, PSQ_FAILPOINT=failpoint)
    assert code == 0, said
    for each in who:
        assert f"{each} was killed by SIGKILL: started again (1 of 2)" in said
    assert weights == whole


def test_a_process_that_dies_again_and_again_is_given_up_in_words(launches):
    options = ("--state-dir", "state-fails", "--max-restarts", "1")
    code, said, _ = launches.run("fails", *options, TINY_FAILS="4")
    assert code == 1
    assert "rank 1 ended with code 1: started again (1 of 1)" in said
    assert "rank 1 ended with code 1; given up after 1 restarts (--max-restarts)" in said
    assert "the data is gone" in said


def test_a_job_that_was_stopped_ends_with_the_bytes_of_one_that_was_not(launches):
    long = 60
    _, _, expected = launches.run("long", steps=long)
    options = ("--state-dir", "state-stops")
    process = launches.start("stops", *options, steps=long, PSQ_FAILPOINT="keeper.close:30")
    # The workers die amid the job, so psq launch ends everything: no moment is special.
    _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 128 + signal.SIGKILL, said
    code, said, weights = launches.run("stops", *options, steps=long)
    assert code == 0, said
    assert weights == expected


def test_restarts_without_a_folder_are_refused(launches):
    code, said, _ = launches.run("refused", "--max-restarts", "1")
    assert code == 78
    assert "without --state-dir a process that is started again has nothing to go on from" in said

"""How a launched job ends: without a worker, in a folder that is done, after a late kill."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from kept_job import fast_folder

DEADLINE_S = 90.0
SOON_S = 15.0
"""Starting three processes that import torch takes most of it; the waits that were are longer."""
STEPS = 6

TRAIN = """
import os
import signal
import sys
from pathlib import Path

import torch

import psq.torch
from psq.config import worker_config


def server():
    # The launcher's other child.
    launcher = os.getppid()
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if b"psq_server" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return int(pid)


what = sys.argv[1]
if what == "absent" and worker_config().rank == int(sys.argv[2]):
    sys.exit()
model = torch.nn.Linear(10, 2)
with psq.torch.Worker(model, lr=0.01) as ps:
    for step in range(ps.steps, 6):
        if what == "waits" and ps.rank == 0 and step == 3:
            Path("gate").read_bytes()
        if what in ("dies", "waits") and ps.rank in map(int, sys.argv[2:]) and step == 3:
            if what == "waits" and ps.resumed:
                Path("gate").write_bytes(b"!")
            os.kill(os.getpid(), signal.SIGKILL)
        model(torch.ones(4, 10)).sum().backward()
        ps.step(loss=1.0, samples=4)
    if what == "goodbye" and ps.rank == 0:
        os.kill(server(), signal.SIGKILL)
"""


class Launcher:
    """Runs psq launch in a folder of its own."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "train.py").write_text(TRAIN)

    def run(self, *options, script=()):
        """(exit code, stdout, stderr, seconds)."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PSQ_")}
        words = ["launch", "--recipe", "server-adam", *options, "train.py", "--", *script]
        began_s = time.monotonic()
        ended = subprocess.run(
            [sys.executable, "-m", "psq_worker.cli", *words],
            cwd=self.folder,
            env={**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        return ended.returncode, ended.stdout, ended.stderr, time.monotonic() - began_s


@pytest.fixture
def launcher(tmp_path):
    yield Launcher(tmp_path)
    for rank in range(3):
        shutil.rmtree(fast_folder(tmp_path / "state", rank), ignore_errors=True)


def test_an_elastic_job_goes_on_without_a_killed_worker_and_says_so(launcher):
    options = ("-n", "3", "--min-workers", "2", "--lease", "5", "--grace", "20", "--json")
    code, out, said, _ = launcher.run(*options, script=("dies", "2"))
    assert code == 0, said
    assert "rank 2 was killed by SIGKILL: the job goes on with 2 of 3 workers" in said
    assert "event=evicted rank=2" in said
    summary = json.loads(out)
    assert summary["lost"] == [{"rank": 2, "exit_code": 137}]
    assert summary["workers"] == 3
    assert summary["steps"] == STEPS


def test_a_worker_is_missed_only_when_its_restarts_are_used_up(launcher):
    options = ("-n", "2", "--min-workers", "1", "--state-dir", "state", "--max-restarts", "1")
    os.mkfifo(launcher.folder / "gate")
    code, out, said, _ = launcher.run(*options, script=("waits", "1"))
    assert code == 0, said
    assert "rank 1 was killed by SIGKILL: started again (1 of 1)" in said
    given_up = "rank 1 was killed by SIGKILL, given up after 1 restarts (--max-restarts): the job"
    assert given_up in said
    assert "1 lost on the way" in out
    assert "rank 1 137" in out


def test_a_worker_that_is_back_when_the_job_is_done_is_ended(launcher):
    options = ("-n", "2", "--min-workers", "1", "--state-dir", "state", "--max-restarts", "1")
    code, out, said, _ = launcher.run(*options, "--json", script=("dies", "1"))
    assert code == 0, said
    assert "rank 1 was killed by SIGKILL: started again (1 of 1)" in said
    # Whichever comes first: its second death, or the end of a job that did not wait for it.
    assert json.loads(out)["lost"] in ([{"rank": 1, "exit_code": c}] for c in (137, None))


def test_an_elastic_job_ends_with_the_code_of_the_worker_that_it_cannot_do_without(launcher):
    options = ("-n", "3", "--min-workers", "2", "--grace", "20")
    code, _, said, _ = launcher.run(*options, script=("dies", "1", "2"))
    assert code == 137
    assert "the job goes on with 2 of 3 workers (--min-workers 2)" in said
    assert "SIGKILL (code 137)" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-n", "2", "--min-workers", "3"), "min_workers: expected 1 to 2"),
        (("-n", "4", "--tree", "2", "--min-workers", "3"), "leave --tree or --min-workers out"),
        (("-n", "2", "--grace", "3"), "grace: without --min-workers every rank is waited for"),
    ],
)
def test_what_cannot_be_elastic_is_refused_before_anything_starts(launcher, options, words):
    code, _, said, _ = launcher.run(*options, script=("trains",))
    assert code == 78
    assert words in said
    assert "psq launch train.py" not in said


def test_a_folder_whose_job_is_done_is_refused_at_once_with_what_to_do(launcher):
    options = ("-n", "2", "--state-dir", "state")
    code, _, said, _ = launcher.run(*options, script=("trains",))
    assert code == 0, said
    code, _, said, took_s = launcher.run(*options, script=("trains",))
    assert code == 1
    assert "the job in state is done already: name another folder for a new one" in said
    assert took_s < SOON_S


def test_a_server_that_is_killed_as_all_say_goodbye_ends_with_its_weights(launcher):
    options = ("-n", "2", "--state-dir", "state", "--max-restarts", "2", "--save", "w.safetensors")
    code, _, said, _ = launcher.run(*options, script=("goodbye",))
    assert code == 0, said
    assert "server was killed by SIGKILL: started again (1 of 2)" in said
    assert (launcher.folder / "w.safetensors").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_script_that_makes_no_worker_ends_the_job_at_once_by_rank(launcher, rank):
    code, _, said, took_s = launcher.run("-n", "2", script=("absent", rank))
    assert code == 1
    assert f"rank {rank} ended before the job did; it never joined" in said
    assert "every rank must make a psq.torch.Worker" in said
    assert took_s < SOON_S

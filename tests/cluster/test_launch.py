"""psq launch, with real processes: it trains, it fails clearly, and it never leaves an orphan."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jsonschema
import pytest

DEADLINE_S = 60.0
STOP_S = 2.0

TASK = '''
import torch
from torch import nn


class Tiny:
    """Fit a line: a model of 20 values."""

    name = "tiny"
    metric = "val_loss"
    description = "ten numbers in, two out"

    def model(self, seed):
        torch.manual_seed(seed)
        return nn.Linear(10, 2, bias=False)

    def loss(self, model, batch):
        return ((model(batch) - batch[:, :2]) ** 2).mean()

    def batches(self, *, rank, world_size, batch_size, seed, start_step=0):
        step = start_step
        while True:
            whole = torch.Generator().manual_seed(seed * 1000 + step)
            batch = torch.randn(world_size * batch_size, 10, generator=whole)
            yield batch[rank * batch_size : (rank + 1) * batch_size]
            step += 1

    def evaluate(self, model):
        batch = torch.randn(64, 10, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            return {"val_loss": float(self.loss(model, batch))}
'''

# Trains until it is stopped; says its process id once all ranks take part.
ENDLESS = """
import os
import torch
import psq.torch

model = torch.nn.Linear(10, 2)
with psq.torch.Worker(model, lr=0.01) as ps:
    step = 0
    while True:
        model(torch.ones(4, 10)).sum().backward()
        ps.step()
        step += 1
        if step == 3:
            print("training in", os.getpid())
"""

NUMBER = {"type": "number"}
SUMMARY_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["task", "recipe", "workers", "steps", "numel", "wire", "step_s", "score"],
    "properties": {
        "task": {"const": "tiny"},
        "recipe": {"type": "string", "pattern": "^server-adam "},
        "workers": {"const": 2},
        "servers": {"const": 1},
        "consistency": {"const": "bsp"},
        "lost": {"const": []},
        "staleness": {"const": {"mean": 0.0, "max": 0}},
        "exposed_s": {"type": "number", "exclusiveMinimum": 0},
        "payload_bits": {"const": 104.0},  # a scale and 512 codes of 4 bits, for 20 values
        "bits_curve": {"const": [{"step": step, "bits": 104.0} for step in (1, 6, 12)]},
        "steps": {"const": 12},
        "numel": {"const": 20},
        "samples": {"const": 2 * 12 * 8},
        "samples_per_s": {"type": "number", "exclusiveMinimum": 0},
        "elapsed_s": {"type": "number", "exclusiveMinimum": 0},
        "loss": NUMBER,
        "metric": {"const": "val_loss"},
        "score": NUMBER,
        "scores": {"type": "object", "additionalProperties": NUMBER},
        "skipped": {"const": 0},
        "rejected": {"const": 0},
        "wire": {
            "type": "object",
            "additionalProperties": {"type": "number", "exclusiveMinimum": 0},
            "minProperties": 7,
        },
        "step_s": {
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": 0},
            "required": ["total", "compute", "encode", "wire", "server", "decode"],
        },
    },
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny.py").write_text(TASK)
    (tmp_path / "endless.py").write_text(ENDLESS)
    return tmp_path


def environment():
    kept = {name: text for name, text in os.environ.items() if not name.startswith("PSQ_")}
    return {**kept, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}


def command(*words):
    return [sys.executable, "-m", "psq_worker.cli", *words]


def run(folder, *words, **variables):
    return subprocess.run(
        command(*words),
        cwd=folder,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def write_script(folder, code):
    (folder / "train.py").write_text(textwrap.dedent(code))
    return "train.py"


def descendants(pid):
    """Every living process that has `pid` among its ancestors."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                parents[int(path.parent.name)] = int(fields[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def living(pids):
    alive = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            alive |= {pid} if fields[0] != "Z" else set()
    return alive


def wait_until_gone(pids):
    deadline = time.monotonic() + DEADLINE_S
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            os.close(descriptor)
    assert not living(pids)


@contextlib.contextmanager
def training(folder, workers=2):
    """A launcher whose workers train, and the ids of all its processes."""
    words = command("launch", "-n", str(workers), "endless.py")
    with subprocess.Popen(
        words, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = 0
        for line in process.stderr:
            said += "training in" in line
            if said == workers:
                break
        children = descendants(process.pid)
        assert len(children) == workers + 1
        try:
            yield process, children
        finally:
            process.kill()
            process.stderr.read()
            wait_until_gone(children)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")


def test_a_task_is_trained_by_real_processes_and_summed_up_as_json(folder):
    flags = ["--task", "tiny:Tiny", "--steps", "12", "--batch-size", "8", "--eval-every", "6"]
    flags += ["--recipe", "server-adam"]
    result = run(folder, "launch", "-n", "2", *flags, "--lr", "0.05", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    jsonschema.validate(summary, SUMMARY_SCHEMA)
    assert summary["score"] < 1.5
    assert "ten numbers in, two out; 20 parameters" in result.stderr
    assert re.search(r"server on tcp://127\.0\.0\.1:\d+, \w+ kernels", result.stderr)
    assert "step 12/12" in result.stderr


def test_a_table_is_printed_when_json_is_not_wanted(folder):
    variables = {"PSQ_TASK": "tiny:Tiny", "PSQ_STEPS": "3", "PSQ_WORKERS": "1"}
    result = run(folder, "launch", **variables)
    assert result.returncode == 0, result.stderr
    assert "tiny: 1 worker, shared-adam" in result.stdout
    assert "bits per parameter, up" in result.stdout


def test_settings_of_a_file_reach_server_and_workers(folder):
    (folder / "psq.toml").write_text(
        '[launch]\nworkers = 1\n[server]\nsave = "weights.safetensors"\n'
        '[worker]\ntask = "tiny:Tiny"\nsteps = 2\nrecipe = "fp32"\n'
    )
    result = run(folder, "launch", "--config", "psq.toml", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["recipe"].startswith("fp32 ")
    assert (folder / "weights.safetensors").exists()


def test_a_script_runs_as_python_would_run_it_with_its_own_arguments(folder):
    (folder / "beside.py").write_text("WORDS = 'imported from beside the script'\n")
    script = write_script(
        folder,
        """
        import sys
        import torch
        import beside
        import psq.torch

        assert __name__ == "__main__"
        model = torch.nn.Linear(10, 2)
        ps = psq.torch.Worker(model)
        for _ in range(3):
            loss = model(torch.ones(4, 10)).sum()
            loss.backward()
            ps.step(loss, samples=4)
        print(sys.argv, beside.WORDS, ps.rank, "of", ps.world_size, ps.lr)
        """,
    )
    words = [
        "launch",
        "-n",
        "2",
        "--lr",
        "0.25",
        "--json",
        script,
        "--",
        "--epochs",
        "3",
        "-n",
        "x",
    ]
    result = run(folder, *words)
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        said = f"imported from beside the script {rank} of 2 0.25"
        assert f"rank {rank} | ['train.py', '--epochs', '3', '-n', 'x'] {said}" in result.stderr
    assert json.loads(result.stdout)["steps"] == 3


@needs_proc
def test_a_script_that_fails_ends_all_with_its_code_and_its_last_words(folder):
    script = write_script(
        folder,
        """
        import os
        import sys
        import torch
        import psq.torch

        model = torch.nn.Linear(10, 2)
        with psq.torch.Worker(model) as ps:
            while True:
                model(torch.ones(4, 10)).sum().backward()
                if ps.step().step == 2 and ps.rank == 1:
                    print("the disk is gone", file=sys.stderr)
                    sys.exit(7)
        """,
    )
    before = descendants(os.getpid())
    result = run(folder, "launch", "-n", "2", script)
    assert result.returncode == 7
    assert re.search(r"psq: error: rank 1 ended with code 7(.|\n)*the disk is gone", result.stderr)
    assert "Traceback" not in result.stderr
    assert not descendants(os.getpid()) - before


def test_a_users_own_error_shows_the_users_traceback(folder):
    script = write_script(folder, "def mine():\n    raise ValueError('my own mistake')\nmine()\n")
    result = run(folder, "launch", "-n", "1", script)
    assert result.returncode == 1
    assert "in mine" in result.stderr
    assert "my own mistake" in result.stderr
    for frames_of_ours in ("psq_worker", "runpy", "click"):
        assert frames_of_ours not in result.stderr


def test_a_script_that_is_not_python_shows_the_line_and_nothing_of_psq(folder):
    script = write_script(folder, "good = 1\nbad bad\n")
    result = run(folder, "launch", "-n", "1", script)
    assert result.returncode == 1
    assert "line 2" in result.stderr
    assert "psq_worker" not in result.stderr


def test_an_error_of_psq_is_one_line_and_its_own_code(folder):
    script = write_script(folder, "import psq.torch, torch\npsq.torch.Worker(torch.nn.ReLU())\n")
    result = run(folder, "launch", "-n", "1", script)
    assert result.returncode == 78
    assert "psq-worker: error: the model has no parameters" in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback_of_an_error_of_psq(folder):
    script = write_script(folder, "import psq.torch, torch\npsq.torch.Worker(torch.nn.ReLU())\n")
    result = run(folder, "launch", "-n", "1", "--debug", script)
    assert "Traceback" in result.stderr


def test_a_server_that_cannot_start_is_reported_with_what_it_said(folder):
    result = run(folder, "launch", "--save", "no/such/folder/x.safetensors", "endless.py")
    assert result.returncode != 0
    assert "psq: error: server ended with code" in result.stderr
    assert "no/such/folder" in result.stderr


@needs_proc
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_everything_within_two_seconds(folder, number, code):
    with training(folder) as (process, children):
        process.send_signal(number)
        began_s = time.monotonic()
        assert process.wait(DEADLINE_S) == code
        took_s = time.monotonic() - began_s
        assert not living(children)
        assert took_s < STOP_S


@needs_proc
def test_ctrl_c_while_workers_still_start_ends_everything_too(folder):
    with subprocess.Popen(
        command("launch", "-n", "2", "endless.py"),
        cwd=folder,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "server on tcp://" in line:
                break
        process.send_signal(signal.SIGINT)
        began_s = time.monotonic()
        assert process.wait(DEADLINE_S) == 130
        assert time.monotonic() - began_s < STOP_S
        assert not descendants(process.pid)


@needs_proc
def test_a_launcher_that_is_killed_leaves_no_process(folder):
    with training(folder) as (process, children):
        assert living(children) == children
        process.kill()
        process.wait(DEADLINE_S)
        wait_until_gone(children)


@needs_proc
def test_a_worker_that_is_killed_ends_all(folder):
    with training(folder) as (process, children):
        victim = max(children)
        os.kill(victim, signal.SIGKILL)
        assert process.wait(DEADLINE_S) == 137
        assert not living(children)


def test_the_demo_leaves_a_picture_and_numbers(folder):
    flags = ["--task", "tiny:Tiny", "--steps", "8", "--eval-every", "4", "--lr", "0.05"]
    flags += ["--adam", "beta=0.5,weight_decay=0.3"]  # of both jobs
    result = run(folder, "demo", *flags, "--recipe", "fp32", "--output", "seen")
    assert result.returncode == 0, result.stderr
    assert "plain Adam, fp32" in result.stdout
    assert str(folder / "seen" / "demo.png") in result.stdout
    assert (folder / "seen" / "demo.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((folder / "seen" / "demo.json").read_text())
    # fp32 messages, the same samples and steps: the cluster is plain Adam but for rounding.
    assert abs(numbers["score_difference"]) < 1e-4
    assert numbers["psq"]["samples"] == numbers["baseline"]["samples"]
    assert len(numbers["curves"]["psq"]["scores"]) == 2
    assert numbers["learning_rates"] is None


def test_the_demo_of_a_recipe_without_adam_says_both_learning_rates(folder):
    flags = ["--task", "tiny:Tiny", "--steps", "8", "--eval-every", "4", "--json"]
    result = run(folder, "demo", *flags, "--recipe", "sign-majority", "--output", "seen")
    assert result.returncode == 0, result.stderr
    assert "for Adam; what recipe sign-majority wants: lr about a tenth" in result.stderr
    numbers = json.loads(result.stdout)
    assert numbers["psq"]["recipe"].endswith(", aggregate majority")
    assert numbers["learning_rates"] == {"psq": 1e-3, "baseline": 1e-3}
    assert numbers["psq"]["samples"] == numbers["baseline"]["samples"]
    flags += ["--lr", "0.25"]
    result = run(folder, "demo", *flags, "--recipe", "sign-majority", "--output", "seen")
    assert "for Adam" not in result.stderr
    typed = json.loads(result.stdout)
    assert typed["learning_rates"] == {"psq": 0.25, "baseline": 1e-3}
    assert typed["baseline"]["score"] == numbers["baseline"]["score"]
    assert typed["psq"]["score"] != numbers["psq"]["score"]

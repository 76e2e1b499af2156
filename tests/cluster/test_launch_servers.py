"""psq launch with several servers: real processes, whole shards, one file at the end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

DEADLINE_S = 90.0
STOP_S = 2.0

# Trains a model of a few shards; each rank leaves its replica for whoever compares.
TRAIN = """
import sys
import numpy as np
import torch
import psq.torch

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 600), torch.nn.Tanh(), torch.nn.Linear(600, 64))
steps = int(sys.argv[1])
with psq.torch.Worker(model, lr=0.01) as ps:
    for step in range(steps):
        draw = torch.Generator().manual_seed(1000 * step + ps.rank)
        x = torch.randn(4, 64, generator=draw)
        loss = ((model(x) - x.tanh()) ** 2).mean()
        loss.backward()
        report = ps.step(loss, samples=4)
    if ps.rank == 0:
        print("plan:", ps.plan.servers, "servers,", ps.plan.consistency)
    name = f"rank{ps.rank}.npz"
arrays = {name: value.detach().numpy() for name, value in model.named_parameters()}
np.savez(name, **arrays)
"""

# Trains until it is stopped; says so once it is under way.
ENDLESS = """
import torch
import psq.torch

model = torch.nn.Linear(128, 512)
with psq.torch.Worker(model, lr=0.01) as ps:
    step = 0
    while True:
        model(torch.ones(4, 128)).sum().backward()
        ps.step()
        step += 1
        if step == 3:
            print("training")
"""

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "endless.py").write_text(ENDLESS)
    return tmp_path


def environment():
    kept = {name: text for name, text in os.environ.items() if not name.startswith("PSQ_")}
    return {**kept, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}


def command(*words):
    return [sys.executable, "-m", "psq_worker.cli", *words]


def run(folder, *words):
    return subprocess.run(
        command(*words),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def replicas(folder, workers):
    return [dict(np.load(folder / f"rank{rank}.npz")) for rank in range(workers)]


def assert_equal_bytes(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.shape == other[name].shape, name
        assert value.tobytes() == other[name].tobytes(), name


def fields_of(pid):
    """State and parent of a living process; None when there is none."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] != "Z":
            return fields
    return None


def children_of(pid):
    """The command line of each direct child, by its process id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        fields = fields_of(path.name)
        if fields is not None and int(fields[1]) == pid:
            with contextlib.suppress(OSError):
                found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
    return found


@contextlib.contextmanager
def training(folder, workers, servers, *words):
    """A launcher whose workers train, and its children's command lines by process id."""
    line = command("launch", "-n", str(workers), "-s", str(servers), *words, "endless.py")
    with subprocess.Popen(
        line, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = 0
        for text in process.stderr:
            said += text.rstrip().endswith("| training")
            if said == workers:
                break
        children = children_of(process.pid)
        assert len(children) == workers + servers
        try:
            yield process, children
        finally:
            process.kill()
            process.stderr.close()


@pytest.mark.parametrize(("workers", "servers"), [(4, 2), (8, 4)])
def test_workers_and_servers_train_together_and_one_file_holds_what_every_replica_holds(
    folder, workers, servers
):
    words = ["-n", str(workers), "-s", str(servers), "--save", "weights.safetensors", "--json"]
    result = run(folder, "launch", *words, "train.py", "--", "5")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["workers"], summary["servers"], summary["steps"]) == (workers, servers, 5)
    assert summary["skipped"] == 0
    assert f"rank 0 | plan: {servers} servers, bsp" in result.stderr
    for number in range(servers):
        assert re.search(rf"server {number} on tcp://127\.0\.0\.1:\d+, \w+ kernels", result.stderr)
    trained = replicas(folder, workers)
    for replica in trained[1:]:
        assert_equal_bytes(trained[0], replica)
    assert_equal_bytes(trained[0], load_file(folder / "weights.safetensors"))
    assert not list(folder.glob("*.server*"))


def test_what_several_servers_train_is_what_one_would(folder):
    """The recipe keeps no state across shards, so the cut makes no difference but to rounding."""
    for servers in (1, 2):
        words = ["-n", "2", "-s", str(servers), "--save", f"{servers}.safetensors"]
        result = run(folder, "launch", *words, "--recipe", "fp32", "train.py", "--", "6")
        assert result.returncode == 0, result.stderr
    one, two = (load_file(folder / f"{servers}.safetensors") for servers in (1, 2))
    assert_equal_bytes(one, two)


@needs_proc
@pytest.mark.parametrize("victim", [0, 1])
def test_a_server_that_is_killed_ends_the_job_by_its_name_and_leaves_nobody(folder, victim):
    with training(folder, 2, 2) as (process, children):
        servers = sorted(pid for pid, line in children.items() if "psq_server" in line)
        os.kill(servers[victim], signal.SIGKILL)
        assert process.wait(DEADLINE_S) == 137
        assert process.stderr is not None
        assert f"server {victim} ended with SIGKILL" in process.stderr.read()
        assert not any(fields_of(pid) for pid in children)


@needs_proc
def test_ctrl_c_ends_all_servers_in_time_and_their_weights_are_put_together(folder):
    with training(folder, 2, 2, "--save", "weights.safetensors") as (process, children):
        process.send_signal(signal.SIGINT)
        began_s = time.monotonic()
        assert process.wait(DEADLINE_S) == 130
        assert time.monotonic() - began_s < STOP_S
        assert not any(fields_of(pid) for pid in children)
    weights = load_file(folder / "weights.safetensors")
    assert {name: value.shape for name, value in weights.items()} == {
        "weight": (512, 128),
        "bias": (512,),
    }
    with safe_open(folder / "weights.safetensors", "np") as file:
        assert file.metadata()


def test_a_model_too_small_for_so_many_servers_is_refused_with_how_many_would_do(folder):
    result = run(folder, "launch", "-n", "1", "-s", "60", "train.py", "--", "2")
    assert result.returncode == 78
    assert re.search(r"60 servers.*start \d+ or fewer", result.stderr)


def test_workers_may_be_apart_by_no_more_than_they_were_told(folder):
    words = ["-n", "3", "-s", "2", "--consistency", "ssp:2", "--json", "--recipe", "server-adam"]
    result = run(folder, "launch", *words, "train.py", "--", "12")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["consistency"] == "ssp:2"
    assert 0 <= summary["staleness"]["max"] <= 2
    assert "rank 0 | plan: 2 servers, ssp:2" in result.stderr


def test_overlapped_training_leaves_the_same_bytes(folder):
    kept = []
    for words in ([], ["--overlap"]):
        name = f"{len(kept)}.safetensors"
        result = run(folder, "launch", "-s", "2", "--save", name, *words, "train.py", "--", "5")
        assert result.returncode == 0, result.stderr
        kept.append(load_file(folder / name))
    assert_equal_bytes(*kept)

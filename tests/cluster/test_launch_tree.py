"""psq launch --tree: aggregators between the workers and one or several servers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

DEADLINE_S = 120.0

TRAIN = """
import sys
import numpy as np
import torch
import psq.torch

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 600), torch.nn.Tanh(), torch.nn.Linear(600, 64))
with psq.torch.Worker(model, lr=0.01) as ps:
    for step in range(int(sys.argv[1])):
        draw = torch.Generator().manual_seed(1000 * step + ps.rank)
        x = torch.randn(4, 64, generator=draw)
        loss = ((model(x) - x.tanh()) ** 2).mean()
        loss.backward()
        ps.step(loss, samples=4)
    name = f"{sys.argv[2]}{ps.rank}.npz"
np.savez(name, **{name: value.detach().numpy() for name, value in model.named_parameters()})
"""


def launched(folder: Path, *words: str, name: str = "rank", steps: int = 6) -> str:
    (folder / "train.py").write_text(TRAIN)
    kept = {key: text for key, text in os.environ.items() if not key.startswith("PSQ_")}
    line = [sys.executable, "-m", "psq_worker.cli", "launch", *words, "train.py", "--"]
    ended = subprocess.run(
        [*line, str(steps), name],
        cwd=folder,
        env={**kept, "COLUMNS": "100", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def weights(folder: Path, workers: int, name: str = "rank") -> dict[str, np.ndarray]:
    """What all workers hold, alike to the bit."""
    first, *others = (dict(np.load(folder / f"{name}{rank}.npz")) for rank in range(workers))
    for other in others:
        assert all(first[key].tobytes() == other[key].tobytes() for key in first)
    return first


def test_a_tree_of_two_levels_trains_all_workers_alike_and_the_root_saves(tmp_path):
    said = launched(
        tmp_path, "-n", "5", "--tree", "2", "--recipe", "server-adam", "--save", "w.safetensors"
    )
    assert "1 server, 3 aggregators, 5 workers" in said
    assert "aggregator 2-3 on tcp://" in said
    ours = weights(tmp_path, 5)
    saved = load_file(tmp_path / "w.safetensors")
    assert all(saved[name].tobytes() == value.tobytes() for name, value in ours.items())


def test_a_tree_trains_as_one_server_does_but_for_the_order_of_sums(tmp_path):
    launched(tmp_path, "-n", "4", "--recipe", "fp32", name="flat")
    launched(tmp_path, "-n", "4", "--recipe", "fp32", "--tree", "2", name="tree")
    flat, tree = weights(tmp_path, 4, "flat"), weights(tmp_path, 4, "tree")
    assert max(float(np.abs(flat[name] - tree[name]).max()) for name in flat) < 2e-4


def test_every_server_of_several_has_a_tree_of_its_own(tmp_path):
    said = launched(tmp_path, "-n", "3", "-s", "2", "--tree", "2", "--recipe", "qadam-1bit")
    assert "2 servers, 2 aggregators, 3 workers" in said
    assert "aggregator 0-1 of server 1 on tcp://" in said
    weights(tmp_path, 3)

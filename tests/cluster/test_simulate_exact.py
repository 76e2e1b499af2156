"""A simulated job and real processes of the same seed: the same losses and weights, to the bit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from psq.config import WorkerConfig
from psq_worker.recipes import recipe_of
from psq_worker.simulate import Network, SimConfig, simulate

STEPS = 12
DEADLINE_S = 90.0

TASK = '''
import os
from pathlib import Path

import torch
from torch import nn


class Waves:
    """Fit sines; writes down what it sees where WAVES says."""

    name = "waves"
    metric = "val_loss"

    def __init__(self):
        self.folder = Path(os.environ["WAVES"]) if "WAVES" in os.environ else None
        self.rank = None

    def model(self, seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 7))

    def loss(self, model, batch):
        loss = ((model(batch) - torch.sin(batch[:, :7])) ** 2).mean()
        if self.folder and self.rank is not None and model.training:
            with (self.folder / f"losses{self.rank}").open("a") as lines:
                lines.write(float(loss.detach()).hex() + "\\n")
        return loss

    def batches(self, *, rank, world_size, batch_size, seed, start_step=0):
        self.rank, step = rank, start_step
        while True:
            whole = torch.Generator().manual_seed(seed * 1000 + step)
            batch = torch.randn(world_size * batch_size, 12, generator=whole)
            yield batch[rank * batch_size : (rank + 1) * batch_size]
            step += 1

    def evaluate(self, model):
        model.eval()
        with torch.no_grad():
            batch = torch.randn(64, 12, generator=torch.Generator().manual_seed(7))
            score = float(self.loss(model, batch))
        model.train()
        if self.folder:
            flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
            (self.folder / "weights").write_bytes(flat.numpy().tobytes())
        return {"val_loss": score}
'''

RECIPES = {
    "server-adam": {},
    "qadam": {"residual": "bf16"},
    "local-adam": {"local_steps": 3},
    "shared-direction": {},
    "dqgan": {},
    "average": {},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "waves.py").write_text(TASK)
    return tmp_path


def launch(folder, words) -> None:
    """Two real workers and a real server."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("PSQ_")}
    env = {**kept, "WAVES": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "psq_worker.cli", "launch", "-n", "2", "--json", *words]
    subprocess.run(
        command, cwd=folder, env=env, check=True, timeout=DEADLINE_S, capture_output=True
    )


def load_task(folder):
    """The same task in this process."""
    spec = importlib.util.spec_from_file_location("waves", folder / "waves.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Waves()


@pytest.mark.parametrize("name", RECIPES)
def test_two_virtual_workers_are_two_processes_to_the_bit(name, folder):
    changed = RECIPES[name]
    words = ["--task", "waves:Waves", "--recipe", name, "--steps", str(STEPS), "--lr", "0.02"]
    words += ["--batch-size", "8", "--seed", "5", "--eval-every", str(STEPS)]
    for key, value in changed.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    launch(folder, words)
    told = WorkerConfig(recipe=name, **changed)
    config = SimConfig(
        task=load_task(folder),
        recipe=recipe_of(told),
        residual=told.residual,
        workers=2,
        steps=STEPS,
        lr=0.02,
        batch_size=8,
        seed=5,
        eval_every=STEPS,
        network=Network(1e7, latency_s=0.003),
    )
    result = simulate(config)
    for rank in range(2):
        real = [float.fromhex(t) for t in (folder / f"losses{rank}").read_text().split()]
        assert [point.losses[rank] for point in result.points] == real
    flat = np.concatenate([values.ravel() for values in result.weights.values()])
    assert flat.tobytes() == (folder / "weights").read_bytes()
    assert result.points[-1].loss < result.points[0].loss

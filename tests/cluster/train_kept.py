"""A small job whose workers keep their state, for tests that kill them.

    python train_kept.py --steps 8 --out rank0.npz [--die keeper.flip:5] [--gate FIFO]

Told by PSQ_* who it is. Draws each batch from the seed, the step and torch's own random numbers, so
that a worker that does not go on exactly where the one before it was ends elsewhere. Writes all of
its state at the end: weights, buffers, vectors, counters, random numbers.
"""

# ruff: noqa: T201 - a script that talks to its test

import argparse
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import psq.durable.failpoints
import psq.torch
from psq.errors import PsqError
from psq.presets import preset
from psq.recipe import Recipe

GATE_STEP = 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out")
    parser.add_argument("--die", help="a place and when it is reached, as in keeper.flip:5")
    parser.add_argument("--gate", help="a FIFO, opened for reading before step 4")
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--local-steps", type=int)
    parser.add_argument("--every", type=int)
    return parser.parse_args()


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 24), nn.BatchNorm1d(24), nn.Dropout(0.1), nn.Linear(24, 24), nn.Linear(24, 4)
    )


def make_recipe(given: argparse.Namespace) -> Recipe:
    made = preset(os.environ.get("PSQ_RECIPE", "server-adam"))
    return made.with_rhythm(local_steps=given.local_steps, every=given.every)


def batch(worker: psq.torch.Worker) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng((worker.steps, worker.rank))
    x = torch.from_numpy(rng.standard_normal((8, 8), np.float32))
    return x + 0.01 * torch.randn(8, 8), torch.tanh(x[:, :4] * 2.0)


def state_of(worker: psq.torch.Worker, model: nn.Module) -> dict[str, np.ndarray]:
    found = {f"state.{k}": v.copy() for k, v in worker._compressor.state_arrays().items()}
    found |= {f"model.{k}": v.numpy().copy() for k, v in model.state_dict().items()}
    shards = range(len(worker.plan.layout.shards))
    counts = [worker._compressor.counts(shard) for shard in shards]
    found["counts"] = np.array([[c.steps, c.moments, c.rule, c.codec] for c in counts])
    found["random"] = torch.get_rng_state().numpy()
    if worker._averaging is not None:
        for key, entry in worker._averaging.optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                found[f"optimizer.{key}.{name}"] = torch.as_tensor(value).numpy().copy()
    return found


def train(given: argparse.Namespace) -> dict[str, np.ndarray]:
    model, recipe = make_model(), make_recipe(given)
    groups = [psq.torch.Group("0.*", lr_factor=0.5), psq.torch.Group("3.*", lr_factor=2.0)]
    own = torch.optim.Adam(model.parameters(), 0.02) if recipe.apply.kind == "return" else None
    worker = psq.torch.Worker(
        model,
        lr=None if own is not None else 0.02,
        groups=groups,
        recipe=recipe,
        optimizer=own,
        overlap=given.overlap,
    )
    visited: list[int] = []
    worker.keep("visited", lambda: [*visited, worker.steps - 1][-3:], visited.extend)
    with worker:
        print(f"joined version={worker.version} resumed={worker.resumed} resets={_resets(worker)}")
        while worker.steps < given.steps:
            step = worker.steps
            if given.gate and step == GATE_STEP:
                Path(given.gate).read_bytes()
            x, y = batch(worker)
            nn.functional.mse_loss(model(x), y).backward()
            worker.step()
            visited.append(step)
            print(f"step {step}")
        return state_of(worker, model)


def _resets(worker: psq.torch.Worker) -> int:
    return worker._client.resets


def main() -> int:
    given = arguments()
    if given.die:
        place, nth = given.die.split(":")
        assert place in psq.durable.failpoints.NAMES, place
        psq.durable.failpoints._armed[place] = int(nth)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        found = train(given)
    except PsqError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    if given.out:
        np.savez(given.out, **found)
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A small training job that the cluster tests run as worker processes.

    python train_tiny.py --steps 5 --out weights.npz          a worker, told by PSQ_* who it is
    python train_tiny.py --reference --world-size 2 ...       the same job in torch.optim.Adam alone

Every process draws the whole global batch from (seed, step) and takes its rank's slice, so a job is
the same whatever the world size. Prints `step N` after each step, and a JSON line at the end.
"""

# ruff: noqa: T201 - a script that talks to its test

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import psq.torch
from psq.errors import PsqError


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="of one worker")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--nan-step", type=int, default=-1)
    parser.add_argument("--lie", type=float, help="what its gradients are multiplied by")
    parser.add_argument("--gate", help="a FIFO: opened for reading before the step --gate-step")
    parser.add_argument("--gate-step", type=int, default=0)
    parser.add_argument("--out")
    parser.add_argument("--reference", action="store_true")
    return parser.parse_args()


def make_model(hidden: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(),
                         nn.Linear(hidden, 4))  # fmt: skip


def batch(step: int, seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng((seed, step))
    x = rng.standard_normal((size, 16), np.float32)
    return torch.from_numpy(x), torch.from_numpy(np.tanh(x[:, :4] * 2.0))


def train_reference(given: argparse.Namespace) -> tuple[nn.Module, dict]:
    model = make_model(given.hidden, given.seed)
    adam = torch.optim.Adam(model.parameters(), lr=given.lr)
    for step in range(given.steps):
        x, y = batch(step, given.seed, given.batch * given.world_size)
        adam.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        adam.step()
    return model, {}


def train_worker(given: argparse.Namespace) -> tuple[nn.Module, dict]:
    # Each rank starts with other weights: rank 0's must win.
    rank = int(os.environ["PSQ_RANK"])
    model = make_model(given.hidden, given.seed + 100 * rank)
    reports = []
    with psq.torch.Worker(model, lr=given.lr, world_size=given.world_size) as worker:
        print(f"joined version={worker.version}")
        joined_bytes = [worker.sent_bytes, worker.received_bytes]
        while worker.version < given.steps:
            step = worker.version
            if given.gate and step == given.gate_step:
                print("gate")
                Path(given.gate).read_bytes()
            x, y = batch(step, given.seed, given.batch * worker.data_world_size)
            mine = slice(worker.data_rank * given.batch, (worker.data_rank + 1) * given.batch)
            loss = nn.functional.mse_loss(model(x[mine]), y[mine])
            loss.backward()
            if given.lie is not None:
                for parameter in model.parameters():
                    parameter.grad *= given.lie
            if step == given.nan_step:
                model[2].weight.grad[1, 2] = float("nan")
            reports.append(worker.step(loss=loss, samples=given.batch))
            print(f"step {step}")
        residual = worker._compressor.state_arrays().get("residual", np.zeros(1, np.float32))
        summary = {
            "reports": [{name: getattr(r, name) for name in r.__slots__} for r in reports],
            "joined_bytes": joined_bytes,
            "resent_frames": worker.resent_frames,
            "resets": worker._client.resets,
            "skipped": worker.skipped,
            "residual_norm": float(np.linalg.norm(residual)),
            "residual_finite": bool(np.isfinite(residual).all()),
        }
    return model, summary


def main() -> int:
    given = arguments()
    try:
        model, summary = train_reference(given) if given.reference else train_worker(given)
    except PsqError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    if given.out:
        np.savez(given.out, **{name: p.detach().numpy() for name, p in model.named_parameters()})
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())

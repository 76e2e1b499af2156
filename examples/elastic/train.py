"""Training on data that are handed out: workers may come, go and die, and no sample is lost.

    psq-server --min-workers 1 --world-size 3
    psq-worker --rank 0 --world-size 3 examples/elastic/train.py      # ranks 1 and 2 at any time

Kill one, start it again, or send it SIGTERM: the others go on, and what it had not finished is
handed to them. With --visits each worker appends lines to a file for every batch: before the step
and after it, the epoch, whether it counts (null before), and the indices.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import nn

import psq.torch


def data(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for every worker: points, and a curve through them."""
    x = torch.randn((size, 16), generator=torch.Generator().manual_seed(0))
    return x, torch.tanh(2.0 * x[:, :4])


def note(path: Path | None, epoch: int, indices: list[int], *, applied: bool | None = None) -> None:
    """Append a line, if that is wanted."""
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps([epoch, applied, indices]) + "\n")


def main() -> None:
    """Train for so many epochs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--pause-ms", type=float, default=0.0, help="what a step takes besides")
    parser.add_argument("--visits", type=Path, help="file for a line about each batch")
    given = parser.parse_args()
    x, y = data(given.size)
    model = nn.Sequential(nn.Linear(16, given.hidden), nn.Tanh(), nn.Linear(given.hidden, 4))
    with psq.torch.Worker(model, lr=0.01) as ps:
        print(f"joined version={ps.version}")
        sampler = psq.torch.ElasticSampler(ps, given.size, batch_size=given.batch)
        for epoch in sampler.epochs(given.epochs):
            for indices in sampler:
                note(given.visits, epoch, indices)
                loss = nn.functional.mse_loss(model(x[indices]), y[indices])
                loss.backward()
                time.sleep(given.pause_ms / 1000.0)
                report = ps.step(loss=loss, samples=len(indices))
                note(given.visits, epoch, indices, applied=report.applied)
                print(f"epoch {epoch} step {ps.version} loss {loss.item():.4f} left {sampler.left}")


if __name__ == "__main__":
    main()

"""How fast a simulation computes, and what it takes: workers x parameters, a process for each cell.

    python bench/simulation.py                      the table of docs/simulate.md, some minutes
    python bench/simulation.py --cell 100 10000 server-adam --one-by-one

Three layers are trained on random vectors, 16 a step: so small a job that most of what is seen is
the workers' and the server's own work. Times are of this process's CPU, after the first steps.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from psq_worker.simulate import Network, Point, SimConfig, simulate

INPUTS, CLASSES, BATCH = 64, 10, 16
CELLS = (
    (100, 10_000, "server-adam"),
    (100, 10_000, "qadam-1bit"),
    (500, 10_000, "qadam-1bit"),
    (100, 100_000, "qadam-1bit"),
    (500, 100_000, "qadam-1bit"),
    (100, 1_000_000, "server-adam"),
    (100, 1_000_000, "qadam-1bit"),
    (300, 1_000_000, "qadam-1bit"),
)
KILOBYTE = 1024


class Layers:
    """A classifier of about so many parameters."""

    name = "layers"
    metric = "loss"

    def __init__(self, numel: int) -> None:
        linear = INPUTS + CLASSES + 2
        self.width = round((math.sqrt(linear**2 + 4 * numel) - linear) / 2)

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        inner = [nn.Linear(INPUTS, self.width), nn.ReLU(), nn.Linear(self.width, self.width)]
        return nn.Sequential(*inner, nn.ReLU(), nn.Linear(self.width, CLASSES))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        vectors, labels = batch
        return functional.cross_entropy(model(vectors), labels)

    def batches(
        self, *, rank: int, world_size: int, batch_size: int, seed: int, start_step: int = 0
    ) -> Iterator[Any]:
        step = start_step
        while True:
            number = (seed * 1_000_003 + step) * world_size + rank
            draw = torch.Generator().manual_seed(number)
            vectors = torch.randn(batch_size, INPUTS, generator=draw)
            yield vectors, vectors[:, :CLASSES].argmax(1)
            step += 1

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        del model
        return {"loss": 0.0}


def measure(
    workers: int, numel: int, recipe: str, steps: int, *, one_by_one: bool
) -> dict[str, Any]:
    """One cell, in this process."""
    marks: list[float] = []

    def note(point: Point) -> None:
        del point
        marks.append(time.process_time())

    config = SimConfig(
        task=Layers(numel),
        recipe=recipe,
        workers=workers,
        steps=steps,
        batch_size=BATCH,
        lr=1e-3,
        network=Network(1e9, latency_s=1e-3),
        vectorised=False if one_by_one else None,
    )
    result = simulate(config, on_point=note)
    half = len(marks) // 2
    step_s = (marks[-1] - marks[half - 1]) / (len(marks) - half)
    return {
        "workers": workers,
        "numel": result.numel,
        "recipe": recipe,
        "vectorised": config.is_vectorised(result.numel),
        "steps_per_cpu_s": 1 / step_s,
        "cpu_s_per_worker_step": step_s / workers,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cell", nargs=3, metavar=("WORKERS", "PARAMETERS", "RECIPE"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--one-by-one", action="store_true", help="gradients, with --cell")
    options = parser.parse_args()
    if options.cell:
        workers, numel, recipe = options.cell
        cell = (int(workers), int(numel), recipe, options.steps)
        print(json.dumps(measure(*cell, one_by_one=options.one_by_one)))
        return
    for cell in CELLS:
        words = [sys.executable, __file__, "--steps", str(options.steps), "--cell"]
        done = subprocess.run(
            [*words, *map(str, cell)], check=True, stdout=subprocess.PIPE, text=True
        )
        print(done.stdout.strip(), flush=True)


if __name__ == "__main__":
    main()

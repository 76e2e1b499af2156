"""What it costs a worker to keep its state: steps with and without --state-dir, taken in turn.

    python bench/continuity.py                                 # char-lm, as a task computes it
    python bench/continuity.py --numel 20000000 --steps 20     # no computing: the worst case

Two workers live in this process, each alone in a job with a psq-server of its own; they take one
step after another in turn, so whatever else the machine does meets both. Printed are the times of a
step, best and median, and the ratio of the two kinds: of the bests, and the median of all pairs.
With --numel the gradients are random numbers that are there already, and forward and backward take
no time: then copying has nothing to hide behind.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

import psq.torch
from psq_worker.tasks import find_task

WARM_UP = 3


@dataclass
class Side:
    """A worker and how it takes a step."""

    worker: psq.torch.Worker
    backward: Callable[[], None]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", default="char-lm")
    parser.add_argument("--numel", type=int, help="a model of so many values, without computing")
    parser.add_argument("--recipes", nargs="+", default=["server-adam", "qadam-1bit"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


@contextmanager
def server() -> Iterator[str]:
    """A psq-server; yields its address."""
    words = [sys.executable, "-m", "psq_server", "--bind", "tcp://127.0.0.1:0", "--world-size", "1"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        ready = process.stdout.readline() if process.stdout is not None else ""
        try:
            yield ready.partition("endpoint=")[2].split()[0]
        finally:
            process.terminate()


def make_side(
    given: argparse.Namespace, stack: ExitStack, recipe: str, state_dir: str | None
) -> Side:
    endpoint = stack.enter_context(server())
    settings = {"connect": endpoint, "rank": 0, "world_size": 1, "recipe": recipe, "lr": 1e-3}
    torch.manual_seed(0)
    if given.numel:
        rows = max(1, given.numel // 4096)
        model: nn.Module = nn.Linear(4096, rows, bias=False)
        worker = psq.torch.Worker(model, **settings, state_dir=state_dir)
        noise = torch.randn(rows, 4096)
        [weight] = model.parameters()
        weight.grad = torch.zeros_like(weight)
        return Side(stack.enter_context(worker), lambda: _fill(weight, noise))
    task = find_task(given.task, None)
    model = task.model(0)
    worker = psq.torch.Worker(model, **settings, state_dir=state_dir)
    batches = task.batches(rank=0, world_size=1, batch_size=8, seed=0)
    return Side(stack.enter_context(worker), lambda: task.loss(model, next(batches)).backward())


def _fill(weight: nn.Parameter, noise: torch.Tensor) -> None:
    if weight.grad is not None:
        weight.grad.copy_(noise)


def measure(given: argparse.Namespace, recipe: str) -> dict[str, float]:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        sides = [make_side(given, stack, recipe, kept) for kept in (None, folder)]
        times_s: tuple[list[float], list[float]] = ([], [])
        for step in range(WARM_UP + given.steps):
            for index in (0, 1) if step % 2 else (1, 0):
                began_s = time.perf_counter()
                sides[index].backward()
                sides[index].worker.step()
                if step >= WARM_UP:
                    times_s[index].append(time.perf_counter() - began_s)
        keeper = sides[1].worker._exchange.keeper  # noqa: SLF001 - what it takes is asked for
        numel = sides[1].worker.plan.layout.numel
        return {
            "numel": numel,
            "without_best_s": min(times_s[0]),
            "with_best_s": min(times_s[1]),
            "without_median_s": statistics.median(times_s[0]),
            "with_median_s": statistics.median(times_s[1]),
            "ratio_of_bests": min(times_s[1]) / min(times_s[0]),
            "median_ratio": statistics.median(b / a for a, b in zip(*times_s, strict=True)),
            "slots_bytes_per_value": keeper.nbytes / numel if keeper is not None else 0.0,
        }


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    found = {recipe: measure(given, recipe) for recipe in given.recipes}
    if given.json:
        print(json.dumps(found, indent=2))
        return
    for recipe, row in found.items():
        print(
            f"{recipe}, {row['numel']:,.0f} values: without {1e3 * row['without_best_s']:.1f} ms "
            f"(median {1e3 * row['without_median_s']:.1f}), with {1e3 * row['with_best_s']:.1f} "
            f"(median {1e3 * row['with_median_s']:.1f}); ratio {row['ratio_of_bests']:.3f} of the "
            f"bests, {row['median_ratio']:.3f} median; {row['slots_bytes_per_value']:.1f} B a value"
        )


if __name__ == "__main__":
    main()

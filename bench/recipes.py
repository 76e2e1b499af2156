"""Compares recipes in one process: real workers, servers and messages, simulated machines.

    python bench/recipes.py                 every preset beside plain Adam, 100 steps: half a minute
    python bench/recipes.py --task char-lm --recipe server-adam --steps 600 --seeds 0 1 2
    python bench/recipes.py --recipe server-adam --downlink delta:lloyd-max:bits=2 --workers 4
    python bench/recipes.py --recipe qadam-1bit --local-steps 8 --steps 800

Each run is a simulation (`psq_worker.simulate`) on a network that costs nothing: the same bits as a
cluster of processes gives. One JSON line per run goes to stdout, and to `--out`, where runs already
there are not made again. "adam" is `torch.optim.Adam` on the whole batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from psq.presets import PRESETS, preset
from psq.recipe import Recipe
from psq_worker.baseline import train_baseline
from psq_worker.job import Job, job_for
from psq_worker.simulate import SimConfig, simulate
from psq_worker.tasks import Task, get_task


@dataclass(frozen=True)
class Run:
    """One cell of the comparison."""

    task: str
    recipe: str
    uplink: str
    downlink: str
    local_steps: int
    every: int
    workers: int
    job: Job

    @property
    def key(self) -> str:
        job = self.job
        parts = [self.task, self.recipe, self.uplink, self.downlink, f"W{self.workers}"]
        parts += [f"H{self.local_steps}"] if self.local_steps > 1 else []
        parts += [f"every{self.every}"] if self.every > 1 else []
        parts += [f"B{job.batch_size}", f"{job.steps}x{job.lr:g}-{job.schedule}", f"s{job.seed}"]
        return " ".join(parts)


def train_in_process(task: Task, run: Run) -> dict[str, Any]:
    """Trains one cell; the result as plain data."""
    job = run.job
    config = SimConfig(
        task=task,
        recipe=recipe_of(run),
        workers=run.workers,
        steps=job.steps,
        batch_size=job.batch_size,
        lr=job.lr,
        schedule=job.schedule,
        eval_every=job.eval_every,
        seed=job.seed,
        vectorised=False,
        threads=torch.get_num_threads(),
    )
    result = simulate(config)
    curve, before = [], 0
    for score in result.scores:
        losses = [point.loss for point in result.points if before < point.step <= score.step]
        curve.append([score.step, statistics.fmean(losses), score.scores[task.metric]])
        before = score.step
    return {"bits": (result.bits_up, result.bits_down), "curve": curve}


def recipe_of(run: Run) -> Recipe:
    recipe = preset(run.recipe)
    recipe = recipe.with_codecs(uplink=run.uplink or None, downlink=run.downlink or None)
    return recipe.with_rhythm(local_steps=run.local_steps or None, every=run.every)


def run_one(task: Task, run: Run) -> dict[str, Any]:
    start = time.process_time()
    if run.recipe == "adam":
        records = train_baseline(task, run.job, world_size=run.workers).records
        curve = [[r.step, r.loss, r.scores[task.metric]] for r in records]
        result: dict[str, Any] = {"bits": (32.0, 32.0), "curve": curve}
    else:
        result = train_in_process(task, run)
    cpu_s = time.process_time() - start
    return {"key": run.key, "seed": run.job.seed, **result, "cpu_s": cpu_s}


def show(results: list[dict[str, Any]]) -> None:
    """Means over the seeds, on stderr."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        cells.setdefault(result["key"].rsplit(" s", 1)[0], []).append(result)
    for key, runs in sorted(cells.items()):
        scores = [run["curve"][-1][2] for run in runs]
        losses = [run["curve"][-1][1] for run in runs]
        up, down = runs[0]["bits"]
        line = f"{key}: {up:.3f}/{down:.3f} bits, score {statistics.mean(scores):.4f} "
        line += f"{[round(s, 4) for s in scores]}, training loss {statistics.mean(losses):.4f}"
        print(line, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--task", default="fashion-mnist")
    parser.add_argument("--recipe", action="append", help="a preset, or adam; may be repeated")
    parser.add_argument("--uplink", default="", help="codec in place of the recipe's")
    parser.add_argument("--downlink", default="", help='as in "delta:sign" or "weights:fp32"')
    parser.add_argument("--local-steps", type=int, default=0, help="in place of the recipe's")
    parser.add_argument("--every", type=int, default=1, help="each shard in every Nth step")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, help="samples per worker")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--schedule", choices=("constant", "linear"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--full", action="store_true", help="Debian's full data, not the subset")
    parser.add_argument("--out", type=Path, help="JSON lines; runs found there are not repeated")
    options = parser.parse_args()
    task = get_task(options.task, subset=not options.full)
    chosen = {n: getattr(options, n) for n in ("batch_size", "steps", "lr", "schedule")}
    found = _read(options.out)
    for recipe in options.recipe or ["adam", *PRESETS]:
        for seed in options.seeds:
            job = job_for(task, **chosen, seed=seed)
            run = Run(
                task=options.task,
                recipe=recipe,
                uplink=options.uplink,
                downlink=options.downlink,
                local_steps=options.local_steps,
                every=options.every,
                workers=options.workers,
                job=job,
            )
            if run.key not in found:
                found[run.key] = run_one(task, run)
                _append(options.out, found[run.key])
    show(list(found.values()))


def _read(path: Path | None) -> dict[str, dict[str, Any]]:
    if path is None or not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {result["key"]: result for result in map(json.loads, lines)}


def _append(path: Path | None, result: dict[str, Any]) -> None:
    line = json.dumps(result)
    print(line, flush=True)
    if path is not None:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


if __name__ == "__main__":
    main()

"""Compares recipes in one process: real codecs, residuals and server arithmetic, no wire.

    python bench/recipes.py                 every preset beside plain Adam, 100 steps: half a minute
    python bench/recipes.py --task char-lm --recipe server-adam --steps 600 --seeds 0 1 2
    python bench/recipes.py --recipe server-adam --downlink delta:lloyd-max:bits=2 --workers 4
    python bench/recipes.py --recipe qadam-1bit --local-steps 8 --steps 800

W workers' gradients are computed one after another on one copy of the weights, pushed through
`psq.feedback.Compressor`, reduced by `psq_server.reduce.Reducer`, and the answer is decoded into
the weights: the same bits as a cluster of processes gives. One JSON line per run goes to stdout,
and to `--out`, where runs already there are not made again. "adam" is `torch.optim.Adam` on the
whole batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from psq.codec import ShardCodec, get_codec
from psq.feedback import Compressor
from psq.layout import PART_NUMEL, Shard
from psq.plan import Plan
from psq.presets import PRESETS, preset
from psq.recipe import Recipe
from psq_server.reduce import Reducer
from psq_worker.baseline import train_baseline
from psq_worker.job import Job, LossMeter, job_for
from psq_worker.tasks import Task, get_task

Floats = npt.NDArray[np.float32]


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


class Cluster:
    """A server and its workers, all in this process, on one copy of the weights.

    With local steps each worker has weights of its own as well, which `push` puts in the model's
    place: gradients of rank r must be computed after `turn(r)`.
    """

    def __init__(self, model: torch.nn.Module, recipe: Recipe, workers: int) -> None:
        names = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        self.plan = Plan.of(names, recipe, workers)
        self.shards = self.plan.layout.shards
        self.parameters = [p for _, p in model.named_parameters()]
        self.reducer = Reducer(self.plan)
        self.compressors = [Compressor(self.plan, rank) for rank in range(workers)]
        self.downlinks = [ShardCodec(get_codec(recipe.downlink.codec), s) for s in self.shards]
        self.is_delta = recipe.downlink.kind == "delta"
        self.weights = np.concatenate([p.detach().numpy().ravel() for p in self.parameters])
        self.local_steps = recipe.direction.local_steps
        self.steps = 0
        self.own = [self.weights.copy() for _ in range(workers)] if self.local_steps > 1 else []
        self.replica = self.weights.copy() if self.own else self.weights
        self._hand_over(self.weights)
        for tensor, parameter in zip(self.plan.layout.tensors, self.parameters, strict=True):
            flat = self.weights[tensor.offset : tensor.offset + tensor.numel]
            parameter.data = torch.from_numpy(flat).view(tensor.shape)
        self.payloads: list[list[npt.NDArray[np.uint8]]] = [[] for _ in self.shards]

    def turn(self, rank: int) -> None:
        """The model's weights are this rank's from now on."""
        if self.own:
            self.weights[:] = self.own[rank]

    def push(self, rank: int, lr: float) -> None:
        """Takes the gradients that lie in the model, as this rank's, and compresses them."""
        version, still = divmod(self.steps + 1, self.local_steps)
        for shard in self.shards:
            if self.own and still:
                own = self._segments(shard, self.own[rank])
                self.compressors[rank].descend(shard.index, self._gradients(shard), lr, own)
            elif self.plan.due(shard.index, version - 1):
                payload = np.empty(self.compressors[rank].nbytes(shard.index), np.uint8)
                self._say(rank, shard, lr, payload)
                self.payloads[shard.index].append(payload)
            else:
                self._say(rank, shard, lr, None)

    def _say(
        self, rank: int, shard: Shard, lr: float, payload: npt.NDArray[np.uint8] | None
    ) -> None:
        compressor, gradients = self.compressors[rank], self._gradients(shard)
        if self.own:
            own, start = (self._segments(shard, x) for x in (self.own[rank], self.replica))
            compressor.compress_drift(shard.index, gradients, lr, payload, weights=own, start=start)
        elif payload is None:
            compressor.absorb(shard.index, gradients, lr)
        else:
            compressor.compress(shard.index, gradients, lr, payload)

    def step(self, lr: float) -> None:
        """One round on the server, if this step has one, and what workers do with the answer."""
        self.steps += 1
        version, still = divmod(self.steps, self.local_steps)
        if still:
            return
        for shard, payloads in zip(self.shards, self.payloads, strict=True):
            if not self.plan.due(shard.index, version - 1):
                continue
            answer = self.reducer.reduce(shard.index, payloads, lr)
            here = self.replica[shard.offset : shard.offset + shard.numel]
            if self.is_delta:
                self.downlinks[shard.index].decode_add(answer, here)
            else:
                self.downlinks[shard.index].decode(answer, here)
            payloads.clear()
        for weights in (self.weights, *self.own) if self.own else ():
            weights[:] = self.replica

    def bits(self) -> tuple[float, float]:
        """Payload bits per parameter and step, up and down."""
        values = self.plan.layout.numel * self.local_steps * self.plan.recipe.uplink.every
        up = sum(self.compressors[0].nbytes(s.index) for s in self.shards)
        down = sum(self.reducer.payload_nbytes(s.index) for s in self.shards)
        return 8 * up / values, 8 * down / values

    def _hand_over(self, weights: Floats) -> None:
        for shard in self.shards:
            values = weights[shard.offset : shard.offset + shard.numel]
            for part, start in enumerate(range(0, shard.numel, PART_NUMEL)):
                self.reducer.init(shard.index, part, values[start : start + PART_NUMEL])

    def _gradients(self, shard: Shard) -> list[Floats]:
        return [self._slice(shard, index) for index in range(len(shard.segments))]

    @staticmethod
    def _segments(shard: Shard, flat: Floats) -> list[Floats]:
        at = shard.offset
        return [flat[at + s.offset : at + s.offset + s.numel] for s in shard.segments]

    def _slice(self, shard: Shard, index: int) -> Floats:
        segment = shard.segments[index]
        gradient = self.parameters[segment.tensor].grad
        assert gradient is not None  # noqa: S101
        flat: Floats = gradient.numpy().reshape(-1)
        return flat[segment.start : segment.start + segment.numel]


def train_in_process(task: Task, run: Run) -> dict[str, Any]:
    """Trains one cell; the result as plain data."""
    recipe = recipe_of(run)
    job = run.job.in_rounds(recipe.direction.local_steps)
    model = task.model(job.seed)
    cluster = Cluster(model, recipe, run.workers)
    streams = [
        task.batches(rank=r, world_size=run.workers, batch_size=job.batch_size, seed=job.seed)
        for r in range(run.workers)
    ]
    curve, losses = [], LossMeter()
    for step, batches in enumerate(islice(zip(*streams, strict=True), job.steps)):
        for rank, batch in enumerate(batches):
            cluster.turn(rank)
            model.zero_grad()
            loss = task.loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.add(loss)
            cluster.push(rank, job.lr_at(step))
        cluster.step(job.lr_at(step))
        if job.is_evaluated(step + 1):
            curve.append([step + 1, losses.take(), task.evaluate(model)[task.metric]])
    return {"bits": cluster.bits(), "curve": curve}


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

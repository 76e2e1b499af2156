"""Trains one cell in a process of its own and keeps what came of it.

    python -m evidence.train FOLDER '{"task": ..., "method": ..., ...}'       in bench/

A failure is kept as well, in words: the table says why. Losses are kept as means over bins.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Final

import numpy as np
import torch
from evidence.cells import Cell, Result, Store
from evidence.subjects import task_of
from numpy.typing import NDArray

from psq.errors import PsqError
from psq_worker.job import Job
from psq_worker.simulate import SimConfig, SimResult, simulate

BINS: Final = 40
LAST: Final = 0.1
"""The share of the steps over which the final training loss is a mean."""


def train(cell: Cell) -> Result:
    """Run it, whatever way it says."""
    ways = {"plain": _plain, "simulated": _simulated, "processes": _processes, "ddp": _ddp}
    return ways[cell.way](cell)


def _job(cell: Cell) -> Job:
    subject = cell.subject
    return Job(
        steps=subject.steps,
        batch_size=cell.how.repeats * subject.batch // cell.workers,
        lr=cell.lr,
        schedule=subject.schedule,
        seed=cell.seed,
        eval_every=subject.every,
    )


def _plain(cell: Cell) -> Result:
    task, job = task_of(cell.task), _job(cell)
    model = task.model(job.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=job.lr)
    batches = task.batches(rank=0, world_size=1, batch_size=job.batch_size, seed=job.seed)
    losses, scores = [], []
    for step in range(job.steps):
        loss = task.loss(model, next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = job.lr_at(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if job.is_evaluated(step + 1):
            scores.append((step + 1, _finite(task.evaluate(model)[task.metric])))
    numel = sum(parameter.numel() for parameter in model.parameters())
    points = [
        (step, each, 4.0 * numel * step, 4.0 * numel * step) for step, each in _from_1(losses)
    ]
    bits = {"bits": (32.0, 32.0), "wire_bits": (None, None)}
    return {
        "numel": numel,
        "scores": scores,
        "curve": _binned(points),
        "loss": _late(losses),
        **bits,
    }


# ---- psq


def _simulated(cell: Cell) -> Result:
    job = _job(cell)
    config = SimConfig(
        task=task_of(cell.task),
        recipe=cell.how.make(feedback=cell.feedback),
        workers=cell.workers,
        steps=job.steps,
        batch_size=job.batch_size,
        lr=job.lr,
        schedule=job.schedule,
        eval_every=job.eval_every,
        seed=job.seed,
        consistency=cell.how.consistency,
        non_iid=cell.non_iid,
        participation=cell.participation,
        vectorised=False,
    )
    return _told(simulate(config))


def _told(result: SimResult) -> Result:
    points = [(p.step, p.loss, p.usage.up_bytes, p.usage.down_bytes) for p in result.points]
    values = result.numel * result.job.steps
    return {
        "numel": result.numel,
        "scores": [(s.step, _finite(s.scores[result.metric])) for s in result.scores],
        "curve": _binned(points),
        "bits": (result.bits_up, result.bits_down),
        "wire_bits": (8 * result.usage.up_bytes / values, 8 * result.usage.down_bytes / values),
        "loss": _late([point.loss for point in result.points]),
        "rejected": result.rejected,
        "skipped": result.skipped,
        "digest": digest_of(result.weights),
    }


def _processes(cell: Cell) -> Result:
    from safetensors.numpy import load_file  # noqa: PLC0415 - for this way only

    from psq_worker.display import make_view  # noqa: PLC0415
    from psq_worker.launch import Commands, child_env, launch  # noqa: PLC0415
    from psq_worker.tasks.idx import SHIPPED_DIR  # noqa: PLC0415

    job, method = _job(cell), cell.how
    words = ["--task", cell.task, "--data", str(SHIPPED_DIR), "--recipe", method.recipe]
    for name in ("steps", "batch_size", "lr", "schedule", "eval_every", "seed"):
        words += ["--" + name.replace("_", "-"), str(getattr(job, name))]
    words += [word for option in method.options for word in ("--with", option)]
    env = child_env(cell.workers, os.environ) | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder, make_view(cell.name, quiet=True) as view:
        path = Path(folder) / "weights.safetensors"
        saves = ("--save", str(path))
        commands = Commands(cell.workers, server_words=saves, worker_words=tuple(words))
        summary = launch(commands, view, env).summary()
        weights = load_file(path)
    wire = summary["wire"]
    return {
        "numel": summary["numel"],
        "scores": [(job.steps, _finite(summary["score"]))],
        "curve": [],
        "bits": (None, None),
        "wire_bits": (wire["bits_per_parameter_up"], wire["bits_per_parameter_down"]),
        "loss": None,
        "digest": digest_of(weights),
    }


def digest_of(weights: Mapping[str, NDArray[np.float32]]) -> str:
    """Of all weights to the last bit."""
    digest = sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weights[name], np.float32).tobytes())
    return digest.hexdigest()


# ---- torch's DistributedDataParallel


def _ddp(cell: Cell) -> Result:
    from evidence import powersgd  # noqa: PLC0415 - for this way only

    told = powersgd.train(cell.workers, cell.how.rank, cell.task, asdict(_job(cell)))
    numel, steps = told["numel"], len(told["losses"])
    points = [
        (step, loss, told["bytes"][step - 1], told["bytes"][step - 1])
        for step, loss in _from_1(told["losses"])
    ]
    bits = 8 * told["bytes"][-1] / (numel * steps)
    return {
        "numel": numel,
        "scores": [(step, _finite(score)) for step, score in told["scores"]],
        "curve": _binned(points),
        "bits": (bits, bits),
        "wire_bits": (None, None),
        "loss": _late(told["losses"]),
    }


# ---- numbers for JSON


def _from_1(losses: Sequence[float]) -> Iterator[tuple[int, float]]:
    return enumerate(losses, 1)


def _late(losses: Sequence[float]) -> float | None:
    """The mean over the end of the run."""
    late = losses[int((1 - LAST) * len(losses)) :]
    return _finite(sum(late) / len(late)) if late else None


def _binned(points: Sequence[tuple[int, float, float, float]]) -> list[list[float | None]]:
    """Means of losses over equal parts of the run, with step and bytes at the end of each."""
    size = max(1, len(points) // BINS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    rows = []
    for part in parts:
        losses = [loss for _, loss, _, _ in part if not math.isnan(loss)]
        mean = sum(losses) / len(losses) if losses else math.nan
        rows.append(_row((part[-1][0], mean, part[-1][2], part[-1][3])))
    return rows


def _row(values: Sequence[float]) -> list[float | None]:
    return [_finite(value) for value in values]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def main() -> None:
    store, cell = Store(Path(sys.argv[1])), Cell(**json.loads(sys.argv[2]))
    before_s, cpu_s = time.monotonic(), time.process_time()
    try:
        result = train(cell)
    except (PsqError, OSError, RuntimeError, ValueError) as error:
        result = {"failure": f"{type(error).__name__}: {error}"}
    result["wall_s"] = time.monotonic() - before_s
    result["cpu_s"] = time.process_time() - cpu_s
    store.put(cell, result)


if __name__ == "__main__":
    main()

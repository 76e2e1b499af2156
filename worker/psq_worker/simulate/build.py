"""What a simulated job is made of: each part a function of a few values."""

from __future__ import annotations

import random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from psq.plan import Plan
from psq.recipe import Recipe
from psq.rules import make_apply
from psq.torch.averaging import Averaging
from psq.torch.decoder import RETURN
from psq_worker.job import Job, job_for
from psq_worker.simulate.config import SimConfig
from psq_worker.simulate.data import Dirichlet, Samples, TaskSamples
from psq_worker.simulate.gradients import Gradients, OneByOne, Vectorised, Zeros
from psq_worker.simulate.table import Table
from psq_worker.tasks import Task

__all__ = [
    "Pause",
    "averaging_of",
    "gradients_of",
    "initial_of",
    "is_shared",
    "job_of",
    "samples_of",
]

Floats = NDArray[np.float32]


def averaging_of(plan: Plan, table: Table, lr: float) -> Averaging | None:
    """Where workers step by themselves: torch's Adam on this worker's own weights."""
    if plan.recipe.apply.kind != RETURN or table.whole is None:
        return None
    flat, tensors = torch.from_numpy(table.whole), plan.layout.tensors
    own = [nn.Parameter(flat[t.offset : t.offset + t.numel].view(t.shape)) for t in tensors]
    return Averaging(plan, torch.optim.Adam(own, lr=lr), own)


def is_shared(plan: Plan) -> bool:
    """Whether workers of one version have nothing but the same weights, so that one copy does."""
    recipe = plan.recipe
    if recipe.downlink.kind != "mean":
        return True
    if recipe.apply.kind == RETURN:
        return False
    rule = make_apply(recipe, layout=plan.layout, world_size=plan.world_size)
    return not rule.state_arrays()


class Pause:
    """Draws what a step takes longer."""

    def __init__(self, chance: float, mean_s: float) -> None:
        self._chance, self._mean_s = chance, mean_s

    def __call__(self, rng: random.Random) -> float:
        """Seconds, mostly none."""
        if not self._chance or not self._mean_s or rng.random() >= self._chance:
            return 0.0
        return rng.expovariate(1.0 / self._mean_s)


def job_of(config: SimConfig, task: Task, recipe: Recipe) -> Job:
    """How long, at which rate: the task's own settings where nothing was said."""
    job = job_for(
        task,
        steps=config.steps,
        batch_size=config.batch_size,
        lr=config.lr,
        schedule=config.schedule,
        seed=config.seed,
        eval_every=config.eval_every,
    )
    return job.in_rounds(recipe.direction.local_steps)


def samples_of(config: SimConfig, task: Task, job: Job, plan: Plan) -> Samples:
    """Who sees which samples: the ranks that have data of their own."""
    if config.non_iid is None:
        return TaskSamples(task, job, plan.data_world_size)
    return Dirichlet(task, job, plan.data_world_size, config.non_iid)


def gradients_of(
    config: SimConfig, task: Task, model: nn.Module, plan: Plan, *, learns: bool
) -> Gradients:
    """How gradients are computed."""
    if not learns:
        return Zeros(plan.layout)
    if config.is_vectorised(plan.layout.numel):
        return Vectorised(task, model, plan.layout, config.chunk)
    return OneByOne(task, model, plan.layout)


def initial_of(plan: Plan, model: nn.Module) -> list[Floats]:
    """What every worker starts from, f32[shard.numel] of each shard."""
    found = dict(model.named_parameters())
    tensors = [found[t.name].detach().reshape(-1).numpy() for t in plan.layout.tensors]
    return [
        np.concatenate([tensors[s.tensor][s.start : s.start + s.numel] for s in shard.segments])
        for shard in plan.layout.shards
    ]

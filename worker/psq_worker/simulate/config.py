"""What is simulated: one value, checked when it is made as far as it can be without the task."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final, Literal

from psq.clock import parse_consistency
from psq.config.schema import DEFAULT_RECIPE
from psq.errors import ConfigError
from psq.plan import MAX_WORLD_SIZE
from psq.recipe import Recipe
from psq_worker.simulate.attacks import Attack
from psq_worker.simulate.faults import Faults
from psq_worker.simulate.network import Network
from psq_worker.tasks import Task

__all__ = ["VECTORISED_ABOVE", "SimConfig"]

VECTORISED_ABOVE: Final = 8
"""With more workers gradients are computed for many of them at once, unless said otherwise."""
VECTORISED_NUMEL: Final = 30_000
"""And only up to so many parameters: above, one pass for many takes as long as one for each."""
CHUNK: Final = 64
MAX_CHUNK: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SimConfig:
    """One simulated job.

    Attributes:
        task: by name, see `psq_worker.tasks.get_task`, or a task.
        recipe: by name, or a value.
        workers, servers: how many.
        steps, batch_size, lr, schedule, eval_every: as for `psq launch`; None: the task's own.
        seed: of initial weights, samples, codecs, faults and chances.
        consistency: as for `psq launch`.
        residual: what error feedback is kept in.
        network: what the machines are connected by.
        compute_s: a worker's own work in a step: forward, backward and encoding.
        reduce_s: a server's work on one shard of a round.
        faults: what goes wrong.
        participation: the share of the workers that takes part in each round; bsp only.
        non_iid: the alpha of a Dirichlet split of the classes; None: every worker draws from all.
        attack: who lies.
        vectorised: compute gradients of many workers at once; None: with over 8 workers and a model
            of at most 30,000 parameters.
        chunk: how many at once.
        threads: torch's.
        give_up_after_s: the longest virtual wait for anybody.
    """

    task: str | Task = "fashion-mnist"
    recipe: str | Recipe = DEFAULT_RECIPE
    workers: int = 2
    servers: int = 1
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    schedule: str | None = None
    eval_every: int | None = None
    seed: int = 0
    consistency: str = "bsp"
    residual: Literal["f32", "bf16"] = "f32"
    network: Network = field(default_factory=Network)
    compute_s: float = 0.01
    reduce_s: float = 0.0
    faults: Faults = field(default_factory=Faults)
    participation: float = 1.0
    non_iid: float | None = None
    attack: Attack | None = None
    vectorised: bool | None = None
    chunk: int = CHUNK
    threads: int = 1
    give_up_after_s: float = 86_400.0

    def __post_init__(self) -> None:
        """Ranges, and what only makes sense together."""
        if not 1 <= self.workers <= MAX_WORLD_SIZE or not 1 <= self.chunk <= MAX_CHUNK:
            msg = (
                f"simulate: expected 1..{MAX_WORLD_SIZE} workers and a chunk of 1..{MAX_CHUNK}, "
                f"got {self.workers} and {self.chunk}"
            )
            raise ConfigError(msg)
        if self.threads < 1:
            msg = f"simulate: expected 1 or more threads, got {self.threads}"
            raise ConfigError(msg)
        for name in ("compute_s", "reduce_s"):
            if not 0.0 <= getattr(self, name) < math.inf:
                msg = f"simulate: {name} must be 0 s or more, got {getattr(self, name)!r}"
                raise ConfigError(msg)
        if not 0.0 < self.participation <= 1.0:
            msg = f"participation: expected a share above 0, at most 1, got {self.participation!r}"
            raise ConfigError(msg)
        if self.participation < 1.0 and parse_consistency(self.consistency).max_staleness != 0:
            msg = (
                f"participation: {self.participation} of the workers of each round needs bsp, got "
                f"{self.consistency}: without rounds in step there is nothing to draw for"
            )
            raise ConfigError(msg)
        if self.attack is not None:
            self.attack.check(self.workers)

    def is_vectorised(self, numel: int) -> bool:
        """Whether many workers' gradients are computed at once, of a model of this size."""
        if self.vectorised is not None:
            return self.vectorised
        return self.workers > VECTORISED_ABOVE and numel <= VECTORISED_NUMEL

"""Batches for a job whose workers come and go: every index once an epoch, whoever computes it.

    sampler = ElasticSampler(ps, len(data), batch_size=32)
    for epoch in sampler.epochs(10):
        for indices in sampler:
            loss_fn(model(data[indices]), target[indices]).backward()
            ps.step()

A sampler that splits by rank loses what a worker that dies had left, and cannot split anew while
others run. Here the server hands out the data as it hands out rounds: a batch belongs to the
contribution that is computed from it. If that is applied, its indices are visited; if not (it was
rejected, the worker died, left, or was replaced), they are handed to the next that asks. The
server keeps ranges of positions, not indices: which index lies at a position follows from seed and
epoch alone (`psq.shuffle`), so nothing here or there grows with the data.

At the end of an epoch the last batches are in others' hands, and might come back. Who finds nothing
left takes part in rounds without a word (`Worker.sit_out`) until they are applied. So epochs do not
overlap, and at their end some workers take a step less than others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

import numpy as np

from psq.client.data import Terms
from psq.clock import parse_consistency
from psq.errors import ConfigError, UsageError
from psq.shuffle import Shuffle
from psq.torch.worker import Worker
from psq_proto.limits import U32_MAX, U64_MAX
from psq_proto.messages import Range

__all__ = ["ElasticSampler"]

PAUSE_S: Final = 0.05
"""Where rounds do not wait for this worker: how long until it asks again for data."""


class ElasticSampler:
    """Batches of indices, handed out by the server; goes where a `batch_sampler` goes.

    One batch belongs to one step: take a batch, call `step` (or `sit_out`), take the next. A
    `DataLoader` with num_workers=0 keeps to that; one that fetches ahead is refused. With gradient
    accumulation ask for the whole step's batch and cut it.

    Args:
        worker: takes the steps.
        size: how many samples there are, the same for every worker.
        batch_size: how many for each step of a worker, likewise; the last ones of an epoch may be
            smaller.
        seed: of the order, likewise.

    Attributes:
        epoch: the one that the next batch is of, as far as this worker knows; a worker that comes
            late finds out with its first question.
        left: how many indices of it were not visited yet when this worker asked last.

    Raises:
        ConfigError: a number is out of range, or this job's contributions are not of one batch: its
            workers take local steps, or several compute the same.
    """

    def __init__(self, worker: Worker, size: int, *, batch_size: int, seed: int = 0) -> None:
        recipe = worker.plan.recipe
        _check("size", size, 1, 2**62)
        _check("batch_size", batch_size, 1, U32_MAX)
        _check("seed", seed, 0, U64_MAX)
        if recipe.direction.local_steps > 1:
            msg = (
                f"ElasticSampler: a contribution has one batch, and recipe {recipe.name!r} makes "
                f"one of {recipe.direction.local_steps} local steps: split the data by rank"
            )
            raise ConfigError(msg)
        if worker.plan.replicas > 1:
            msg = (
                f"ElasticSampler: {worker.plan.replicas} ranks compute the same, so a batch is "
                "theirs together: split the data by data_rank"
            )
            raise ConfigError(msg)
        self.epoch = 0
        self.left = size
        self._worker = worker
        self._terms = Terms(size, batch_size, seed)
        self._never_waits = parse_consistency(worker.plan.consistency).kind == "asp"
        self._in_step = parse_consistency(worker.plan.consistency).max_staleness == 0
        self._given = -1  # for which contribution the last batch was

    def epochs(self, count: int) -> Iterator[int]:
        """The epochs that are left of `count`; iterate over the sampler once in each.

        A worker that comes late may be told an epoch in which there is nothing left for it.
        """
        while self.epoch < count:
            yield self.epoch

    def __iter__(self) -> Iterator[list[int]]:
        """Batches until the present epoch is over."""
        while (answer := self._ask()).state != "end":
            if answer.state == "drawn":
                self._given = answer.seq
                yield self._indices(answer)
            elif not (self._never_waits and answer.state == "wait"):
                self._worker.sit_out()
            if answer.state != "drawn" and not self._in_step:
                time.sleep(PAUSE_S)
        self.epoch = answer.epoch

    def _ask(self) -> Range:
        client = self._worker._client  # noqa: SLF001 - the worker's other half
        answer = client.draw(self.epoch, self._terms)
        if answer.state == "drawn" and answer.seq == self._given:
            msg = (
                "ElasticSampler: a batch was asked for before the step with the one before it: "
                "call step once for each, use a DataLoader with num_workers=0, and with gradient "
                "accumulation ask for larger batches and cut them"
            )
            raise UsageError(msg)
        self.left = answer.left
        return answer

    def _indices(self, answer: Range) -> list[int]:
        shuffle = Shuffle(self._terms.seed, answer.epoch, self._terms.size)
        indices = np.concatenate([shuffle.indices(low, high) for low, high in answer.ranges])
        return [int(index) for index in indices]


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        msg = f"ElasticSampler: {name} must be {low} to {high}, got {value}"
        raise ConfigError(msg)

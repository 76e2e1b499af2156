"""A worker's own copies of what goes with checkpoints: what is left of a machine that is dead.

What `psq.torch.copies` does with files and a thread, in virtual time: a copy is there whole a while
after it was begun, or never; the newest stay. Whoever begins with nothing else may go on from one,
if no server knows anything later of its rank.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from psq.client.identity import Identity

from .clock import Schedule

__all__ = ["Copies", "Copy"]

WRITE_S: Final = (0.005, 1.0)
KEPT: Final = 2


@dataclass(frozen=True, slots=True)
class Copy:
    """What a worker was when a version was made that became a checkpoint.

    Attributes:
        version: of the weights that go with it.
        servers: who made that a checkpoint.
        owner: the number of its residual's history.
        tickets: how many encodings there were in the whole job by then.
        identities: who it was to each server; it has no weights.
        residual, wanted: by shard, see `worker.Kept`.
    """

    version: int
    servers: tuple[int, ...]
    owner: int
    tickets: int
    identities: tuple[Identity, ...]
    residual: Mapping[int, int]
    wanted: Mapping[int, int]


class Copies:
    """The copies of one rank.

    Args:
        schedule: virtual time.
        rng: how long one takes, and whether it fails.
        chance: how likely one can be written.
    """

    def __init__(self, schedule: Schedule, rng: random.Random, chance: float) -> None:
        self._schedule = schedule
        self._rng = rng
        self._chance = chance
        self._begun = 0
        self._whole: dict[int, Copy] = {}
        self._unsaid: list[Copy] = []

    def write(self, copy: Copy) -> None:
        """Write it, unless the process dies meanwhile, or another one takes its place."""
        self._begun += 1
        mine = self._begun
        fails = self._rng.random() >= self._chance
        delay_s = self._rng.uniform(*WRITE_S)
        self._schedule.after(delay_s, lambda: None if fails else self._written(mine, copy))

    def end(self) -> None:
        """The process is gone: what is not whole never will be."""
        self._begun += 1
        self._unsaid.clear()

    def news(self) -> list[Copy]:
        """Those that are whole since this was asked last."""
        unsaid, self._unsaid = self._unsaid, []
        return unsaid

    def has(self, version: int) -> bool:
        """Whether a copy of this version was ever whole, or is of a later one's room."""
        return version in self._whole

    def found(self) -> list[Copy]:
        """Those that there are, the newest first."""
        return [self._whole[version] for version in sorted(self._whole, reverse=True)]

    def _written(self, number: int, copy: Copy) -> None:
        if number != self._begun:
            return
        self._whole[copy.version] = copy
        for version in sorted(self._whole)[:-KEPT]:
            del self._whole[version]
        self._unsaid.append(copy)
        self._schedule.note("copied", copy.owner, copy.version)

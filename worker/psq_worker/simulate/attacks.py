"""Workers that lie, in a simulated job: the last F ranks, with one of `psq.rules.attacks`.

They compute honestly first; what they say goes through their own residual and codec as anybody's
does. Three differ: `nan` spoils the payload itself, because a worker of psq would not send its own
NaN; `silent` skips every round; `little` is made of all liars' gradients, who need to be two or
more and to compute from the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from psq.errors import ConfigError
from psq.rules.attacks import ATTACKS, attack
from psq_worker.simulate.gradients import Computing, Gradients

__all__ = ["Attack", "Liars", "spoil"]

Floats = NDArray[np.float32]
NAN: Final = "nan"
SILENT: Final = "silent"
LITTLE: Final = "little"
COLLUDERS: Final = 2
_ALONE: Final = frozenset({"sign-flip", "scaled", "random"})
_LIES: Final = 0x11E5


@dataclass(frozen=True, slots=True)
class Attack:
    """Who lies, and how.

    Attributes:
        kind: one of ATTACKS.
        liars: how many.
        strength: of the lie; None takes the kind's own.
    """

    kind: str
    liars: int
    strength: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is none of these."""
        if self.kind not in ATTACKS:
            msg = f"attack: expected one of {', '.join(ATTACKS)}, got {self.kind!r}"
            raise ConfigError(msg)
        strength = 0.0 if self.strength is None else self.strength
        if self.liars < 1 or not 0.0 <= strength < math.inf:
            msg = f"attack: expected 1 or more liars and a strength of 0 or more, got {self!r}"
            raise ConfigError(msg)
        if self.strength is not None and self.kind in (NAN, SILENT):
            msg = f"attack: {self.kind} has no strength, got {self.strength!r}"
            raise ConfigError(msg)
        if self.kind == LITTLE and self.liars < COLLUDERS:
            msg = f"attack: {LITTLE} needs {COLLUDERS} liars or more, got {self.liars}"
            raise ConfigError(msg)

    def lies(self, rank: int, workers: int) -> bool:
        """Whether this rank is a liar."""
        return rank >= workers - self.liars

    def check(self, workers: int) -> None:
        """Refuse a job of liars.

        Raises:
            ConfigError: nobody is left who is honest.
        """
        if self.liars >= workers:
            msg = f"attack: {self.liars} liars leave nobody honest among {workers} workers"
            raise ConfigError(msg)


class Liars:
    """Computes what liars say.

    Args:
        gradients: honest ones.
        busy: the workers that compute now.
        workers: of the job.
        seed: of the job.
    """

    def __init__(
        self,
        gradients: Gradients,
        busy: Callable[[], Sequence[Computing]],
        workers: int,
        seed: int,
    ) -> None:
        self._gradients, self._busy = gradients, busy
        self._workers, self._seed = workers, seed
        self._plotted: dict[int, tuple[list[Floats], float]] = {}

    def compute(self, worker: Computing, how: Attack) -> float:
        """Show a liar's lie to its table; returns its honest loss."""
        if how.kind == LITTLE:
            said, loss = self._collude(worker, how)
            worker.table.show_gradients(said)
            return loss
        loss = self._gradients.compute(worker, self._busy)
        if how.kind in _ALONE:
            worker.table.show_gradients(self._lie(worker, how, ()))
        return loss

    def _collude(self, worker: Computing, how: Attack) -> tuple[list[Floats], float]:
        """One lie for all liars of this step; one who is alone says the truth."""
        if worker.rank not in self._plotted:
            liars = [each for each in self._busy() if how.lies(each.rank, self._workers)]
            losses, seen = [], []
            for each in liars:
                losses.append(self._gradients.compute(each, self._busy))
                seen.append([values.copy() for values in each.table.tensors])
            lie = self._lie(worker, how, seen) if len(seen) >= COLLUDERS else seen[0]
            for each, loss in zip(liars, losses, strict=True):
                self._plotted[each.rank] = (lie, loss)
        return self._plotted.pop(worker.rank)

    def _lie(
        self, worker: Computing, how: Attack, seen: Sequence[Sequence[Floats]]
    ) -> list[Floats]:
        rng = np.random.default_rng([_LIES, self._seed, worker.rank, worker.made])
        said: list[Floats] = []
        for index, honest in enumerate(worker.table.tensors):
            values = attack(
                how.kind,
                honest,
                seen=[each[index] for each in seen],
                world_size=self._workers,
                hostile=how.liars,
                rng=rng,
                strength=how.strength,
            )
            assert values is not None  # noqa: S101 - the kinds that say nothing are not asked
            said.append(np.ascontiguousarray(values, np.float32))
        return said


def spoil(payload: NDArray[np.uint8]) -> None:
    """Make the payload's first scale NaN."""
    nan = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)
    payload[: nan.size] = nan[: payload.size]

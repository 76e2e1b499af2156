"""What all recipes are given, and the one thing they share: a sum in the order of the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Job", "Vector", "Weights", "majority", "mean"]

Vector: TypeAlias = NDArray[np.float32]
Weights: TypeAlias = Iterator[Vector]


@dataclass(frozen=True)
class Job:
    """What is to be trained, and through what.

    Attributes:
        x: the weights to begin with, f32[d].
        workers: how many there are.
        gradient: gradient(rank, step, x), steps from 1: f32[d].
        rates: the learning rate of each round; a float is float32 where it meets a vector.
        up: what is left of a worker's message: up(c), up(c, marked=True) in the codec of rounds
            that are marked, up(c, bits=[...], rank=i, step=t) with bits for each layer.
        down: what is left of the server's: down(c), down(c, marked=True).
        layers: where each lies in x; one layer is one message.
        tensors: where each lies in x; layers are runs of them.
        noise: noise(rank, step): f32[d] or f64[d], of whatever kind the recipe wants.
    """

    x: Vector
    workers: int
    gradient: Callable[[int, int, Vector], Vector]
    rates: Sequence[float]
    up: Callable[..., Vector]
    down: Callable[..., Vector]
    layers: Sequence[slice] = ()
    tensors: Sequence[slice] = ()
    noise: Callable[[int, int], NDArray[Any]] | None = None

    @property
    def ranks(self) -> range:
        """Whose turn it is, in this order."""
        return range(self.workers)

    @property
    def zeros(self) -> Vector:
        """A state that nothing has happened to: never written, only replaced."""
        return np.zeros_like(self.x)

    def rounds(self) -> Iterator[tuple[int, float]]:
        """t and the learning rate of each round."""
        return enumerate(self.rates, 1)


def mean(said: Sequence[Vector]) -> Vector:
    """Of all workers, by ascending rank."""
    total = said[0]
    for each in said[1:]:
        total = total + each
    return total * np.float32(1.0 / len(said))


def majority(said: Sequence[Vector]) -> Vector:
    """+1 where at least as many say + as say -, else -1; 0 is said as +."""
    votes = sum(np.where(each >= 0.0, 1, -1) for each in said)
    return np.where(votes >= 0, np.float32(1.0), np.float32(-1.0))

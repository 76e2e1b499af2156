"""The order of a data set in an epoch: a permutation that every node computes by itself.

    index = P(position),  position in [0, size);  P follows from (seed, epoch, size) alone

Nothing is stored, whatever the size: a Feistel network over the least 2^(2h) >= size takes a
position to another one, and goes on from there while that is not below size (cycle walking: 4 tries
on average at most, since the domain is less than 4 size). A round exchanges the halves and mixes
one into the other:

    (left, right) <- (right, left xor (mix(right xor key_k) mod 2^h))       k = 0 .. ROUNDS - 1

    mix(z):  z <- (z xor z >> 30) * 0xBF58476D1CE4E5B9;  z <- (z xor z >> 27) * 0x94D049BB133111EB;
             z xor z >> 31                                                  all modulo 2^64
    key_k = mix(state + (k + 1) * GAMMA),  state = mix(mix(seed + GAMMA) + epoch * GAMMA)

mix is the finalizer of splitmix64 (Steele, Lea and Flood 2014), GAMMA its increment. A good shuffle
for training, no secret. Clients in other languages must compute the same, so these lines are part
of the protocol: `proto/README.md` has test values.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from psq.errors import UsageError

__all__ = ["MAX_SIZE", "Shuffle"]

MAX_SIZE: Final = 2**62
ROUNDS: Final = 8
GAMMA: Final = 0x9E3779B97F4A7C15
MULTIPLIERS: Final = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_U64: Final = 2**64 - 1

U64 = NDArray[np.uint64]


class Shuffle:
    """One epoch's permutation of [0, size).

    Args:
        seed: of the job, a u64.
        epoch: a u64.
        size: of the data set, 1 .. MAX_SIZE.

    Raises:
        UsageError: one of them is out of range.
    """

    def __init__(self, seed: int, epoch: int, size: int) -> None:
        if not (0 <= seed <= _U64 and 0 <= epoch <= _U64 and 1 <= size <= MAX_SIZE):
            msg = (
                f"a shuffle takes seed and epoch 0..2^64-1 and size 1..2^62, "
                f"got seed {seed}, epoch {epoch}, size {size}"
            )
            raise UsageError(msg)
        self.size: Final = size
        self._half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        state = _mix_one(_mix_one(seed + GAMMA) + epoch * GAMMA)
        self._keys = [np.uint64(_mix_one(state + (k + 1) * GAMMA)) for k in range(ROUNDS)]

    def indices(self, low: int, high: int) -> NDArray[np.int64]:
        """What lies at positions [low, high): i64[high - low].

        Cost: ROUNDS multiplications a position, four times that at most on average.

        Raises:
            UsageError: these are no positions.
        """
        if not 0 <= low <= high <= self.size:
            msg = f"positions of {self.size} are asked for as 0 <= low <= high, got {low}, {high}"
            raise UsageError(msg)
        found = self._pass(np.arange(low, high, dtype=np.uint64))
        outside = np.flatnonzero(found >= np.uint64(self.size))
        while outside.size:
            found[outside] = self._pass(found[outside])
            outside = outside[found[outside] >= np.uint64(self.size)]
        return found.astype(np.int64)

    def _pass(self, positions: U64) -> U64:
        """Once through the network."""
        left, right = positions >> self._half, positions & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right


def _mix(z: U64) -> U64:
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(multiplier)
    return z ^ (z >> np.uint64(31))


def _mix_one(z: int) -> int:
    z &= _U64
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
        z = ((z ^ (z >> shift)) * multiplier) & _U64
    return z ^ (z >> 31)

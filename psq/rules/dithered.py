"""Noise before a sign, so that the sign is right on average: c = g + uniform(-b, b).

P(sign c = +1) = (b + g) / (2 b) for |g| <= b, so b E[sign c] = g, after 2002.10940. b is the
largest |g| among DEFAULT_BLOCK values of a tensor, or a fixed number, to which g is clipped first.
What a vote is worth then differs from block to block; workers with larger gradients do not count
more.

A block of zeros gets a tiny b: its signs are fair coins, not a vote for +1.

The noise follows from the job's seed, the rank, the worker's step and the shard: it can be
replayed, and hides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np

from psq.codec import DEFAULT_BLOCK
from psq.kernels import Floats
from psq.rules.base import DirectionRule, Segments
from psq.rules.directions import gather
from psq.seeds import stream_seed

__all__ = ["Dithered"]

_USE: Final = 0xD17  # keeps this stream apart from the codec's
_SMALLEST: Final = np.float32(2.0**-90)
_HALF: Final = 1 << 23


class Dithered(DirectionRule):
    """The gradient with uniform noise: for the sign codec without error feedback."""

    def write(  # noqa: D102, PLR0913 - as the base class
        self,
        shard: int,
        t: int,
        lr: float,
        gradients: Segments,
        out: Floats,
        *,
        weights: Segments | None,
        shared: Mapping[str, Floats],
    ) -> None:
        del t, lr, weights, shared
        gather(gradients, out)
        seed = stream_seed(self.seed, self.rank, self.count(shard), shard, _USE)
        noise = _uniform(seed, out.size)
        for block in self._blocks(shard, out):
            self._dither(out[block], noise[block])

    def _dither(self, values: Floats, noise: Floats) -> None:
        b = np.float32(self.options["b"])
        if b:
            np.clip(values, -b, b, out=values)
        else:
            b = np.maximum(np.abs(values).max(), _SMALLEST)
        np.multiply(noise, b, out=noise)
        np.add(values, noise, out=values)

    def _blocks(self, shard: int, values: Floats) -> Iterator[slice]:
        """The runs of values that share a b: none spans two tensors."""
        if self.options["b"]:
            yield slice(0, values.size)
            return
        for segment in self.cut(shard).segments:
            stop = segment.offset + segment.numel
            for start in range(segment.offset, stop, DEFAULT_BLOCK):
                yield slice(start, min(start + DEFAULT_BLOCK, stop))


def _uniform(seed: int, numel: int) -> Floats:
    """f32[numel] in (-1, 1): the 2^24 odd multiples of 2^-24, each as likely.

    Raw numbers of PCG64, whose stream is fixed for ever, in the order of a little-endian machine.
    """
    raw = np.random.PCG64(seed).random_raw((numel + 1) // 2)
    words = raw.astype("<u8", copy=False).view("<u4")[:numel]
    odd = (words >> 8).astype(np.int32) * 2 + 1 - 2 * _HALF
    return odd.astype(np.float32) * np.float32(1.0 / (2 * _HALF))

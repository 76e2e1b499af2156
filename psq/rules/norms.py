"""How large a message is, as choices of bits measure it.

    l2    sqrt(sum c^2)
    max   the root mean square, over the values, of the largest |c| of each value's block

c is the message, plus the residual where there is one. `max` is what the loss of a codec with a
scale for every block is proportional to; `l2` is what DQ-SGD writes for one scale of a whole layer.
Both come from the kernel that scales are made by, which has the same bits on every level: what is
chosen by a norm is the same on every machine. Cost: one read of the message and of the residual.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from psq import kernels
from psq.codec import ShardCodec
from psq.kernels import BLOCKS, WHOLE, Floats, Residual

__all__ = ["ShardNorm"]


class ShardNorm:
    """The norm of one shard's messages.

    Args:
        kind: l2 or max.
        codec: what the shard is written in; its block is what `max` goes by.
    """

    def __init__(self, kind: str, codec: ShardCodec) -> None:
        self._is_max = kind == "max"
        self._block = codec.codec.format.block if self._is_max else max(BLOCKS)
        self._segments = codec.shard.segments
        self._numel = codec.shard.numel
        self._counts = [_counts(segment.numel, self._block) for segment in self._segments]
        self._norms = [np.empty(counts.size, np.float32) for counts in self._counts]

    def of(self, message: Floats, residual: Residual | None = None) -> float:
        """The norm of a message; NaN where it is not finite.

        Args:
            message: f32[shard.numel].
            residual: f32 or bf16 (uint16) [shard.numel], added; or None.
        """
        total, level = 0.0, kernels.active()
        for segment, counts, norms in zip(self._segments, self._counts, self._norms, strict=True):
            at = slice(segment.offset, segment.offset + segment.numel)
            rest = None if residual is None else residual[at]
            level.block_norms(message[at], rest, self._block, self._is_max, norms)
            total += float(np.sum(counts * np.square(norms, dtype=np.float64)))
        return float(np.sqrt(total / self._numel if self._is_max else total))


def _counts(numel: int, block: int) -> NDArray[np.float64]:
    """How many values each scale of a segment is for."""
    if block == WHOLE:
        return np.array([numel], np.float64)
    counts = np.full(-(-numel // block), block, np.float64)
    counts[-1] = numel - block * (counts.size - 1)
    return counts

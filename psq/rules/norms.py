"""How large a message is, by what the encoders find out anyway: the scales of a throwaway payload.

    l2    sqrt(sum c^2)                                   from signs, whose scale is a block's rms
    max   the root mean square, over the values, of the   from powers of two, whose scale is a
          largest |c| of each value's block               block's largest |c|

c is the message, plus the residual where there is one. `max` is what the loss of a codec with a
scale for every block is proportional to; `l2` is what DQ-SGD writes for one scale of a whole layer.
Kernels give the same bits on every level, so what is chosen by a norm is the same on every machine.

Cost: one read of the message at the speed of a codec; with a residual also its sum with it, which
goes through a buffer of a shard.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from psq.codec import ShardCodec, get_codec
from psq.kernels import BLOCKS, WHOLE, Floats

__all__ = ["ShardNorm"]

_SPECS = {"l2": "sign:norm=l2", "max": "log:k=0"}


class ShardNorm:
    """The norm of one shard's messages.

    Args:
        kind: l2 or max.
        codec: what the shard is written in; its block is what `max` goes by.
    """

    def __init__(self, kind: str, codec: ShardCodec) -> None:
        block = codec.codec.format.block if kind == "max" else max(BLOCKS)
        spec = f"{_SPECS[kind]},block={block}"
        self._codec = ShardCodec(get_codec(spec), codec.shard)
        self._is_mean = kind == "max"
        self._counts = np.concatenate(
            [_counts(segment.numel, block) for segment in codec.shard.segments]
        )

    @property
    def nbytes(self) -> int:
        """Of the buffer that `of` needs."""
        return self._codec.nbytes

    def of(self, message: Floats, payload: NDArray[np.uint8]) -> float:
        """The norm of a message, f32[shard.numel]; NaN where it is not finite.

        Args:
            message: the message.
            payload: u8[nbytes], of which the content means nothing.
        """
        self._codec.encode(message, payload)
        scales = self._codec.scales(payload).astype(np.float64)
        total = float(np.sum(self._counts * np.square(scales)))
        return float(np.sqrt(total / self._codec.shard.numel if self._is_mean else total))


def _counts(numel: int, block: int) -> NDArray[np.float64]:
    """How many values each scale of a segment is for."""
    if block == WHOLE:
        return np.array([numel], np.float64)
    counts = np.full(-(-numel // block), block, np.float64)
    counts[-1] = numel - block * (counts.size - 1)
    return counts

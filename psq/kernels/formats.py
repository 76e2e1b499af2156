"""What a payload is made of: families of codecs, their parameters, and exact sizes.

A payload is `[f32 scales | u32 words]`, little endian, nothing between. Values come in groups of
512 = 32 rows of 16 lanes: value 16 j + l of a group is row j, lane l. Its code has b bits. Lane l
of the group's words holds a stream of 32 b bits, row 0 first, each code least bit first, in b
words; word w of all lanes lies before word w + 1 of any. The last group is padded with zeros, in
the payload only. fp32 alone has no words: its payload is the values. topk has entries instead, some
bytes for each block: see `reference_topk`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

__all__ = ["BLOCKS", "GROUP", "LANES", "ROWS", "WHOLE", "Family", "Format"]

LANES: Final = 16
ROWS: Final = 32
GROUP: Final = LANES * ROWS
WHOLE: Final = 0  # a block that is the whole segment
BLOCKS: Final = (WHOLE, 256, 512, 1024, 2048, 4096, 8192)

_BITS: Final = {1: (1,), 2: (2, 3, 4), 3: range(2, 9), 4: range(2, 9), 5: (1, 2, 3, 4)}


class Family(IntEnum):
    """How a value becomes a code. The numbers are on the wire and in the native code."""

    SIGN = 1
    LOG = 2
    UNIFORM = 3
    STOCHASTIC = 4
    LLOYD_MAX = 5
    BF16 = 6
    FP32 = 7
    TOPK = 8


class Format(NamedTuple):
    """All that the kernels need to know of a codec; unpacks into their first four arguments."""

    family: int
    bits: int  # per value in the words; topk: of an entry
    parameter: int  # sign: 1 or 2, the norm that is the scale; log: k; topk: log2 k; else 0
    block: int  # values that share a scale: one of BLOCKS

    @property
    def is_known(self) -> bool:
        """Whether the kernels implement it."""
        if self.family in (Family.BF16, Family.FP32):
            return self[1:] == ((16 if self.family == Family.BF16 else 32), 0, WHOLE)
        if self.family == Family.TOPK:
            widths = {block: block.bit_length() for block in BLOCKS if block != WHOLE}
            return self.bits == widths.get(self.block) and self.parameter in range(8)
        parameters = {
            Family.SIGN: range(1, 3),
            Family.LOG: range((1 << (self.bits - 1)) - 1) if self.bits > 0 else range(0),
        }
        return (
            self.bits in _BITS.get(self.family, ())
            and self.parameter in parameters.get(Family(self.family), range(1))
            and self.block in BLOCKS
        )

    @property
    def entry_bytes(self) -> int:
        """Of topk: bytes of a block's entries."""
        return -(-(self.bits << self.parameter) // 8)

    def scale_count(self, numel: int) -> int:
        """How many scales a segment of `numel` values has."""
        if self.family in (Family.BF16, Family.FP32):
            return 0
        return min(numel, 1) if self.block == WHOLE else -(-numel // self.block)

    def payload_bytes(self, numel: int) -> int:
        """Exact bytes of the payload of a segment of `numel` values."""
        if self.family == Family.FP32:
            return 4 * numel
        if self.family == Family.TOPK:
            return self.scale_count(numel) * (4 + self.entry_bytes)
        return 4 * self.scale_count(numel) + -(-numel // GROUP) * (GROUP // 8) * self.bits

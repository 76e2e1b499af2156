"""Payloads as they travel, at work without being decoded whole: votes and distances.

A sign payload is a bit for each value and a scale for each block, and that is enough to count and
to compare. What is here for it costs a few bitwise operations on numel / 32 words:

    majority   each worker's bits are one plane; planes are added like binary numbers, all columns
               at once, by full adders (5 operations a vote): log2(W) + 1 planes hold the counts
    distance   |a - b|^2 = sum over blocks of  n (s_a - s_b)^2 + 4 s_a s_b p
               n values in the block, s the scales, p = popcount(a XOR b). The same number as
               n (s_a^2 + s_b^2) - 2 s_a s_b (n - 2 p), but nothing cancels

Messages in other codecs are compared window by window, see `psq.rules.windows`.

A segment's last words are padded; a hostile worker may set those bits. They are cleared when a
plane is taken out, so that no count and no distance ever sees them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from psq.codec import ShardCodec, get_codec
from psq.errors import ConfigError
from psq.kernels import GROUP, WHOLE, Buffer, Family, Floats
from psq.layout import Shard
from psq.rules.windows import WINDOW_NUMEL, Message, Windows

__all__ = ["Plane", "SignPlanes", "Votes", "distances", "write_signs"]

Plane: TypeAlias = NDArray[np.uint64]
"""A bit for each value of a shard, u64[8 for each 512 values of a segment]: 1 is minus."""

HALF: Final = GROUP // 2  # a block is never smaller
GROUP_BYTES: Final = GROUP // 8
LANES: Final = 16
ROW: Final = 16  # values in a row of a group: bit j of word l is value 16 j + l
LOW_ROWS: Final = np.uint64(0x0000FFFF0000FFFF)  # the first half of a group, in two words
BYTES: Final = np.uint64(0x00FF00FF00FF00FF)
FOLD: Final = np.uint64(0x0001000100010001)
HIGHEST: Final = np.uint64(48)
EIGHT: Final = np.uint64(8)


# ---- planes of signs -----------------------------------------------------------------------------


class SignPlanes:
    """Takes signs and scales out of a shard's payloads in one sign codec.

    Args:
        codec: of the payloads.

    Raises:
        ConfigError: the codec says more than signs.
    """

    def __init__(self, codec: ShardCodec) -> None:
        form = codec.codec.format
        if form.family != Family.SIGN:
            msg = f"votes are counted on sign payloads, got codec {codec.codec.spec!r}: use sign"
            raise ConfigError(msg)
        self._block: Final = form.block
        self._numels: Final = [segment.numel for segment in codec.shard.segments]
        self._heads: Final = [4 * form.scale_count(numel) for numel in self._numels]
        self._groups: Final = _groups(codec.shard)
        self._tails: Final = list(_tails(self._numels))

    def plane(self, payload: Buffer) -> Plane:
        """The signs of a payload: a copy, padding cleared. Cost: one pass over its bytes."""
        received = np.frombuffer(payload, np.uint8)
        words = np.empty(GROUP_BYTES * sum(self._groups), np.uint8)
        start = at = 0
        for head, groups in zip(self._heads, self._groups, strict=True):
            size = GROUP_BYTES * groups
            words[at : at + size] = received[start + head : start + head + size]
            start, at = start + head + size, at + size
        plane = words.view("<u4").astype(np.uint32, copy=False)
        for stop, mask in self._tails:
            plane[stop - LANES : stop] &= mask
        return plane.view(np.uint64)

    def scales(self, payload: Buffer) -> NDArray[np.float64]:
        """The scale of each half group of a payload: f64[2 for each 512 values of a segment]."""
        received = np.frombuffer(payload, np.uint8)
        parts: list[NDArray[np.float64]] = []
        start = 0
        for head, groups in zip(self._heads, self._groups, strict=True):
            scales = received[start : start + head].view("<f4").astype(np.float64)
            each = 2 * groups if self._block == WHOLE else self._block // HALF
            parts.append(np.resize(np.repeat(scales, each), 2 * groups))
            start += head + GROUP_BYTES * groups
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def write_signs(plane: Plane, shard: Shard, out: Floats) -> None:
    """Write +1 or -1 to out, f32[shard.numel]: a plane is a sign payload whose scales are 1."""
    codec = ShardCodec(get_codec("sign:block=0"), shard)
    payload = np.empty(codec.nbytes, np.uint8)
    words = plane.view(np.uint32).astype("<u4", copy=False).view(np.uint8)
    start = at = 0
    for segment in shard.segments:
        size = GROUP_BYTES * -(-segment.numel // GROUP)
        payload[start : start + 4].view("<f4")[:] = 1.0
        payload[start + 4 : start + 4 + size] = words[at : at + size]
        start, at = start + 4 + size, at + size
    codec.decode(payload, out)


def _tails(numels: Sequence[int]) -> Iterator[tuple[int, NDArray[np.uint32]]]:
    """Of each segment with padding: where its words end, and which bits of the last 16 are real."""
    stop = 0
    for numel in numels:
        stop += LANES * -(-numel // GROUP)
        rest = numel % GROUP
        if rest:
            rows = -(-np.maximum(rest - np.arange(LANES), 0) // ROW)
            yield stop, ((np.uint64(1) << rows.astype(np.uint64)) - np.uint64(1)).astype(np.uint32)


# ---- votes ---------------------------------------------------------------------------------------


class Votes:
    """Counts of ones, for every column of some planes, as binary numbers one plane a digit.

    A digit keeps up to two planes that are yet to be added; three make one and a carry. Memory:
    two planes for each of log2(votes) + 1 digits. Cost: 5 bitwise operations a vote.
    """

    def __init__(self) -> None:
        self._digits: list[list[Plane]] = []

    def add(self, plane: Plane, weight: int = 1) -> None:
        """Count a plane `weight` times; the plane is kept, and only read."""
        digit = 0
        while weight:
            if weight & 1:
                self._put(digit, plane)
            weight >>= 1
            digit += 1

    def over(self, threshold: int) -> Plane:
        """Where the count is greater than a threshold >= 0; at least one vote was counted."""
        digits = self._totals()
        first = digits[0]
        greater, equal = np.zeros_like(first), np.full_like(first, ~np.uint64(0))
        if threshold >> len(digits):
            return greater
        for digit in reversed(range(len(digits))):
            if threshold >> digit & 1:
                equal &= digits[digit]
            else:
                greater |= equal & digits[digit]
                equal &= ~digits[digit]
        return greater

    def _put(self, digit: int, plane: Plane) -> None:
        while True:
            while len(self._digits) <= digit:
                self._digits.append([])
            kept = self._digits[digit]
            kept.append(plane)
            if len(kept) < 3:  # noqa: PLR2004 - what a full adder takes
                return
            a, b, c = kept
            odd = a ^ b
            kept[:] = [odd ^ c]
            plane = (a & b) | (odd & c)
            digit += 1

    def _totals(self) -> list[Plane]:
        """One plane a digit: what is yet to be added is."""
        digit = 0
        while digit < len(self._digits):
            if len(self._digits[digit]) == 2:  # noqa: PLR2004 - what a half adder takes
                a, b = self._digits[digit]
                self._digits[digit] = [a ^ b]
                self._put(digit + 1, a & b)
            digit += 1
        zero = np.zeros_like(next(kept[0] for kept in self._digits if kept))
        return [kept[0] if kept else zero for kept in self._digits]


# ---- distances -----------------------------------------------------------------------------------


def distances(shard: Shard, messages: Sequence[Message]) -> NDArray[np.float64]:
    """Squared L2 distances between messages of one shard, f64[n, n].

    Row and column i are message i; next to a message of zeros, None, they are squared norms. What
    overflows is infinite; with an infinite scale, which no server lets in, it may be NaN.

    Cost: n^2 / 2 times numel / 64 XORs and popcounts where all are in sign; else n decodes and
    n^2 / 2 float32 passes over windows in the cache (relative error below 1e-4).
    """
    families = {said[0].codec.format.family for said in messages if said is not None}
    method = _sign_distances if families == {Family.SIGN} else _window_distances
    with np.errstate(over="ignore", invalid="ignore"):
        return method(shard, messages)


def _sign_distances(shard: Shard, messages: Sequence[Message]) -> NDArray[np.float64]:
    halves = any(said is not None and said[0].codec.format.block == HALF for said in messages)
    numels = _unit_numels(shard, halves=halves)
    nothing = np.zeros(GROUP_BYTES // 8 * sum(_groups(shard)), np.uint64)
    planes, scales = [nothing] * len(messages), [np.zeros(numels.size)] * len(messages)
    for index, said in enumerate(messages):
        if said is not None:
            signs = SignPlanes(said[0])
            planes[index], scales[index] = signs.plane(said[1]), signs.scales(said[1])
            if not halves:
                scales[index] = scales[index][::2]
    result = np.zeros((len(messages), len(messages)))
    for i, j in combinations(range(len(messages)), 2):
        differ = planes[i] ^ planes[j]
        counts = _half_counts(differ) if halves else _group_counts(differ)
        apart = numels @ (scales[i] - scales[j]) ** 2
        result[i, j] = result[j, i] = apart + 4.0 * ((scales[i] * scales[j]) @ counts)
    return result


def _unit_numels(shard: Shard, *, halves: bool) -> NDArray[np.float64]:
    """How many real values each group, or each half of one, has: f64."""
    unit = HALF if halves else GROUP
    parts: list[NDArray[np.float64]] = []
    for segment, groups in zip(shard.segments, _groups(shard), strict=True):
        starts = unit * np.arange(GROUP // unit * groups)
        parts.append(np.clip(segment.numel - starts, 0, unit).astype(np.float64))
    return np.concatenate(parts)


def _groups(shard: Shard) -> list[int]:
    return [-(-segment.numel // GROUP) for segment in shard.segments]


def _half_counts(bits: Plane) -> NDArray[np.float64]:
    """Ones in each half of a group."""
    counts = np.empty((bits.size // 8, 2))
    counts[:, 0] = _group_counts(bits & LOW_ROWS)
    counts[:, 1] = _group_counts(bits) - counts[:, 0]
    return counts.reshape(-1)


def _group_counts(bits: Plane) -> NDArray[np.float64]:
    """Ones in each group: the eight counts of its words, added within one u64."""
    counts: NDArray[np.uint64] = np.bitwise_count(bits).view(np.uint64)  # a byte each, <= 64
    pairs = (counts & BYTES) + (counts >> EIGHT & BYTES)
    return (pairs * FOLD >> HIGHEST).astype(np.float64)


def _window_distances(shard: Shard, messages: Sequence[Message]) -> NDArray[np.float64]:
    result = np.zeros((len(messages), len(messages)))
    apart = np.empty((len(messages), WINDOW_NUMEL), np.float32)
    for _, rows in Windows(shard).rows(messages):
        for i in range(len(messages) - 1):
            differences = apart[i + 1 :, : rows.shape[1]]
            np.subtract(rows[i + 1 :], rows[i], out=differences)
            result[i, i + 1 :] += np.vecdot(differences, differences)
    return result + result.T

"""A segment's payload, read and written piece by piece, so that nobody needs it decoded whole.

A payload is `[scales | codes]` (see `psq.kernels.formats`): a piece of its values has a run of
either, and both together are the payload of a segment of so many values. Pieces start at multiples
of `PIECE_NUMEL`, where a block and a group of codes begin. A scale that spans the segment
(block=0) belongs to every piece that is read; such a segment is written in one piece.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from psq.codec import Codec, ShardCodec
from psq.kernels import GROUP, WHOLE, Buffer, Family, Floats, Format

__all__ = ["PIECE_NUMEL", "SegmentPayload", "cuts", "segment_payloads"]

PIECE_NUMEL: Final = 65_536
_SCALE_BYTES: Final = 4
_PLAIN: Final = (Family.BF16, Family.FP32)


class SegmentPayload:
    """The payload of one segment.

    Args:
        codec: what it is written in.
        received: u8[codec.nbytes(numel)], a view.
        numel: how many values it has.
    """

    def __init__(self, codec: Codec, received: NDArray[np.uint8], numel: int) -> None:
        self._codec = codec
        self._bytes = received
        self._numel = numel

    def decode(self, at: slice, out: Floats, *, add: bool) -> None:
        """Write the values [at) to out, f32 of as many, or add them to it."""
        decode = self._codec.decode_add if add else self._codec.decode
        decode(self._gather(at), out)

    def encode(self, at: slice, values: Floats, residual: Floats, *, seed: int) -> None:
        """Write the values [at): values + residual; what is left out stays in the residual."""
        if self._is_all(at):
            self._codec.encode_ef(values, residual, self._bytes, seed=seed)
            return
        piece = np.empty(self._codec.nbytes(values.size), np.uint8)
        self._codec.encode_ef(values, residual, piece, seed=seed)
        start = 0
        for run in self._runs(at):
            length = run.stop - run.start
            self._bytes[run] = piece[start : start + length]
            start += length

    def _gather(self, at: slice) -> NDArray[np.uint8]:
        if self._is_all(at):
            return self._bytes
        return np.concatenate([self._bytes[run] for run in self._runs(at)])

    def _is_all(self, at: slice) -> bool:
        return bool(at.stop - at.start == self._numel)

    def _runs(self, at: slice) -> tuple[slice, slice]:
        form = self._codec.format
        scales, codes_start = _scales(form, at), _SCALE_BYTES * form.scale_count(self._numel)
        start = codes_start + _code_bytes(form, at.start)
        end = codes_start + _code_bytes(form, at.stop)
        return scales, slice(start, end)


def segment_payloads(codec: ShardCodec, payload: Buffer) -> list[SegmentPayload]:
    """The payloads of a shard's segments, in order: views of u8[codec.nbytes]."""
    received = np.frombuffer(payload, np.uint8)
    found: list[SegmentPayload] = []
    start = 0
    for segment in codec.shard.segments:
        end = start + codec.codec.nbytes(segment.numel)
        found.append(SegmentPayload(codec.codec, received[start:end], segment.numel))
        start = end
    return found


def cuts(codec: Codec, numel: int) -> list[slice]:
    """The pieces in which a segment of so many values can be written."""
    spans = codec.format.block == WHOLE and codec.format.family not in _PLAIN
    step = numel if spans else PIECE_NUMEL
    return [slice(start, min(start + step, numel)) for start in range(0, numel, step)]


def _scales(form: Format, at: slice) -> slice:
    if form.family in _PLAIN:
        return slice(0, 0)
    if form.block == WHOLE:
        return slice(0, _SCALE_BYTES)
    return slice(_SCALE_BYTES * (at.start // form.block), _SCALE_BYTES * -(-at.stop // form.block))


def _code_bytes(form: Format, numel: int) -> int:
    """What the codes of the first `numel` values take; they end a piece, or the segment."""
    if form.family == Family.FP32:
        return _SCALE_BYTES * numel
    if form.family == Family.TOPK:
        return -(-numel // form.block) * form.entry_bytes
    return -(-numel // GROUP) * (GROUP // 8) * form.bits

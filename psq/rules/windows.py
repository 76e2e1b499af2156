"""Payloads of several workers, decoded a few thousand values at a time.

A window is a run of at most WINDOW_NUMEL values of a shard, of one segment or of several small
ones. Long segments are cut at multiples of every block, so that a part of a payload, its scales and
its words, is a payload by itself and decodes to the same values. What works value by value, or adds
up over values, never needs n dense vectors: the same window of every worker is a table that stays
in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from psq.codec import ShardCodec
from psq.kernels import GROUP, WHOLE, Buffer, Family, Floats, Format
from psq.layout import SPLIT_NUMEL, Shard

__all__ = ["WINDOW_NUMEL", "Message", "Windows"]

Message: TypeAlias = tuple[ShardCodec, Buffer] | None
"""What a worker said of a shard; None is nothing, and counts as zeros."""

WINDOW_NUMEL: Final = 4 * SPLIT_NUMEL
"""Values of each worker that are decoded at once: rows of 128 KiB."""
GROUP_BYTES: Final = GROUP // 8  # of a plane of bits


class _Piece(NamedTuple):
    segment: int
    start: int  # in the segment: a multiple of every block
    numel: int


class Windows:
    """A shard cut into runs of at most WINDOW_NUMEL values that any codec decodes by themselves."""

    def __init__(self, shard: Shard) -> None:
        self._numels: Final = [segment.numel for segment in shard.segments]
        self._windows: Final = list(_windows(self._numels))

    def rows(self, messages: Sequence[Message]) -> Iterator[tuple[slice, Floats]]:
        """The same values of every message, window by window.

        Yields:
            Which values of the shard, and f32[messages, values], which the next turn overwrites.
        """
        table = np.zeros((len(messages), min(sum(self._numels), WINDOW_NUMEL)), np.float32)
        starts = [_starts(said, self._numels) for said in messages]
        offset = 0
        for pieces in self._windows:
            numel = sum(piece.numel for piece in pieces)
            rows = table[:, :numel]
            for row, said, places in zip(rows, messages, starts, strict=True):
                if said is None:
                    row.fill(0.0)
                else:
                    self._decode(said, places, pieces, row)
            yield slice(offset, offset + numel), rows
            offset += numel

    def _decode(
        self,
        said: tuple[ShardCodec, Buffer],
        places: Sequence[int],
        pieces: Sequence[_Piece],
        out: Floats,
    ) -> None:
        codec, payload = said[0].codec, np.frombuffer(said[1], np.uint8)
        at = 0
        for piece in pieces:
            numel = self._numels[piece.segment]
            place = places[piece.segment]
            whole = payload[place : place + codec.nbytes(numel)]
            codec.decode(_part(codec.format, whole, numel, piece), out[at : at + piece.numel])
            at += piece.numel


def _windows(numels: Sequence[int]) -> Iterator[list[_Piece]]:
    pieces: list[_Piece] = []
    room = WINDOW_NUMEL
    for segment, numel in enumerate(numels):
        start = 0
        while start < numel:
            rest = numel - start
            take = rest if rest <= room else room - room % SPLIT_NUMEL
            if take:
                pieces.append(_Piece(segment, start, take))
                start, room = start + take, room - take
            if start < numel or not room:
                yield pieces
                pieces, room = [], WINDOW_NUMEL
    if pieces:
        yield pieces


def _starts(said: Message, numels: Sequence[int]) -> list[int]:
    """Where each segment's payload begins, and the last one's end."""
    if said is None:
        return []
    return [0, *accumulate(said[0].codec.nbytes(numel) for numel in numels)]


def _part(form: Format, payload: NDArray[np.uint8], numel: int, piece: _Piece) -> NDArray[np.uint8]:
    """The payload of a piece of a segment, which decodes to the same values as the segment's."""
    if piece.numel == numel:
        return payload
    start, stop = piece.start, piece.start + piece.numel
    if form.family == Family.FP32:
        return payload[4 * start : 4 * stop]
    head = 4 * form.scale_count(numel)
    scales = payload[:head]
    if form.block != WHOLE:
        scales = scales[4 * (start // form.block) : 4 * -(-stop // form.block)]
    unit = form.block if form.family == Family.TOPK else GROUP
    size = form.entry_bytes if form.family == Family.TOPK else GROUP_BYTES * form.bits
    body = payload[head + start // unit * size : head + -(-stop // unit) * size]
    return np.concatenate((scales, body))

"""A codec over one shard: the payloads of its segments, one after another.

A segment is a slice of one tensor, so no scale is shared between tensors. Values may lie in one
flat array, or in one array per segment: a worker's gradients are never copied together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from psq import kernels
from psq.codec.base import Codec
from psq.errors import RemotePayloadError, UsageError
from psq.kernels import Buffer, Family, Floats, Residual
from psq.layout import Shard

__all__ = ["MAX_SCALE", "ShardCodec"]

MAX_SCALE: Final = 2.0**56
"""Scales (bf16, fp32: values) that a server takes. No code means more than 128 scales, so the
square of what a worker says, and the sum over any number of workers, are float32 numbers."""
_NO_SCALES_ALONE: Final = frozenset({Family.BF16, Family.FP32, Family.TOPK})
_SEED_STRIDE: Final = 0xD1B54A32D192ED03  # odd: the segments' seeds differ


class _Range(NamedTuple):
    values: slice  # of the shard's flat vector
    payload: slice  # bytes
    numel: int


class ShardCodec:
    """Encodes and decodes one shard.

    Attributes:
        codec: what each segment goes through.
        shard: the run of segments.
        nbytes: exact bytes of the shard's payload.
    """

    def __init__(self, codec: Codec, shard: Shard) -> None:
        self.codec: Final = codec
        self.shard: Final = shard
        self._ranges: Final = tuple(_ranges(codec, shard))
        self.nbytes: Final = self._ranges[-1].payload.stop if self._ranges else 0
        self._says_all_in_scales: Final = codec.format.family not in _NO_SCALES_ALONE

    def encode(self, values: Floats, payload: Buffer, *, seed: int = 0) -> None:
        """Quantize values, f32[shard.numel], into payload, u8[nbytes].

        Raises:
            UsageError: values or payload have another length than the shard.
            TypeError: values or payload have another type or layout.
        """
        self._check_flat(values)
        self.encode_segments(self._split(values), None, payload, seed=seed)

    def encode_ef(
        self, values: Floats, residual: Residual, payload: Buffer, *, seed: int = 0
    ) -> None:
        """Quantize values + residual, both f32[shard.numel]; the rest stays in the residual.

        Raises:
            UsageError: an argument has another length than the shard.
            TypeError: an argument has another type or layout.
        """
        self._check_flat(values)
        self.encode_segments(self._split(values), residual, payload, seed=seed)

    def encode_segments(
        self,
        values: Sequence[Floats],
        residual: Residual | None,
        payload: Buffer,
        *,
        seed: int = 0,
        clear: bool = False,
    ) -> None:
        """Quantize one array per segment, plus the residual if there is one.

        Args:
            values: f32[segment.numel] for each segment, in order.
            residual: f32[shard.numel], flat, updated in place; or bf16 (uint16); or None.
            payload: u8[nbytes], written.
            seed: of stochastic codecs; each segment draws from a stream of its own.
            clear: what is finite of the values becomes 0 in the same pass.

        Raises:
            UsageError: an argument has another length than the shard or its segment.
            TypeError: an argument has another type or layout.
        """
        self._check_segments(values)
        if residual is not None:
            self._check_flat(residual)
        out = self._bytes(payload)
        encode, encode_ef = self.codec.encode, self.codec.encode_ef
        for at, part in zip(self._ranges, values, strict=True):
            if residual is None:
                encode(part, out[at.payload], seed=seed, clear=clear)
            else:
                encode_ef(part, residual[at.values], out[at.payload], seed=seed, clear=clear)
            seed += _SEED_STRIDE

    def starts(self, seed: int) -> list[int]:
        """Where each segment's random stream begins when the shard is encoded with this seed."""
        if not self.codec.stochastic:
            return [0] * len(self._ranges)
        return [self.codec.start(seed + i * _SEED_STRIDE) for i in range(len(self._ranges))]

    def decode(self, payload: Buffer, out: Floats) -> None:
        """Write the payload's values to out, f32[shard.numel].

        Raises:
            UsageError: an argument has another length than the shard.
            TypeError: an argument has another type or layout.
        """
        self._check_flat(out)
        self.decode_segments(payload, self._split(out))

    def decode_add(self, payload: Buffer, out: Floats) -> None:
        """Add the payload's values to out; otherwise as `decode`."""
        self._check_flat(out)
        self.decode_add_segments(payload, self._split(out))

    def decode_segments(self, payload: Buffer, out: Sequence[Floats]) -> None:
        """Write the payload's values to one array per segment, f32[segment.numel] each.

        Raises:
            UsageError: an argument has another length than the shard or its segment.
            TypeError: an argument has another type or layout.
        """
        self._check_segments(out)
        received = self._bytes(payload)
        for at, part in zip(self._ranges, out, strict=True):
            self.codec.decode(received[at.payload], part)

    def decode_add_segments(self, payload: Buffer, out: Sequence[Floats]) -> None:
        """Add the payload's values to one array per segment; otherwise as `decode_segments`."""
        self._check_segments(out)
        received = self._bytes(payload)
        for at, part in zip(self._ranges, out, strict=True):
            self.codec.decode_add(received[at.payload], part)

    def check(self, payload: Buffer) -> None:
        """Refuse a payload that is not one of this shard's, or not finite.

        Raises:
            RemotePayloadError: wrong length, or a scale (bf16, fp32: a value) that is NaN or Inf.
        """
        received = memoryview(payload)
        if received.nbytes != self.nbytes:
            msg = (
                f"payload of shard {self.shard.index} ({self.shard.numel} values in "
                f"{self.codec.spec!r}) must have {self.nbytes} bytes, got {received.nbytes}: "
                "both sides must run the same model and recipe"
            )
            raise RemotePayloadError(msg)
        if self._says_all_in_scales and kernels.all_finite(self.scales(received)):
            return  # else find out where
        for at, segment in zip(self._ranges, self.shard.segments, strict=True):
            try:
                self.codec.check(received[at.payload], at.numel)
            except RemotePayloadError as error:
                msg = f"shard {self.shard.index}, tensor {segment.tensor}: {error}"
                raise RemotePayloadError(msg) from error

    def check_bound(self, payload: Buffer) -> None:
        """Refuse a payload that is finite, but too large to be added up and squared.

        Raises:
            RemotePayloadError: a scale (bf16, fp32: a value) is over `MAX_SCALE`.
        """
        scales = self.scales(payload)
        largest = max(scales.max(initial=0.0), -scales.min(initial=0.0))
        if not largest <= MAX_SCALE:
            msg = (
                f"shard {self.shard.index} in {self.codec.spec!r} has a scale of {largest:.3g}, "
                f"the limit is {MAX_SCALE:.3g}: clip the gradients or lower the learning rate"
            )
            raise RemotePayloadError(msg)

    def is_bounded(self, payload: Buffer) -> bool:
        """Whether no scale of a payload of the right length is NaN or over `MAX_SCALE`.

        The whole question in one look; `check` and `check_bound` say what is wrong.
        """
        return bool(np.abs(self.scales(payload)).max(initial=0.0) <= MAX_SCALE)  # NaN: False

    def scales(self, payload: Buffer) -> Floats:
        """All scales in a payload of the right length, f32[n]; of bf16 and fp32 the values."""
        received = np.frombuffer(self._bytes(payload), np.uint8)
        if self.codec.format.family == Family.BF16:
            halves = received.view("<u2").astype(np.uint32)
            return np.left_shift(halves, 16, out=halves).view(np.float32)
        if self.codec.format.family == Family.TOPK:  # payloads of any number of bytes
            return np.concatenate([self._segment_scales(received, at) for at in self._ranges])
        values = received.view("<f4")
        return values if self.codec.format.family == Family.FP32 else values[self._scale_places]

    def _segment_scales(self, received: NDArray[np.uint8], at: _Range) -> Floats:
        count = self.codec.format.scale_count(at.numel)
        return received[at.payload][: 4 * count].view("<f4")

    @cached_property
    def _scale_places(self) -> NDArray[np.intp]:
        """Where in a payload, counted in f32, the scales are."""
        count = self.codec.format.scale_count
        return np.concatenate(
            [at.payload.start // 4 + np.arange(count(at.numel)) for at in self._ranges]
        )

    def _split(self, flat: Floats) -> list[Floats]:
        return [flat[at.values] for at in self._ranges]

    def _bytes(self, payload: Buffer) -> memoryview:
        view = memoryview(payload)
        if view.nbytes != self.nbytes:
            msg = f"payload of shard {self.shard.index} has {view.nbytes} bytes, not {self.nbytes}"
            raise UsageError(msg)
        return view

    def _check_flat(self, values: Residual) -> None:
        if values.size != self.shard.numel:
            msg = (
                f"shard {self.shard.index} has {self.shard.numel} values, "
                f"got an array of {values.size}"
            )
            raise UsageError(msg)

    def _check_segments(self, values: Sequence[Floats]) -> None:
        if [part.size for part in values] != [at.numel for at in self._ranges]:
            msg = (
                f"shard {self.shard.index} has segments of {[at.numel for at in self._ranges]} "
                f"values, got {[part.size for part in values]}"
            )
            raise UsageError(msg)


def _ranges(codec: Codec, shard: Shard) -> Iterator[_Range]:
    at = 0
    for segment in shard.segments:
        size = codec.nbytes(segment.numel)
        values = slice(segment.offset, segment.offset + segment.numel)
        yield _Range(values, slice(at, at + size), segment.numel)
        at += size

"""A worker's push, one pass after another: what every native level's `worker_step` means.

    u  = Adam's direction on g (reference_optim), or kept before + rest (g / unit), or g itself
    asked to rescale    e <- s e, 0 where that is not finite
    with a payload      payload = C(u + e);  e <- u + e - decoded      (no e: C(u))
    without             e <- u + e                                     the push waits in e
    asked to clear      g <- 0 where it is finite

A native level does the same piece by piece: a piece stays in the cache while it goes through all of
it, so g, m, v and e are read from memory once and u never gets there. Its stages are the kernels
that `compose` calls.

A residual is f32, or bf16 in a uint16 array: half the memory and 8 instead of 12 bytes moved a
value. It is added as float32, and what stays in it is rounded to nearest even, ties to even, and
to a finite number. Of what a push leaves unsaid, bf16 keeps 8 significant bits: the sum of all
decoded pushes plus e is then the sum of all directions up to 2^-8 of each residual there was, not
up to float32 addition. Where nothing is said, a direction below 2^-9 of the residual may be lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from psq.kernels.quantizers import quantize_bf16
from psq.kernels.reference import Buffer, Floats, Residual, clear_finite, expand

if TYPE_CHECKING:
    from psq.kernels.interface import Kernels, WorkerStep

__all__ = ["Blend", "absorb", "blend", "compose", "rescale"]

CACHED_NUMEL: Final = 1 << 14
"""Values that are blended at once: they stay in the cache."""


class Blend(NamedTuple):
    """What a vector that all nodes hold is moved by: kept before + rest (g / unit). In float32."""

    kept: float
    rest: float


class _Cut(NamedTuple):
    segment: int
    values: slice
    sent: slice  # bytes
    start: int


def compose(level: Kernels, step: WorkerStep) -> None:
    """Run a step by the kernels of one level, on one segment after another.

    Raises:
        TypeError: a vector is no C-contiguous 1-D array of its type, or not writable.
        ValueError: an unknown format, a length that does not fit, or fields that do not go
            together.
    """
    _check(step)
    for cut in _cuts(step):
        u = _direction(level, step, cut)
        residual = None if step.residual is None else step.residual[cut.values]
        if residual is not None and step.residual_scale != 1.0:
            rescale(residual, step.residual_scale)
        if step.payload is not None:
            payload = memoryview(step.payload)[cut.sent]
            level.encode(*step.uplink, u, residual, payload, cut.start)
        elif residual is not None:
            absorb(u, residual)
        if step.clear:
            clear_finite(step.gradients[cut.segment])


def absorb(u: Floats, residual: Residual) -> None:
    """Add u, f32[n], to a residual, f32[n] or bf16[n]; a sum that is not finite changes nothing."""
    with np.errstate(all="ignore"):
        c = u + expand(residual)
        kept = c if residual.dtype == np.float32 else quantize_bf16(c)[0]
        residual[:] = np.where(np.isfinite(c), kept, residual)


def blend(numbers: Blend, g: Floats, before: Floats, unit: Floats | None, out: Floats) -> None:
    """Write kept before + rest (g / unit), all f32[n]; without a unit it is g. `out` may be g."""
    kept, rest = np.float32(numbers.kept), np.float32(numbers.rest)
    part = np.empty(min(out.size, CACHED_NUMEL), np.float32)
    with np.errstate(all="ignore"):  # the payload will tell
        for start in range(0, out.size, CACHED_NUMEL):
            at = slice(start, start + CACHED_NUMEL)
            said, held = out[at], part[: out[at].size]
            if unit is None:
                np.multiply(g[at], rest, out=said)
            else:
                np.divide(g[at], unit[at], out=said)
                np.multiply(said, rest, out=said)
            np.multiply(before[at], kept, out=held)
            np.add(said, held, out=said)


def rescale(residual: Residual, factor: float) -> None:
    """Multiply a residual, f32[n] or bf16[n]; a product that is not finite is given up: 0."""
    with np.errstate(all="ignore"):
        product = expand(residual) * np.float32(factor)
        kept = np.where(np.isfinite(product), product, np.float32(0))
        residual[:] = kept if residual.dtype == np.float32 else quantize_bf16(kept)[0]


def _direction(level: Kernels, step: WorkerStep, cut: _Cut) -> Floats:
    g = step.gradients[cut.segment]
    if step.blend is not None and step.before is not None and step.scratch is not None:
        u = step.scratch[: g.size]
        unit = None if step.unit is None else step.unit[cut.values]
        blend(step.blend, g, step.before[cut.values], unit, u)
        return u
    if step.adam is None or step.m is None or step.v is None or step.scratch is None:
        return g
    x = None if step.weights is None else step.weights[cut.segment]
    m, v, u = step.m[cut.values], step.v[cut.values], step.scratch[: g.size]
    third = None if step.third is None else step.third[cut.values]
    if step.correction is None or third is None:
        level.adam_update(g, m, v, u, step.adam, vmax=third, x=x)
    else:
        level.adam_update_corrected(g, m, v, third, u, step.adam, step.correction, x=x)
    return u


def _cuts(step: WorkerStep) -> Iterator[_Cut]:
    at = sent = 0
    for index, (g, start) in enumerate(zip(step.gradients, step.starts, strict=True)):
        stop, end = at + g.size, sent + step.uplink.payload_bytes(g.size)
        yield _Cut(index, slice(at, stop), slice(sent, end), start)
        at, sent = stop, end


def _check(step: WorkerStep) -> None:
    """Refuse what the kernels, which see one segment, would not notice."""
    total = sum(g.size for g in step.gradients)
    for name in ("m", "v", "third", "before", "unit", "residual"):
        vector = getattr(step, name)
        if vector is not None and vector.size != total:
            msg = f"{name} has {vector.size} elements, must have {total}: one for each value"
            raise ValueError(msg)
    _check_segments(step)
    if step.payload is not None:
        _check_payload(step, step.payload)
    elif step.residual is None:
        msg = "without a payload there must be a residual"
        raise ValueError(msg)
    if not np.isfinite(step.residual_scale) or (step.residual is None and step.residual_scale != 1):
        msg = "residual_scale must be a finite number, and 1 where there is no residual"
        raise ValueError(msg)
    _check_adam(step)


def _check_segments(step: WorkerStep) -> None:
    if len(step.starts) != len(step.gradients):
        msg = "starts must be one for each segment"
        raise ValueError(msg)
    if step.weights is None:
        return
    if [x.size for x in step.weights] != [g.size for g in step.gradients]:
        msg = "weights must be one array for each segment, one element for each value"
        raise ValueError(msg)


def _check_payload(step: WorkerStep, payload: Buffer) -> None:
    expected = sum(step.uplink.payload_bytes(g.size) for g in step.gradients)
    if len(payload) != expected:
        why = "the format's exact size for these segments"
        msg = f"payload has {len(payload)} elements, must have {expected}: {why}"
        raise ValueError(msg)


def _check_adam(step: WorkerStep) -> None:
    has, blends = step.adam is not None, step.blend is not None
    if (step.before is not None) != blends or not (blends or step.unit is None) or (has and blends):
        msg = "blend and before go together, unit only with them, and none of them with adam"
        raise ValueError(msg)
    together = [(vector is not None) == has for vector in (step.m, step.v)]
    only = [has or extra is None for extra in (step.third, step.correction)]
    if not all((*together, *only, step.correction is None or step.third is not None)):
        msg = (
            "adam, m and v go together, third and correction only with them, "
            "and correction only with third"
        )
        raise ValueError(msg)
    least = max((g.size for g in step.gradients), default=0)
    if (has or blends) and (step.scratch is None or step.scratch.size < least):
        came = 0 if step.scratch is None else step.scratch.size
        msg = f"scratch has {came} elements, must have at least {least}"
        raise ValueError(msg)

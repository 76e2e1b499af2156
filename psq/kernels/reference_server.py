"""A parameter server's step, one pass after another: what every native level's `server_step` means.

    g  = f32(1/n) times the sum of the n decoded payloads, by ascending rank
    u  = Adam's direction on g, or g itself
    weights   x <- x - u                      answer = C(x)
    delta     z = -u;  answer = C(z + e);  e <- z + e - decoded;  x <- x + decoded

The order of the sum is part of the result: float32 sums depend on it, and two runs of a job must
agree to the last bit whatever order the messages arrived in.

A native level does the same piece by piece: a piece stays in the cache while it goes through all of
it, so every vector is read from memory once. Its stages are the kernels that `compose` calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from psq.kernels.formats import Format
from psq.kernels.reference import Buffer, Floats

if TYPE_CHECKING:
    from psq.kernels.interface import Kernels, ServerStep

__all__ = ["compose"]


class _Cut(NamedTuple):
    values: slice
    received: slice  # bytes
    sent: slice  # bytes
    start: int


def compose(level: Kernels, step: ServerStep) -> None:
    """Run a step by the kernels of one level, on one segment after another.

    Raises:
        TypeError: a vector is no C-contiguous 1-D array of its type, or not writable.
        ValueError: an unknown format, a length that does not fit, or fields that do not go
            together.
    """
    _check(step)
    for cut in _cuts(step):
        change = step.scratch[: cut.values.stop - cut.values.start]
        _mean(level, step, cut, change)
        _direct(level, step, cut, change)
        answer = None if step.answer is None else memoryview(step.answer)[cut.sent]
        if step.delta and answer is not None:
            _answer_delta(level, step, cut, change, answer)
            continue
        x = step.x[cut.values]
        np.subtract(x, change, out=x)
        if answer is not None:
            level.encode(*step.downlink, x, None, answer, cut.start)


def _mean(level: Kernels, step: ServerStep, cut: _Cut, change: Floats) -> None:
    for rank, payload in enumerate(step.payloads):
        level.decode(*step.uplink, memoryview(payload)[cut.received], change, rank > 0)
    np.multiply(change, np.float32(1.0 / len(step.payloads)), out=change)


def _direct(level: Kernels, step: ServerStep, cut: _Cut, change: Floats) -> None:
    if step.adam is None or step.m is None or step.v is None:
        return
    vmax = None if step.vmax is None else step.vmax[cut.values]
    m, v, x = step.m[cut.values], step.v[cut.values], step.x[cut.values]
    level.adam_update(change, m, v, change, step.adam, vmax=vmax, x=x)


def _answer_delta(
    level: Kernels, step: ServerStep, cut: _Cut, change: Floats, answer: Buffer
) -> None:
    residual = None if step.residual is None else step.residual[cut.values]
    np.negative(change, out=change)
    level.encode(*step.downlink, change, residual, answer, cut.start)
    level.decode(*step.downlink, answer, step.x[cut.values], True)  # noqa: FBT003 - by position


def _cuts(step: ServerStep) -> Iterator[_Cut]:
    at = received = sent = 0
    for numel, start in zip(step.segments, step.starts, strict=True):
        up, down = step.uplink.payload_bytes(numel), step.downlink.payload_bytes(numel)
        values = slice(at, at + numel)
        yield _Cut(values, slice(received, received + up), slice(sent, sent + down), start)
        at, received, sent = at + numel, received + up, sent + down


def _check(step: ServerStep) -> None:
    """Refuse what the kernels, which see one segment, would not notice."""
    total = sum(step.segments)
    vectors = {"x": step.x, "m": step.m, "v": step.v, "vmax": step.vmax, "residual": step.residual}
    for name, vector in vectors.items():
        if vector is not None and vector.size != total:
            msg = f"{name} has {vector.size} elements, must have {total}: one for each value"
            raise ValueError(msg)
    if len(step.starts) != len(step.segments):
        msg = "starts must be one for each segment"
        raise ValueError(msg)
    if not step.payloads:
        msg = "there must be at least one payload"
        raise ValueError(msg)
    for payload in step.payloads:
        _need("payload", len(payload), _bytes(step.uplink, step), "uplink")
    if step.answer is not None:
        _need("answer", len(step.answer), _bytes(step.downlink, step), "downlink")
    if step.residual is not None and not (step.delta and step.answer is not None):
        msg = "only a delta has a residual"
        raise ValueError(msg)
    present = [vector is not None for vector in (step.adam, step.m, step.v)]
    if any(present) != all(present) or (step.vmax is not None and not all(present)):
        msg = "adam, m and v go together, and vmax only with them"
        raise ValueError(msg)
    if step.scratch.size < max(step.segments, default=0):
        least = max(step.segments)
        msg = f"scratch has {step.scratch.size} elements, must have at least {least}"
        raise ValueError(msg)


def _bytes(form: Format, step: ServerStep) -> int:
    return sum(form.payload_bytes(numel) for numel in step.segments)


def _need(name: str, came: int, expected: int, which: str) -> None:
    if came != expected:
        why = f"the {which}'s exact size for these segments"
        msg = f"{name} has {came} elements, must have {expected}: {why}"
        raise ValueError(msg)

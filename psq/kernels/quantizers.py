"""Quantizers in NumPy: from values and their scales to codes, and to what a decoder sees of them.

`reference.py` says what each family does. Arrays are [groups, 32, 16]; each value has its scale
beside it. A code stands in the low bits of a word. `quantize` returns codes and the values that
`dequantize` makes of them.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from psq.kernels.formats import Family, Format

__all__ = [
    "NAN",
    "SIGN_BIT",
    "TINY",
    "ZERO",
    "centroid",
    "dequantize",
    "inverse",
    "lowbias32",
    "quantize",
    "quantize_bf16",
    "quiet",
]

Floats: TypeAlias = NDArray[np.float32]
Words: TypeAlias = NDArray[np.uint32]
Coded: TypeAlias = tuple[Words, Floats]

TINY: Final = np.float32(2.0**-100)
ZERO: Final = np.float32(0)
SIGN_BIT: Final = np.uint32(0x80000000)
INFINITY: Final = np.uint32(0x7F800000)
NAN: Final = np.uint32(0x7FC00000)
SHIFTER: Final = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer
ONE: Final = np.uint32(1)

# By size, the positive half; after the tables of Lloyd and Max.
CENTROIDS: Final = {
    1: np.array([0.7979], np.float32),
    2: np.array([0.4528, 1.5104], np.float32),
    3: np.array([0.2451, 0.7560, 1.3439, 2.1519], np.float32),
    4: np.array([0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326], np.float32),
}


def quantize(form: Format, c: Floats, scale: Floats, norm: Floats, index: Words) -> Coded:
    """Codes of c and their values.

    Args:
        form: any but bf16 and fp32.
        c: finite values.
        scale: what the wire carries, for each value.
        norm: what the scale was made from, for each value; used by lloyd-max.
        index: position in the random stream; used by stochastic.
    """
    if form.family == Family.SIGN:
        sign = _bits(c) & SIGN_BIT
        return sign >> np.uint32(31), _floats(sign | _bits(scale))
    if form.family == Family.LOG:
        code = _log_code(form, c, scale)
        return code, _log_value(form, code, scale)
    if form.family == Family.UNIFORM:
        rounded = c * inverse(scale) + SHIFTER
        return _bits(rounded) & _mask(form.bits), (rounded - SHIFTER) * scale
    if form.family == Family.STOCHASTIC:
        return _stochastic(form, c, scale, index)
    code = _sized(form, centroid(np.abs(c) * inverse(norm), form.bits)[0], c)
    return code, _lloyd_max_value(form, code, scale)


def dequantize(form: Format, code: Words, scale: Floats) -> Floats:
    """Values of codes below 2^bits, with a scale of any value."""
    if form.family == Family.SIGN:
        return _floats((code << np.uint32(31)) ^ _bits(scale))
    if form.family == Family.LOG:
        return _log_value(form, code, scale)
    if form.family == Family.LLOYD_MAX:
        return _lloyd_max_value(form, code, scale)
    shift = 32 - form.bits
    return ((code << np.uint32(shift)).view(np.int32) >> shift).astype(np.float32) * scale


def inverse(scale: Floats) -> Floats:
    """1 / scale, and 0 for the scale of a zero block."""
    return np.where(scale == ZERO, ZERO, np.float32(1) / scale).astype(np.float32)


def lowbias32(x: Words) -> Words:
    """An integer hash: bijective, each input bit flips each output bit about half the time."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def centroid(size: Floats, bits: int) -> tuple[NDArray[np.intp], Floats]:
    """Level and centroid nearest to each size, in units of the root mean square."""
    points = CENTROIDS[bits]
    midpoints = (points[:-1] + points[1:]) * np.float32(0.5)
    level = np.searchsorted(midpoints, size, side="right")
    return level, points[level]


def quantize_bf16(c: Floats) -> Coded:
    """Upper halves of c: to nearest, ties to even; a finite value stays finite."""
    sign = _bits(c) & SIGN_BIT
    size = _bits(c) ^ sign
    even = (size >> np.uint32(16)) & ONE
    rounded = np.minimum(size + np.uint32(0x7FFF) + even, np.uint32(0x7F7FFFFF))
    code = np.where(size < INFINITY, sign | rounded, _bits(quiet(c))) >> np.uint32(16)
    return code, _floats(code << np.uint32(16))


def quiet(c: Floats) -> Floats:
    """C with one kind of NaN."""
    return np.where(np.isnan(c), NAN.view(np.float32), c)


def _log_code(form: Format, c: Floats, scale: Floats) -> Words:
    k = form.parameter
    size = np.abs(c)
    # Half a mantissa more, and the exponent is that of the nearest power of two, ties upwards.
    half_more = _bits(size * inverse(scale)) + np.uint32(0x00400000)
    nearest = (half_more >> np.uint32(23)).astype(np.int32) - (126 - k)
    is_zero = (scale == ZERO) | (size < scale * np.float32(2.0 ** -(k + 1)))
    return _sized(form, np.where(is_zero, 0, np.maximum(nearest, 1)), c)


def _log_value(form: Format, code: Words, scale: Floats) -> Floats:
    sign, level = _unsized(form, code)
    power = (level + np.uint32(126 - form.parameter)) << np.uint32(23)
    size = _floats(np.where(level > 0, power, np.uint32(0))) * scale
    return _floats(_bits(size) ^ sign)


def _stochastic(form: Format, c: Floats, step: Floats, index: Words) -> Coded:
    size = np.abs(c) * inverse(step)
    below = size.astype(np.int32)
    fraction = ((size - below.astype(np.float32)) * np.float32(2**24)).astype(np.int32)
    up = (lowbias32(index) >> np.uint32(8)).astype(np.int32) < fraction
    level = np.minimum(below + up, (1 << (form.bits - 1)) - 1)
    code = np.where(np.signbit(c), -level, level).astype(np.int32)
    return code.view(np.uint32) & _mask(form.bits), code.astype(np.float32) * step


def _lloyd_max_value(form: Format, code: Words, scale: Floats) -> Floats:
    sign, level = _unsized(form, code)
    return _floats(_bits(CENTROIDS[form.bits][level] * scale) ^ sign)


def _sized(form: Format, level: NDArray[np.integer], c: Floats) -> Words:
    """Code of a level and the sign of c: the sign is the highest bit."""
    return level.astype(np.uint32) | (_bits(c) & SIGN_BIT) >> np.uint32(32 - form.bits)


def _unsized(form: Format, code: Words) -> tuple[Words, Words]:
    """Sign bit, in its place in a float, and level."""
    sign = (code >> np.uint32(form.bits - 1)) << np.uint32(31)
    return sign, code & _mask(form.bits - 1)


def _mask(bits: int) -> np.uint32:
    return np.uint32((1 << bits) - 1)


def _bits(values: Floats) -> Words:
    return values.view(np.uint32)


def _floats(words: Words) -> Floats:
    return words.view(np.float32)

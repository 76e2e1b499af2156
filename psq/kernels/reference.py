"""The codecs in NumPy: the definition that every native level equals bit for bit.

All arithmetic is float32, each operation rounded by itself (no FMA), in the order written here.
`c` is what is quantized: values, plus the residual where there is one.

Norm of a block. Element 16 j + l of a chunk (a block, or 8,192 elements of a whole segment) adds to
lane l, j ascending; lanes are then halved, lane i taking lane i + 8, i + 4, i + 2, i + 1. Chunks of
a whole segment add in order in float64. A mean divides by the number of real elements, padding not
counted. A maximum is taken on the bits of |c|, so that NaN and Inf win.

    sign        scale = mean |c|, or sqrt(mean c^2)     code = sign bit; -0.0 is negative
    log         scale = max |c|                         c / scale on {0, +-2^-j, j = 0..k}
    uniform     step = max |c| / L, L = 2^(b-1) - 1     code = round(c / step), ties to even
    stochastic  step as uniform                         |c| / step rounded up with the probability
                                                        of its fraction, sign restored
    lloyd_max   r = sqrt(mean c^2), then                nearest centroid q of a unit Gaussian
                scale = <|c|, q> / <q, q>               to |c| / r, and the sign bit
    bf16        none                                    upper half, ties to even, saturating
    fp32        none                                    c itself

A step is rounded up to 16 significant bits: code * step is then exact. Codes of uniform and
stochastic are two's complement; log and lloyd_max have the sign in the highest bit and a level
below it (log: 0 is zero, k + 1 is +-scale). Divisions by a scale multiply with its rounded inverse.

Corners. A norm below 2^-100 makes a zero block: scale 0, everything stays in the residual. A block
with a value that is not finite, or whose norm overflows float32, gets the scale NaN, words of zero
and its old residual; so does every single such value of bf16 and fp32, which travels as it is, NaN
as the quiet one. Missing values of the last group are 0 and get no residual.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from psq.kernels.formats import GROUP, LANES, ROWS, WHOLE, Family, Format

__all__ = ["CENTROIDS", "all_finite", "decode", "encode", "payload_finite"]

Floats: TypeAlias = NDArray[np.float32]
Words: TypeAlias = NDArray[np.uint32]
Buffer: TypeAlias = Any  # of bytes: ndarray, memoryview, bytearray, bytes

CHUNK: Final = 8192
TINY: Final = np.float32(2.0**-100)
SIGN_BIT: Final = np.uint32(0x80000000)
INFINITY: Final = np.uint32(0x7F800000)
NAN: Final = np.uint32(0x7FC00000)
SHIFTER: Final = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer
LARGEST_STEP: Final = np.uint32(0x7F7FFF00)

CENTROIDS: Final = {
    1: np.array([0.7979], np.float32),
    2: np.array([0.4528, 1.5104], np.float32),
    3: np.array([0.2451, 0.7560, 1.3439, 2.1519], np.float32),
    4: np.array([0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326], np.float32),
}


def encode(  # noqa: PLR0913 - the native signature: a format unpacked, then the arrays
    family: int,
    bits: int,
    parameter: int,
    block: int,
    values: Floats,
    residual: Floats | None,
    payload: Buffer,
    start: int,
) -> None:
    """Quantize `values`, or values + residual, which then holds what the payload does not.

    Args:
        family: with bits, parameter and block a `Format`.
        bits: see family.
        parameter: see family.
        block: see family.
        values: f32[n].
        residual: f32[n], updated in place, or None.
        payload: u8[Format.payload_bytes(n)], written.
        start: u32, position of the first value in the random stream of `stochastic`.

    Raises:
        TypeError: an argument is no C-contiguous 1-D array of its type, or not writable.
        ValueError: unknown format, or a length that does not fit.
    """
    form = _known(Format(family, bits, parameter, block))
    values = _floats(values, "values", writable=False)
    numel = values.size
    out = _payload(payload, form.payload_bytes(numel), writable=True)
    if residual is not None:
        residual = _floats(residual, "residual", writable=True, numel=numel)
    with np.errstate(all="ignore"):
        c = values.copy() if residual is None else values + residual
        if form.scale_count(numel) or family == Family.BF16:
            d, live = _encode_words(form, c, out, start)
        else:
            d, live = c, np.isfinite(c)
            out.view("<f4")[:] = _quiet(c)
        if residual is not None:
            residual[:] = np.where(live, c - d, residual)


def decode(  # noqa: PLR0913 - the native signature
    family: int,
    bits: int,
    parameter: int,
    block: int,
    payload: Buffer,
    out: Floats,
    add: bool,  # noqa: FBT001 - the native signature
) -> None:
    """Write a payload's values to `out`, or add them to it.

    Args:
        family: with bits, parameter and block a `Format`.
        bits: see family.
        parameter: see family.
        block: see family.
        payload: u8[Format.payload_bytes(n)], of any content.
        out: f32[n].
        add: add instead of writing.

    Raises:
        TypeError: an argument is no C-contiguous 1-D array of its type, or not writable.
        ValueError: unknown format, or a length that does not fit.
    """
    form = _known(Format(family, bits, parameter, block))
    out = _floats(out, "out", writable=True)
    received = _payload(payload, form.payload_bytes(out.size), writable=False)
    with np.errstate(all="ignore"):
        if form.scale_count(out.size) or family == Family.BF16:
            d = _decode_words(form, received, out.size)
        else:
            d = received.view("<f4")
        out[:] = out + d if add else d


def all_finite(values: Floats) -> bool:
    """Whether no value is NaN or Inf. values: f32[n]."""
    return bool(np.isfinite(_floats(values, "values", writable=False)).all())


def payload_finite(  # noqa: PLR0913 - the native signature
    family: int, bits: int, parameter: int, block: int, payload: Buffer, numel: int
) -> bool:
    """Whether a payload of `numel` values has no scale (bf16, fp32: no value) that is NaN or Inf.

    Raises:
        TypeError: payload is no C-contiguous array of bytes.
        ValueError: unknown format, or a length that does not fit.
    """
    form = _known(Format(family, bits, parameter, block))
    received = _payload(payload, form.payload_bytes(numel), writable=False)
    if family == Family.BF16:
        return bool(((received.view("<u2") & 0x7F80) != 0x7F80).all())  # noqa: PLR2004 - exponent
    floats = numel if family == Family.FP32 else form.scale_count(numel)
    return bool(np.isfinite(received[: 4 * floats].view("<f4")).all())


# ---- scales --------------------------------------------------------------------------------------


def _encode_words(form: Format, c: Floats, out: NDArray[np.uint8], start: int) -> tuple[Any, Any]:
    """Write scales and words; return the decoded values and which of them are live, both [n]."""
    numel = c.size
    if form.family == Family.BF16:
        live = np.isfinite(c)
        codes, d = _bf16(_rows(c))
        _pack(codes, form.bits, out)
        return d.reshape(-1)[:numel], live
    norm = _norm(c, form)
    live_blocks = np.isfinite(norm)
    live = _each_value(live_blocks, form.block, numel)
    safe = np.where(live, c, np.float32(0))
    norm = np.where(live_blocks, norm, np.float32(0))
    scale = _scale(form, norm, safe)
    index = (np.arange(-(-numel // GROUP) * GROUP, dtype=np.uint64) + start).astype(np.uint32)
    spread = _rows(_each_value(scale, form.block, numel))
    ruler = spread if form.family != Family.LLOYD_MAX else _rows(_each_value(norm, form.block, numel))
    codes, d = _QUANTIZERS[form.family](form, _rows(safe), spread, ruler, index.reshape(-1, ROWS, LANES))
    count = form.scale_count(numel)
    out[: 4 * count].view("<f4")[:] = np.where(live_blocks, scale, NAN.view(np.float32))
    _pack(codes, form.bits, out[4 * count :])
    return d.reshape(-1)[:numel], live


def _norm(c: Floats, form: Format) -> Floats:
    """Norm of each block: f32[scale_count]."""
    if form.family in (Family.LOG, Family.UNIFORM, Family.STOCHASTIC):
        size = _pad(c.view(np.uint32) & ~SIGN_BIT, form.block or c.size)
        return size.reshape(-1, form.block or c.size).max(axis=1).view(np.float32)
    if form.family == Family.SIGN and form.parameter == 1:
        return _mean(np.abs(c), form.block)
    return np.sqrt(_mean(c * c, form.block))


def _mean(terms: Floats, block: int) -> Floats:
    counts = np.full(-(-terms.size // block) if block else 1, block or terms.size)
    counts[-1] = terms.size - block * (counts.size - 1)
    return (_sum(terms, block) / counts.astype(np.float32)).astype(np.float32)


def _sum(terms: Floats, block: int) -> Floats:
    """Sum of each block's terms in the order the module's docstring fixes: f32[blocks]."""
    chunks = _pad(terms, block or CHUNK).reshape(-1, (block or CHUNK) // LANES, LANES)
    lanes = np.zeros((chunks.shape[0], LANES), np.float32)
    for row in range(chunks.shape[1]):
        lanes += chunks[:, row]
    for half in (8, 4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half:]
    sums = lanes[:, 0]
    return sums if block else np.cumsum(sums, dtype=np.float64)[-1:].astype(np.float32)


def _scale(form: Format, norm: Floats, c: Floats) -> Floats:
    """From norms to what the wire carries: f32[scale_count]."""
    zero = norm < TINY
    if form.family in (Family.UNIFORM, Family.STOCHASTIC):
        step = (norm / np.float32((1 << (form.bits - 1)) - 1)).view(np.uint32)
        step = np.minimum((step + np.uint32(0xFF)) & np.uint32(0xFFFFFF00), LARGEST_STEP)
        return np.where(zero, np.float32(0), step.view(np.float32))
    if form.family == Family.LLOYD_MAX:
        inverse = _each_value(_inverse(np.where(zero, np.float32(0), norm)), form.block, c.size)
        level = _nearest_centroid(np.abs(c) * inverse, form.bits)
        q = CENTROIDS[form.bits][level]
        best = _sum(np.abs(c) * q, form.block) / _sum(q * q, form.block)
        return np.where(zero, np.float32(0), best).astype(np.float32)
    return np.where(zero, np.float32(0), norm)


def _inverse(scale: Floats) -> Floats:
    return np.where(scale > 0, np.float32(1) / scale, np.float32(0)).astype(np.float32)


# ---- quantizers: (format, c, scale, ruler, index), all [groups, 32, 16], to codes and values -----


def _sign(_form: Format, c: Floats, scale: Floats, *_: Any) -> tuple[Words, Floats]:
    sign = c.view(np.uint32) & SIGN_BIT
    return sign >> 31, (sign | scale.view(np.uint32)).view(np.float32)


def _log(form: Format, c: Floats, scale: Floats, *_: Any) -> tuple[Words, Floats]:
    k = form.parameter
    sign = c.view(np.uint32) & SIGN_BIT
    size = np.abs(c)
    ratio = (size * _inverse(scale)).view(np.uint32)
    # Half a mantissa more, and the exponent is that of the nearest power of two, ties upwards.
    nearest = ((ratio + np.uint32(0x00400000)) >> 23).astype(np.int32) - (126 - k)
    is_zero = (scale == 0) | (size < scale * np.float32(2.0 ** -(k + 1)))
    level = np.where(is_zero, 0, np.maximum(nearest, 1)).astype(np.uint32)
    code = level | sign >> (32 - form.bits)
    return code, _log_value(form, code, scale)


def _log_value(form: Format, code: Words, scale: Floats) -> Floats:
    sign = (code >> (form.bits - 1)) << 31
    level = code & np.uint32((1 << (form.bits - 1)) - 1)
    power = np.where(level > 0, (level + np.uint32(126 - form.parameter)) << 23, 0)
    size = power.astype(np.uint32).view(np.float32) * scale
    return (size.view(np.uint32) ^ sign).view(np.float32)


def _uniform(form: Format, c: Floats, step: Floats, *_: Any) -> tuple[Words, Floats]:
    rounded = c * _inverse(step) + SHIFTER
    code = rounded.view(np.uint32) & np.uint32((1 << form.bits) - 1)
    return code, (rounded - SHIFTER) * step


def _stochastic(
    form: Format, c: Floats, step: Floats, _ruler: Floats, index: Words
) -> tuple[Words, Floats]:
    size = np.abs(c) * _inverse(step)
    below = size.astype(np.int32)
    fraction = ((size - below.astype(np.float32)) * np.float32(2**24)).astype(np.int32)
    up = (lowbias32(index) >> 8).astype(np.int32) < fraction
    code = np.minimum(below + up, (1 << (form.bits - 1)) - 1)
    code = np.where(np.signbit(c), -code, code)
    return code.astype(np.uint32) & np.uint32((1 << form.bits) - 1), code.astype(np.float32) * step


def lowbias32(x: Words) -> Words:
    """An integer hash: bijective, each input bit flips each output bit about half the time."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _uniform_value(form: Format, code: Words, step: Floats) -> Floats:
    shift = 32 - form.bits
    return ((code << shift).view(np.int32) >> shift).astype(np.float32) * step


def _lloyd_max(
    form: Format, c: Floats, scale: Floats, ruler: Floats, _index: Words
) -> tuple[Words, Floats]:
    inverse = _inverse(np.where(ruler < TINY, np.float32(0), ruler))
    level = _nearest_centroid(np.abs(c) * inverse, form.bits).astype(np.uint32)
    code = level | (c.view(np.uint32) & SIGN_BIT) >> (32 - form.bits)
    return code, _lloyd_max_value(form, code, scale)


def _nearest_centroid(size: Floats, bits: int) -> NDArray[np.intp]:
    points = CENTROIDS[bits]
    midpoints = (points[:-1] + points[1:]) * np.float32(0.5)
    return np.searchsorted(midpoints, size, side="right")


def _lloyd_max_value(form: Format, code: Words, scale: Floats) -> Floats:
    sign = (code >> (form.bits - 1)) << 31
    size = CENTROIDS[form.bits][code & np.uint32((1 << (form.bits - 1)) - 1)] * scale
    return (size.view(np.uint32) ^ sign).view(np.float32)


def _sign_value(_form: Format, code: Words, scale: Floats) -> Floats:
    return ((code << 31) ^ scale.view(np.uint32)).view(np.float32)


def _bf16(c: Floats) -> tuple[Words, Floats]:
    sign = c.view(np.uint32) & SIGN_BIT
    size = c.view(np.uint32) ^ sign
    even = (size >> 16) & np.uint32(1)
    rounded = np.minimum(size + np.uint32(0x7FFF) + even, np.uint32(0x7F7FFFFF))
    bits = np.where(size < INFINITY, sign | rounded, _quiet(c).view(np.uint32)) >> 16
    return bits, (bits << 16).view(np.float32)


def _quiet(c: Floats) -> Floats:
    return np.where(np.isnan(c), NAN.view(np.float32), c)


_QUANTIZERS: Final[dict[int, Callable[..., tuple[Words, Floats]]]] = {
    Family.SIGN: _sign,
    Family.LOG: _log,
    Family.UNIFORM: _uniform,
    Family.STOCHASTIC: _stochastic,
    Family.LLOYD_MAX: _lloyd_max,
}
_VALUES: Final[dict[int, Callable[[Format, Words, Floats], Floats]]] = {
    Family.SIGN: _sign_value,
    Family.LOG: _log_value,
    Family.UNIFORM: _uniform_value,
    Family.STOCHASTIC: _uniform_value,
    Family.LLOYD_MAX: _lloyd_max_value,
}


# ---- words ---------------------------------------------------------------------------------------


def _pack(codes: Words, bits: int, out: NDArray[np.uint8]) -> None:
    """Codes [groups, 32, 16] to words [groups, bits, 16]."""
    words = np.zeros((codes.shape[0], bits, LANES), np.uint32)
    for row in range(ROWS):
        word, shift = divmod(row * bits, 32)
        words[:, word] |= codes[:, row] << shift
        if shift + bits > 32:  # noqa: PLR2004 - bits of a word
            words[:, word + 1] |= codes[:, row] >> (32 - shift)
    out.view("<u4")[:] = words.reshape(-1)


def _unpack(payload: NDArray[np.uint8], bits: int) -> Words:
    words = payload.view("<u4").reshape(-1, bits, LANES)
    codes = np.empty((words.shape[0], ROWS, LANES), np.uint32)
    for row in range(ROWS):
        word, shift = divmod(row * bits, 32)
        codes[:, row] = words[:, word] >> shift
        if shift + bits > 32:  # noqa: PLR2004 - bits of a word
            codes[:, row] |= words[:, word + 1] << (32 - shift)
    return codes & np.uint32((1 << bits) - 1)


def _decode_words(form: Format, payload: NDArray[np.uint8], numel: int) -> Floats:
    count = form.scale_count(numel)
    codes = _unpack(payload[4 * count :], form.bits)
    if form.family == Family.BF16:
        return (codes << 16).view(np.float32).reshape(-1)[:numel]
    scale = payload[: 4 * count].view("<f4").astype(np.float32)
    spread = _rows(_each_value(scale, form.block, numel))
    return _VALUES[form.family](form, codes, spread).reshape(-1)[:numel]


# ---- shapes and arguments ------------------------------------------------------------------------


def _pad(flat: NDArray[Any], multiple: int) -> NDArray[Any]:
    return np.pad(flat, (0, -flat.size % multiple))


def _rows(flat: Floats) -> Floats:
    return _pad(flat, GROUP).reshape(-1, ROWS, LANES)


def _each_value(per_block: NDArray[Any], block: int, numel: int) -> NDArray[Any]:
    return np.repeat(per_block, block if block != WHOLE else numel)[:numel]


def _known(form: Format) -> Format:
    if not form.is_known:
        msg = (
            f"no format of family {form.family} with bits {form.bits}, "
            f"parameter {form.parameter}, block {form.block}"
        )
        raise ValueError(msg)
    return form


def _floats(array: object, name: str, *, writable: bool, numel: int | None = None) -> Floats:
    kind = "writable, C-contiguous" if writable else "C-contiguous"
    fits = (
        isinstance(array, np.ndarray)
        and array.dtype == np.float32
        and array.ndim == 1
        and array.flags.c_contiguous
        and (array.flags.writeable or not writable)
    )
    if not fits:
        msg = f"{name} must be a {kind} 1-D float32 array, got {_describe(array)}"
        raise TypeError(msg)
    floats = cast("Floats", array)
    if numel is not None and floats.size != numel:
        msg = f"{name} has {floats.size} elements, must have {numel}: one for each of values"
        raise ValueError(msg)
    return floats


def _payload(buffer: Buffer, nbytes: int, *, writable: bool) -> NDArray[np.uint8]:
    try:
        view = memoryview(buffer)
    except TypeError:
        view = None
    if (
        view is None
        or view.ndim != 1
        or view.format != "B"
        or not view.c_contiguous
        or (writable and view.readonly)
    ):
        kind = "writable, C-contiguous" if writable else "C-contiguous"
        msg = f"payload must be a {kind} 1-D uint8 array, got {_describe(buffer)}"
        raise TypeError(msg)
    if view.nbytes != nbytes:
        msg = (
            f"payload has {view.nbytes} elements, must have {nbytes}: "
            "the format's exact size for this many values"
        )
        raise ValueError(msg)
    return np.frombuffer(view, np.uint8)


def _describe(array: object) -> str:
    if isinstance(array, np.ndarray):
        flags = "" if array.flags.c_contiguous else ", not contiguous"
        flags += "" if array.flags.writeable else ", read-only"
        return f"a {array.ndim}-D {array.dtype} array{flags}"
    return type(array).__name__

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
    topk        mean of the K largest |c|               their places and signs: `reference_topk`

A step is rounded up to 16 significant bits (down where the largest code's value would be infinite):
code * step is then exact. Codes of uniform and
stochastic are two's complement; log and lloyd_max have the sign in the highest bit and a level
below it (log: 0 is zero, k + 1 is +-scale). Divisions by a scale multiply with its rounded inverse.

Corners. A norm below 2^-100 makes a zero block: scale 0, everything stays in the residual. A block
with a value that is not finite, or whose norm overflows float32, gets the scale NaN, words of zero
and its old residual; so does every single such value of bf16 and fp32, which travels as it is, NaN
as the quiet one. Missing values of the last group are 0 and get no residual.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from psq.kernels import reference_topk as topk
from psq.kernels.formats import GROUP, LANES, ROWS, WHOLE, Family, Format
from psq.kernels.quantizers import (
    NAN,
    SIGN_BIT,
    TINY,
    ZERO,
    Floats,
    Words,
    centroid,
    dequantize,
    inverse,
    quantize,
    quantize_bf16,
    quiet,
)

__all__ = [
    "Buffer",
    "Floats",
    "Residual",
    "all_finite",
    "block_norms",
    "clear_finite",
    "decode",
    "encode",
    "expand",
    "payload_finite",
    "topk_ascends",
]

Buffer: TypeAlias = Any  # of bytes: ndarray, memoryview, bytearray, bytes
Residual: TypeAlias = Floats | NDArray[np.uint16]  # uint16: bf16, the upper halves of float32s

CHUNK: Final = 8192
WORD_BITS: Final = 32
LARGEST: Final = np.finfo(np.float32).max


def encode(  # noqa: PLR0913, PLR0917 - the native signature: a format unpacked, then the arrays
    family: int,
    bits: int,
    parameter: int,
    block: int,
    values: Floats,
    residual: Residual | None,
    payload: Buffer,
    start: int,
    clear: bool = False,  # noqa: FBT001, FBT002 - the native signature
) -> None:
    """Quantize `values`, or values + residual, which then holds what the payload does not.

    Args:
        family: with bits, parameter and block a `Format`.
        bits: see family.
        parameter: see family.
        block: see family.
        values: f32[n].
        residual: f32[n] or bf16[n] (uint16), updated in place, or None; what stays in a bf16 one
            is rounded to nearest, ties to even.
        payload: u8[Format.payload_bytes(n)], written.
        start: u32, position of the first value in the random stream of `stochastic`.
        clear: what is finite of `values`, which must then be writable, becomes 0 afterwards.

    Raises:
        TypeError: an argument is no C-contiguous 1-D array of its type, or not writable.
        ValueError: unknown format, or a length that does not fit.
    """
    form = _known(Format(family, bits, parameter, block))
    values = _floats(values, "values", writable=clear)
    numel = values.size
    out = _payload(payload, form.payload_bytes(numel), writable=True)
    if residual is not None:
        residual = _residual(residual, numel)
    with np.errstate(all="ignore"):
        c = values.copy() if residual is None else values + expand(residual)
        if family == Family.TOPK:
            d, live = topk.encode(form, c, out)
        elif form.scale_count(numel) or family == Family.BF16:
            d, live = _encode_words(form, c, out, start)
        else:
            d, live = c, np.isfinite(c)
            out.view("<f4")[:] = quiet(c)
        if residual is not None:
            rest = c - d
            kept = rest if residual.dtype == np.float32 else quantize_bf16(rest)[0]
            residual[:] = np.where(live, kept, residual)
    if clear:
        clear_finite(values)


def clear_finite(values: Floats) -> None:
    """Set what is finite to 0: what was said. NaN and Inf stay, so that whoever asks finds them."""
    values[np.isfinite(values)] = ZERO


def decode(  # noqa: PLR0913, PLR0917 - the native signature
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
        if family == Family.TOPK:
            d, places = topk.decode(form, received, out.size)
            base = out[places] + d if add else d
            out[:] = out if add else ZERO
            out[places] = base
            return
        if form.scale_count(out.size) or family == Family.BF16:
            d = _decode_words(form, received, out.size)
        else:
            d = received.view("<f4")
        out[:] = out + d if add else d


def expand(residual: Residual) -> Floats:
    """Return a residual's values, f32[n]."""
    if residual.dtype == np.float32:
        return cast("Floats", residual)
    return (residual.astype(np.uint32) << np.uint32(16)).view(np.float32)


def block_norms(
    values: Floats,
    residual: Residual | None,
    block: int,
    largest: bool,  # noqa: FBT001 - the native signature
    out: Floats,
) -> None:
    """How large each block of values, or of values + residual, is: what scales are made from.

    Args:
        values: f32[n].
        residual: f32[n] or bf16[n] (uint16), only read; or None.
        block: as of a format.
        largest: the largest size of each, not its root mean square.
        out: f32[blocks], written; NaN for a block that is not finite.

    Raises:
        TypeError: an argument is no C-contiguous 1-D array of its type, or out is not writable.
        ValueError: no such block, or a length that does not fit.
    """
    form = Format(Family.LOG, 2, 0, block) if largest else Format(Family.SIGN, 1, 2, block)
    if not form.is_known:
        msg = f"there are no blocks of {block} values"
        raise ValueError(msg)
    values = _floats(values, "values", writable=False)
    out = _floats(out, "out", writable=True)
    if residual is not None:
        residual = _residual(residual, values.size, writable=False)
    if out.size != form.scale_count(values.size):
        expected = form.scale_count(values.size)
        msg = f"out has {out.size} elements, must have {expected}: one for each block of values"
        raise ValueError(msg)
    if values.size:
        with np.errstate(all="ignore"):
            norm = _norm(values if residual is None else values + expand(residual), form)
        out[:] = np.where(np.isfinite(norm), norm, NAN.view(np.float32))


def all_finite(values: Floats) -> bool:
    """Whether no value is NaN or Inf. values: f32[n]."""
    return bool(np.isfinite(_floats(values, "values", writable=False)).all())


def payload_finite(  # noqa: PLR0913, PLR0917 - the native signature
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


def topk_ascends(  # noqa: PLR0913, PLR0917 - the native signature
    family: int, bits: int, parameter: int, block: int, payload: Buffer, numel: int
) -> bool:
    """Whether the entries of a topk payload name values of their blocks, each above the last.

    Raises:
        TypeError: payload is no C-contiguous array of bytes.
        ValueError: another format, or a length that does not fit.
    """
    form = _known(Format(family, bits, parameter, block))
    if family != Family.TOPK:
        msg = "entries are those of topk, and of fewer than 2^40 values"
        raise ValueError(msg)
    received = _payload(payload, form.payload_bytes(numel), writable=False)
    return topk.ascends(form, received, numel)


# ---- scales --------------------------------------------------------------------------------------


def _encode_words(
    form: Format, c: Floats, out: NDArray[np.uint8], start: int
) -> tuple[Floats, NDArray[np.bool_]]:
    """Write scales and words; return the decoded values, and which are live, both [n]."""
    numel = c.size
    if form.family == Family.BF16:
        codes, d = quantize_bf16(_rows(c))
        _pack(codes, form.bits, out)
        return d.reshape(-1)[:numel], np.isfinite(c)
    norm = _norm(c, form)
    finite = np.isfinite(norm)
    live = _each_value(finite, form.block, numel)
    norm = np.where(finite, norm, ZERO)
    norm = np.where(norm < TINY, ZERO, norm)
    c = np.where(live, c, ZERO)
    scale = _scale(form, norm, c)
    index = np.arange(-(-numel // GROUP) * GROUP, dtype=np.uint64) + np.uint64(start)
    codes, d = quantize(
        form,
        _rows(c),
        _rows(_each_value(scale, form.block, numel)),
        _rows(_each_value(norm, form.block, numel)),
        index.astype(np.uint32).reshape(-1, ROWS, LANES),
    )
    count = form.scale_count(numel)
    out[: 4 * count].view("<f4")[:] = np.where(finite, scale, NAN.view(np.float32))
    _pack(codes, form.bits, out[4 * count :])
    return d.reshape(-1)[:numel], live


def _norm(c: Floats, form: Format) -> Floats:
    """Norm of each block: f32[scale_count]."""
    if form.family in (Family.LOG, Family.UNIFORM, Family.STOCHASTIC):
        width = form.block or c.size
        sizes = _pad(c.view(np.uint32) & ~SIGN_BIT, width).reshape(-1, width)
        largest: Words = sizes.max(axis=1)
        return largest.view(np.float32)
    if form.family == Family.SIGN and form.parameter == 1:
        return _mean(np.abs(c), form.block)
    return np.sqrt(_mean(c * c, form.block))


def _mean(terms: Floats, block: int) -> Floats:
    sums = _sum(terms, block)
    counts = np.full(sums.size, block or terms.size, np.float32)
    counts[-1] = terms.size - block * (sums.size - 1)
    return sums / counts


def _sum(terms: Floats, block: int) -> Floats:
    """Sum of each block's terms in the order the module's docstring fixes: f32[scale_count]."""
    width = block or CHUNK
    chunks = _pad(terms, width).reshape(-1, width // LANES, LANES)
    lanes = np.zeros((chunks.shape[0], LANES), np.float32)
    for row in range(chunks.shape[1]):
        lanes += chunks[:, row]
    for half in (8, 4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half:]
    sums: Floats = lanes[:, 0]
    return sums if block else np.cumsum(sums, dtype=np.float64)[-1:].astype(np.float32)


def _scale(form: Format, norm: Floats, c: Floats) -> Floats:
    """From norms, 0 or at least TINY, to what the wire carries: f32[scale_count]."""
    if form.family in (Family.UNIFORM, Family.STOCHASTIC):
        levels = np.float32((1 << (form.bits - 1)) - 1)
        exact: Words = (norm / levels).view(np.uint32)
        most = (LARGEST / levels).view(np.uint32)
        step: Words = np.minimum(exact + np.uint32(0xFF), most) & np.uint32(0xFFFFFF00)
        return step.view(np.float32)
    if form.family == Family.LLOYD_MAX:
        size = np.abs(c)
        q = centroid(size * _each_value(inverse(norm), form.block, c.size), form.bits)[1]
        best = _sum(size * q, form.block) / _sum(q * q, form.block)
        return np.where(norm == ZERO, ZERO, best)
    return norm


# ---- words ---------------------------------------------------------------------------------------


def _pack(codes: Words, bits: int, out: NDArray[np.uint8]) -> None:
    """Codes [groups, 32, 16] to words [groups, bits, 16]."""
    words = np.zeros((codes.shape[0], bits, LANES), np.uint32)
    for row in range(ROWS):
        word, shift = divmod(row * bits, WORD_BITS)
        words[:, word] |= codes[:, row] << np.uint32(shift)
        if shift + bits > WORD_BITS:
            words[:, word + 1] |= codes[:, row] >> np.uint32(WORD_BITS - shift)
    out.view("<u4")[:] = words.reshape(-1)


def _unpack(payload: NDArray[np.uint8], bits: int) -> Words:
    words = payload.view("<u4").astype(np.uint32).reshape(-1, bits, LANES)
    codes = np.empty((words.shape[0], ROWS, LANES), np.uint32)
    for row in range(ROWS):
        word, shift = divmod(row * bits, WORD_BITS)
        codes[:, row] = words[:, word] >> np.uint32(shift)
        if shift + bits > WORD_BITS:
            codes[:, row] |= words[:, word + 1] << np.uint32(WORD_BITS - shift)
    return codes & np.uint32((1 << bits) - 1)


def _decode_words(form: Format, payload: NDArray[np.uint8], numel: int) -> Floats:
    count = form.scale_count(numel)
    codes = _unpack(payload[4 * count :], form.bits)
    if form.family == Family.BF16:
        return (codes << np.uint32(16)).view(np.float32).reshape(-1)[:numel]
    scale = payload[: 4 * count].view("<f4").astype(np.float32)
    each = _rows(_each_value(scale, form.block, numel))
    return dequantize(form, codes, each).reshape(-1)[:numel]


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


def _residual(array: object, numel: int, *, writable: bool = True) -> Residual:
    if not isinstance(array, np.ndarray) or array.dtype != np.uint16:
        return _floats(array, "residual", writable=writable, numel=numel)
    if array.ndim != 1 or not array.flags.c_contiguous or (writable and not array.flags.writeable):
        kind = "writable, C-contiguous" if writable else "C-contiguous"
        msg = f"residual must be a {kind} 1-D uint16 array, got {_describe(array)}"
        raise TypeError(msg)
    if array.size != numel:
        msg = f"residual has {array.size} elements, must have {numel}: one for each of values"
        raise ValueError(msg)
    return array


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

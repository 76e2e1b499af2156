"""The topk codec in NumPy: the definition that every native level equals bit for bit.

A block of B values says its K largest magnitudes, K = 2^parameter, as their mean and their places:

    scale   f32, the mean of the K magnitudes: their sum, one after another by place, divided by K
    entry   log2 B bits of place in the block, then one of sign: +-scale there, nothing elsewhere

Entries ascend by place. Where magnitudes are equal the lower places are taken. A block's entries
are one stream of bits, each entry least bit first, padded with zeros to whole bytes; the segment's
payload is `[f32 scales | entries of all blocks]`, padded with zeros to whole words. A last block of
n < K values has n entries, then zeros, so that a payload's size depends on nothing but numel.

A block that is not finite, or whose sum is not, has the scale NaN, entries of zero and its old
residual. A mean below 2^-100 is sent as 0: everything stays in the residual. Adding a payload
leaves alone what it does not name, the sign of a zero included.

Decoding takes any bytes: an entry counts only if it names a value of the block and one above all
that counted before it. `topk_ascends` tells whether all do; a server refuses payloads of which not.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from psq.kernels.formats import Format
from psq.kernels.quantizers import NAN, TINY, ZERO, Floats

__all__ = ["ascends", "decode", "encode"]

Bytes: TypeAlias = NDArray[np.uint8]
Places: TypeAlias = NDArray[np.intp]

SIZE_BITS: Final = np.uint32(0x7FFFFFFF)


def encode(form: Format, c: Floats, out: Bytes) -> tuple[Floats, NDArray[np.bool_]]:
    """Write a payload of c; return the decoded values, and which are live, both [n]."""
    d, live = np.zeros_like(c), np.ones(c.size, np.bool_)
    scales, entries = _regions(form, c.size, out)
    out[:] = 0
    for index, at in enumerate(range(0, c.size, form.block)):
        block = c[at : at + form.block]
        places = _largest(block, 1 << form.parameter)
        scale = _mean(np.abs(block[places]))
        if not (np.isfinite(block).all() and np.isfinite(scale)):
            scales[index] = NAN.view(np.float32)
            live[at : at + form.block] = False
            continue
        scales[index] = scale = ZERO if scale < TINY else scale
        d[at + places] = np.copysign(scale, block[places])
        _pack(form, places, np.signbit(block[places]), entries[index])
    return d, live


def decode(form: Format, received: Bytes, numel: int) -> tuple[Floats, Places]:
    """Values of a payload and where they belong, in the segment, ascending."""
    scales, entries = _regions(form, numel, received)
    values: list[np.float32] = []
    places: list[int] = []
    for index, at in enumerate(range(0, numel, form.block)):
        size, first = min(form.block, numel - at), 0
        for place, sign in _unpack(form, entries[index], size):
            if first <= place < size:
                first = place + 1
                values.append(-scales[index] if sign else scales[index])
                places.append(at + place)
    return np.array(values, np.float32), np.array(places, np.intp)


def ascends(form: Format, received: Bytes, numel: int) -> bool:
    """Whether every entry of a payload names a value of its block, each above the one before."""
    named = (min(1 << form.parameter, numel - at) for at in range(0, numel, form.block))
    return decode(form, received, numel)[1].size == sum(named)


def _regions(form: Format, numel: int, payload: Bytes) -> tuple[Floats, Bytes]:
    """Scales, and the entries of each block: views."""
    count, nbytes = form.scale_count(numel), form.entry_bytes
    entries = payload[4 * count : (4 + nbytes) * count].reshape(count, nbytes)
    return payload[: 4 * count].view("<f4"), entries


def _largest(block: Floats, count: int) -> Places:
    """Places of the largest magnitudes, ascending."""
    size = block.view(np.uint32) & SIZE_BITS
    return np.sort(np.argsort(~size, kind="stable")[:count])


def _mean(sizes: Floats) -> np.float32:
    """Their sum, one after another, by their number."""
    return np.float32(np.cumsum(sizes, dtype=np.float32)[-1] / np.float32(sizes.size))


def _pack(form: Format, places: Places, signs: NDArray[np.bool_], out: Bytes) -> None:
    entry = places | signs.astype(np.intp) << (form.bits - 1)
    bits = (entry[:, None] >> np.arange(form.bits)) & 1
    packed = np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")
    out[: packed.size] = packed


def _unpack(form: Format, entries: Bytes, size: int) -> list[tuple[int, bool]]:
    """Place and sign of as many entries as a block of this size has."""
    count = min(1 << form.parameter, size)
    bits = np.unpackbits(entries, bitorder="little")[: count * form.bits]
    entry = (bits.reshape(count, form.bits).astype(np.int64) << np.arange(form.bits)).sum(axis=1)
    mask = form.block - 1
    return [(int(each) & mask, int(each) > mask) for each in entry]

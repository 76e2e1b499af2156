"""msgpack with every limit checked before anything is built.

Theory. msgpack is small on the wire and large in memory: five bytes may announce an array of 65,536
items, and an unpacker that believes them allocates half a megabyte, once per level of nesting. So
the bytes are walked first without building a thing: every tag, length and count is compared with
the limits and with the bytes that are really there. What passes holds at most `items` values inside
`total_bytes` bytes, whatever it claims, and only then is it unpacked.

Never: extension types (timestamps too), bytes after the value, keys that are no strings, a key
given twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgpack

from psq_proto.errors import RemoteWireError

__all__ = ["PackLimits", "pack", "unpack"]


@dataclass(frozen=True, slots=True)
class PackLimits:
    """How much one msgpack value may hold; `items` counts every value and key at every depth."""

    total_bytes: int
    map_items: int
    array_items: int
    str_bytes: int
    bin_bytes: int
    depth: int
    items: int


def pack(value: object) -> bytes:
    """The msgpack bytes of a value made of None, bool, numbers, str, bytes, lists and maps."""
    packed: bytes = msgpack.packb(value)
    return packed


def unpack(
    body: bytes | bytearray | memoryview, limits: PackLimits, *, use_list: bool = False
) -> Any:
    """The one value in `body`; arrays come as tuples unless `use_list`.

    Raises:
        RemoteWireError: the bytes are not exactly one msgpack value within the limits.

    Cost: one walk in Python, about a microsecond per item, before the unpacking itself.
    """
    view = memoryview(body).cast("B")
    if view.nbytes > limits.total_bytes:
        msg = f"msgpack body of {view.nbytes} bytes, the limit is {limits.total_bytes}"
        raise RemoteWireError(msg)
    _walk(view, limits)
    try:
        return msgpack.unpackb(view, use_list=use_list, object_pairs_hook=_map_of)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        msg = f"msgpack body cannot be read: {error}"
        raise RemoteWireError(msg) from error


# What a tag byte starts: a kind, the bytes of its length field, and the length or count in the tag.
_SCALAR, _STR, _BIN, _ARRAY, _MAP, _FORBIDDEN = range(6)
_KINDS: Final = ("scalar", "string", "bytes", "array", "map")
_Tag = tuple[int, int, int]


def _tag_table() -> tuple[_Tag, ...]:
    table: list[_Tag] = [(_FORBIDDEN, 0, 0)] * 256
    for tag in (*range(0x80), *range(0xE0, 0x100), 0xC0, 0xC2, 0xC3):
        table[tag] = (_SCALAR, 0, 0)
    for n in range(16):
        table[0x80 + n] = (_MAP, 0, n)
        table[0x90 + n] = (_ARRAY, 0, n)
    for n in range(32):
        table[0xA0 + n] = (_STR, 0, n)
    for tag, size in ((0xCA, 4), (0xCB, 8), (0xCC, 1), (0xCD, 2), (0xCE, 4), (0xCF, 8)):
        table[tag] = (_SCALAR, 0, size)
    for tag, size in ((0xD0, 1), (0xD1, 2), (0xD2, 4), (0xD3, 8)):
        table[tag] = (_SCALAR, 0, size)
    for step, field in enumerate((1, 2, 4)):
        table[0xC4 + step] = (_BIN, field, 0)
        table[0xD9 + step] = (_STR, field, 0)
    for step, field in enumerate((2, 4)):
        table[0xDC + step] = (_ARRAY, field, 0)
        table[0xDE + step] = (_MAP, field, 0)
    return tuple(table)


_TAGS: Final = _tag_table()


def _walk(view: memoryview, limits: PackLimits) -> None:
    """Raise unless `view` is one complete value within `limits`; keeps a counter per open level."""
    # A scalar's length comes from its tag, 8 at most; the other kinds have limits of their own.
    bounds = (8, limits.str_bytes, limits.bin_bytes, limits.array_items, limits.map_items)
    open_levels = [1]
    offset = items = 0
    while open_levels:
        if not open_levels[-1]:
            open_levels.pop()
            continue
        open_levels[-1] -= 1
        items += 1
        if items > limits.items:
            msg = f"msgpack body holds over {limits.items} items"
            raise RemoteWireError(msg)
        offset, children = _step(view, offset, bounds)
        if children:
            if len(open_levels) > limits.depth:
                msg = f"msgpack body is nested deeper than {limits.depth}"
                raise RemoteWireError(msg)
            open_levels.append(children)
    if offset != view.nbytes:
        msg = f"msgpack value ends at byte {offset}, the body has {view.nbytes}"
        raise RemoteWireError(msg)


def _step(view: memoryview, offset: int, bounds: tuple[int, ...]) -> tuple[int, int]:
    """Check the value at `offset`; give the offset after it and how many values follow inside it.

    Of an array or a map only the head is checked and passed.
    """
    if offset >= view.nbytes:
        msg = f"msgpack body of {view.nbytes} bytes ends where a value should start"
        raise RemoteWireError(msg)
    kind, field, length = _TAGS[view[offset]]
    if kind == _FORBIDDEN:
        msg = f"msgpack tag 0x{view[offset]:02x} at byte {offset} is not allowed here"
        raise RemoteWireError(msg)
    start = offset + 1 + field
    if field:
        length = int.from_bytes(view[offset + 1 : start], "big")
    if length > bounds[kind]:
        msg = f"msgpack {_KINDS[kind]} of length {length}, the limit is {bounds[kind]}"
        raise RemoteWireError(msg)
    children = length * (kind - _BIN) if kind > _BIN else 0  # an array holds 1 per count, a map 2
    end = start if kind > _BIN else start + length
    if end + children > view.nbytes:
        msg = f"msgpack body of {view.nbytes} bytes ends inside the value at byte {offset}"
        raise RemoteWireError(msg)
    return end, children


def _map_of(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            msg = f"map key {key!r:.40} is not a string"
            raise ValueError(msg)  # noqa: TRY004 - one exception type crosses the C unpacker
        if key in made:
            msg = f"map key {key!r:.40} is given twice"
            raise ValueError(msg)
        made[key] = value
    return made

"""The bytes of a journal: pure packing and checking, no files.

A segment is a header in a page of its own, then records and marks. All numbers are little-endian.

    segment header   magic "PSQJRNL1", run_id, salt, after_version, first_number, previous, crc32c;
                     zeros up to PAGE_BYTES
    record           header (64 bytes), front (msgpack of [meta, [bytes of each buffer]]), buffers
    record header    magic "PSQR", kind, 0, front_bytes, data_bytes, number, synced, body_crc,
                     previous, 0, crc32c
    mark             a record header of kind MARK and nothing else

`number` counts records from 1. `synced` is the highest number that was known to be on disk when the
record was written: a bad record that a later header calls synced was promised and has been lost;
any other one is a torn tail. `previous` is the chain before the record: the xxh3-128 of all bytes
of the record before it, whose header holds the chain before that one, and so on to the run's id.
A mark is no part of the chain; its number and `previous` are those after the last record.

Header checksums also cover the segment's random salt, so neither a block of an older file nor
something that a peer sent is ever taken for a header. After each sync the next header begins on a
fresh page, with zeros before it: what was promised is never in a page that is written again.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgpack
from crc32c import crc32c
from xxhash import xxh3_128

from psq.durable.digests import DIGEST_BYTES
from psq.durable.files import Buffer, bytes_of
from psq.errors import UsageError

__all__ = [
    "HEADER_BYTES",
    "MAGIC",
    "MARK",
    "MAX_FRONT_BYTES",
    "MAX_KIND",
    "PAGE_BYTES",
    "SALT_BYTES",
    "SEGMENT_HEADER_BYTES",
    "Body",
    "Header",
    "SegmentHeader",
    "chain_of",
    "pack_body",
    "pack_header",
    "pack_segment_header",
    "parse_front",
    "parse_header",
    "parse_segment_header",
]

PAGE_BYTES: Final = 4096
MAGIC: Final = b"PSQR"
SALT_BYTES: Final = 8
MARK: Final = 0
"""The kind of a mark; records have kinds from 1 on."""
MAX_KIND: Final = 0xFFFF
MAX_FRONT_BYTES: Final = 64 << 20
MAX_DATA_BYTES: Final = 1 << 36
MAX_BUFFERS: Final = 1 << 20

_SEGMENT_MAGIC: Final = b"PSQJRNL1"
_SEGMENT: Final = struct.Struct("<8s16s8sQQ16sI")
SEGMENT_HEADER_BYTES: Final = _SEGMENT.size
_HEADER: Final = struct.Struct("<4sHHIQQQI16sII")
HEADER_BYTES: Final = _HEADER.size
_CRC_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What a segment says of itself.

    Attributes:
        run_id: whose it is.
        salt: random bytes that its records' header checksums cover.
        after_version: its records are of rounds after this version.
        first_number: of its first record; it takes over from earlier segments there.
        previous: the chain before that record.
    """

    run_id: bytes
    salt: bytes
    after_version: int
    first_number: int
    previous: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """What a record (or a mark) says of itself; see the top of the module."""

    kind: int
    front_bytes: int
    data_bytes: int
    number: int
    synced: int
    body_crc: int
    previous: bytes

    @property
    def body_bytes(self) -> int:
        """How much follows the header."""
        return self.front_bytes + self.data_bytes


@dataclass(frozen=True, slots=True)
class Body:
    """What follows a header: the front, then the buffers as they are."""

    pieces: tuple[memoryview, ...]
    front_bytes: int
    data_bytes: int
    crc: int


def pack_segment_header(header: SegmentHeader) -> bytes:
    """A segment's first page."""
    packed = _SEGMENT.pack(
        _SEGMENT_MAGIC,
        header.run_id,
        header.salt,
        header.after_version,
        header.first_number,
        header.previous,
        0,
    )[:-_CRC_BYTES]
    return (packed + struct.pack("<I", crc32c(packed))).ljust(PAGE_BYTES, b"\0")


def parse_segment_header(page: bytes) -> SegmentHeader | None:
    """What a segment's first page says; None if it is damaged, or not all there."""
    if len(page) != PAGE_BYTES or any(page[SEGMENT_HEADER_BYTES:]):
        return None
    magic, *fields, crc = _SEGMENT.unpack_from(page)
    if magic != _SEGMENT_MAGIC or crc32c(page[: SEGMENT_HEADER_BYTES - _CRC_BYTES]) != crc:
        return None
    return SegmentHeader(*fields)


def pack_body(meta: Mapping[Any, Any], buffers: Sequence[Buffer]) -> Body:
    """A record's body; the buffers are not copied, and read once, for the checksum.

    Raises:
        UsageError: it is over a limit, or msgpack cannot say something in it.
    """
    views = [bytes_of(buffer) for buffer in buffers]
    lengths = [view.nbytes for view in views]
    try:
        front: bytes = msgpack.packb([meta, lengths])
    except (TypeError, ValueError, OverflowError) as error:
        msg = f"a journal record's meta must be what msgpack can say: {error}"
        raise UsageError(msg) from error
    limits = (
        ("meta", len(front), MAX_FRONT_BYTES),
        ("data", sum(lengths), MAX_DATA_BYTES),
        ("buffers", len(views), MAX_BUFFERS),
    )
    for name, value, limit in limits:
        if value > limit:
            msg = f"a journal record has {name} of {value:,}, expected up to {limit:,}"
            raise UsageError(msg)
    pieces = (memoryview(front), *views)
    crc = 0
    for piece in pieces:
        crc = crc32c(piece, crc)
    return Body(pieces, len(front), sum(lengths), crc)


def pack_header(header: Header, salt: bytes) -> bytes:
    """A record's header, sealed for a segment with this salt."""
    packed = _HEADER.pack(
        MAGIC,
        header.kind,
        0,
        header.front_bytes,
        header.data_bytes,
        header.number,
        header.synced,
        header.body_crc,
        header.previous,
        0,
        0,
    )[:-_CRC_BYTES]
    return packed + struct.pack("<I", crc32c(salt + packed))


def parse_header(data: bytes, salt: bytes) -> Header | None:
    """What these bytes say, if they are the header of a record or a mark of this segment."""
    if len(data) != HEADER_BYTES:
        return None
    magic, kind, zero, front_bytes, data_bytes, *rest, zeros, crc = _HEADER.unpack(data)
    if magic != MAGIC or zero or zeros or crc32c(salt + data[:-_CRC_BYTES]) != crc:
        return None
    if front_bytes > MAX_FRONT_BYTES or data_bytes > MAX_DATA_BYTES:
        return None
    return Header(kind, front_bytes, data_bytes, *rest)


def chain_of(header: bytes, pieces: Sequence[memoryview]) -> bytes:
    """The chain after a record.

    Cost: one pass over its bytes.
    """
    state = xxh3_128(header)
    for piece in pieces:
        state.update(piece)
    digest = state.digest()
    assert len(digest) == DIGEST_BYTES  # noqa: S101 - our own format
    return bytes(digest)


def parse_front(front: memoryview, data_bytes: int) -> tuple[dict[Any, Any], list[int]] | None:
    """The meta of a record and its buffers' lengths; None if that is not what it is."""
    try:
        value = msgpack.unpackb(front, strict_map_key=False, max_ext_len=0)
    except (ValueError, TypeError, msgpack.UnpackException):
        return None
    match value:
        case [dict() as meta, list() as lengths]:
            pass
        case _:
            return None
    if any(type(length) is not int or length < 0 for length in lengths):
        return None
    return (meta, lengths) if sum(lengths) == data_bytes else None

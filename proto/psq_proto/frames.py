"""Frames: a 100-byte header and a body, the one unit that travels.

Theory. The header is fixed, little endian and without padding, and both it and the body carry a
CRC-32C, so a frame that decodes is the frame that was sealed. A sender writes the payload behind
HEADER_BYTES free bytes and `seal`s it in place; a receiver gets a view of the bytes that came: no
payload is copied on either side. Decoding checks in this order, and reads nothing that an earlier
check has not covered: length, magic, major, header CRC, announced length, field rules, body CRC. A
frame cut short, damaged or lying about its length raises RemoteWireError and nothing else.

Never here: who may say what when (that is `session`), or what a payload means (that is the codec).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, NamedTuple, TypeAlias

from crc32c import crc32c

from psq_proto.errors import RemoteWireError, UsageError
from psq_proto.messages import (
    BODY_TYPES,
    DATA_TYPES,
    MAJOR,
    MAX_CONTROL_BYTES,
    MAX_PAYLOAD_BYTES,
    NO_SHARD,
    ControlBody,
    Flags,
    MessageType,
    decode_body,
    encode_body,
)

__all__ = [
    "HEADER_BYTES",
    "MAGIC",
    "MAX_FRAME_BYTES",
    "NO_RUN",
    "Buffer",
    "Frame",
    "Glance",
    "Header",
    "decode_control",
    "decode_frame",
    "digest64",
    "encode_control",
    "encode_frame",
    "glance",
    "pack_header",
    "seal",
]

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Contiguous bytes; a received pyzmq Frame is given as its `.buffer`."""

MAGIC: Final = b"PSQW"
NO_RUN: Final = bytes(16)
"""The run_id of a worker that belongs to no run yet."""

_LAYOUT: Final = struct.Struct("<4sBBH16sIIIIQQQdQIIIII")
_GLANCE: Final = struct.Struct("<5xB26xI12xQ24xI16x")
_CRC: Final = struct.Struct("<I")
HEADER_BYTES: Final = _LAYOUT.size
MAX_FRAME_BYTES: Final = HEADER_BYTES + MAX_PAYLOAD_BYTES
_CRC_OFFSET: Final = HEADER_BYTES - _CRC.size
# Plain numbers: `&` of two IntFlags takes a microsecond, and every frame is asked.
_SKIP: Final = int(Flags.SKIP)
_ALL_FLAGS: Final = int(Flags.SKIP | Flags.DELTA | Flags.FULL | Flags.MEAN)
_MEAN: Final = int(Flags.MEAN)
_KINDS_OF_WEIGHTS: Final = frozenset({Flags.DELTA, Flags.FULL, Flags.MEAN, Flags.MEAN | Flags.SKIP})
_RUN_ID_BYTES: Final = 16
_ALWAYS_EMPTY: Final = frozenset({MessageType.PULL, MessageType.CKPT})
_MAY_BE_EMPTY: Final = frozenset({MessageType.PLAN, MessageType.PROBE, MessageType.ECHO})


@dataclass(frozen=True, slots=True)
class Header:
    """Every field of a frame's header, checked when made; 0 where a message has no use for a field.

    `body_len` and `body_crc` are filled in by whoever seals a frame, and are true in a header that
    was decoded.
    """

    type: MessageType
    codec: int = 0
    run_id: bytes = NO_RUN
    epoch: int = 0
    incarnation: int = 0
    rank: int = 0
    flags: Flags = Flags.NONE
    seq: int = 0
    round: int = 0
    version: int = 0
    rate: float = 0.0
    plan: int = 0
    shard: int = 0
    part: int = 0
    body_len: int = 0
    body_crc: int = 0
    major: int = MAJOR

    def __post_init__(self) -> None:
        """Refuse fields out of range and fields that this message type has no use for."""
        _pack_into(bytearray(HEADER_BYTES), self, 0)
        fault = _misuse(self)
        if fault:
            raise UsageError(fault)


_PUT: Final = tuple(getattr(Header, name).__set__ for name in Header.__slots__)
_TYPES: Final = {int(known): known for known in MessageType}
_FLAGS: Final = tuple(Flags(bits) for bits in range(_ALL_FLAGS + 1))


class Frame(NamedTuple):
    """A decoded frame: its header, and a view of its body in the buffer that it came in."""

    header: Header
    body: memoryview


class Glance(NamedTuple):
    """Some fields of a header, as they stand there: not checked."""

    type: int
    rank: int
    round: int
    shard: int


def glance(frame: Buffer) -> Glance | None:
    """What a frame seems to be, for those who only watch; None where there is no whole header.

    Nothing may be done because of it: the frame may be damaged, or a lie.
    """
    if len(frame) < HEADER_BYTES:
        return None
    return Glance._make(_GLANCE.unpack_from(frame))


def _misuse(header: Header) -> str:
    """What is wrong with a header for its message type, in words; empty when nothing is."""
    kind, flags = header.type, int(header.flags)
    if header.major != MAJOR or len(header.run_id) != _RUN_ID_BYTES:
        return f"a header has major {MAJOR} and a run_id of {_RUN_ID_BYTES} bytes, got {header!r}"
    if flags & ~_ALL_FLAGS:
        return f"{kind.name} sets reserved flag bits 0x{flags & ~_ALL_FLAGS:x}"
    if not 0.0 <= header.rate < math.inf or (header.rate and not _has_rate(kind, flags)):
        return (
            f"{kind.name} has rate {header.rate}: PUSH and WEIGHTS MEAN have a finite one >= 0, "
            "all others 0"
        )
    return _MISUSES.get(kind, _misuse_of_others)(header, flags)


def _has_rate(kind: MessageType, flags: int) -> bool:
    return kind is MessageType.PUSH or (kind is MessageType.WEIGHTS and bool(flags & _MEAN))


def _misuse_of_others(header: Header, flags: int) -> str:
    name = header.type.name
    if flags or header.codec:
        return f"{name} has no codec and no flags, got codec {header.codec} flags {flags}"
    if header.type is MessageType.INIT:
        return f"INIT must name a shard, got {NO_SHARD}" if header.shard == NO_SHARD else ""
    if header.shard or (header.part and header.type is not MessageType.PROBE):
        return f"{name} has no shard and no part, got shard {header.shard} part {header.part}"
    return ""


def _misuse_of_push(header: Header, flags: int) -> str:
    if flags & ~_SKIP:
        return f"PUSH has no flag but SKIP, got flags {flags}"
    if flags and (header.codec or header.part):
        return f"PUSH SKIP has codec 0 and part 0, got {header.codec} and {header.part}"
    if flags:
        return ""
    if not header.codec or header.shard == NO_SHARD:
        return f"PUSH must name a codec and a shard, got codec {header.codec} shard {header.shard}"
    return ""


def _misuse_of_again(header: Header, flags: int) -> str:
    if flags & ~_SKIP or header.part:
        return f"AGAIN has no flag but SKIP and no part, got flags {flags} part {header.part}"
    if flags and (header.codec or header.shard):
        return f"AGAIN SKIP has no codec and no shard, got {header.codec} and {header.shard}"
    if not flags and (not header.codec or header.shard == NO_SHARD):
        return f"AGAIN must name a codec and a shard, got codec {header.codec} {header.shard}"
    return ""


def _misuse_of_weights(header: Header, flags: int) -> str:
    if flags not in _KINDS_OF_WEIGHTS:
        return f"WEIGHTS must be one of DELTA, FULL and MEAN, or MEAN SKIP, got flags {flags}"
    skips = flags == _MEAN | _SKIP
    if bool(header.codec) == skips or header.shard == NO_SHARD or (skips and header.rate):
        return (
            "WEIGHTS must name a shard, and a codec where they have a body, and no rate where not: "
            f"got codec {header.codec} shard {header.shard} rate {header.rate}"
        )
    if header.part and flags != Flags.FULL:
        return f"WEIGHTS DELTA and MEAN have no parts, got part {header.part}"
    return ""


_MISUSES: Final = {
    MessageType.PUSH: _misuse_of_push,
    MessageType.AGAIN: _misuse_of_again,
    MessageType.WEIGHTS: _misuse_of_weights,
}


def _misfit(header: Header, body_len: int) -> str:
    """What is wrong with a body of this length for this header, in words; empty when nothing is."""
    kind = header.type
    limit = MAX_PAYLOAD_BYTES if kind in DATA_TYPES else MAX_CONTROL_BYTES
    empty = kind in _ALWAYS_EMPTY or bool(int(header.flags) & _SKIP)
    if empty and body_len:
        return f"{kind.name} has no body here, got {body_len} bytes"
    if not empty and not 0 < body_len <= limit:
        least = 0 if kind in _MAY_BE_EMPTY else 1
        if body_len < least or body_len > limit:
            return f"{kind.name} must have a body of {least}..{limit} bytes, got {body_len}"
    if kind is MessageType.INIT and body_len % 4:
        return f"INIT holds 4-byte floats, got {body_len} bytes"
    if kind is MessageType.PROBE and header.part > body_len:
        return f"PROBE of {body_len} bytes wants {header.part} back: an ECHO is never the longer"
    return ""


def _pack_into(
    target: bytearray | memoryview, header: Header, body_len: int, body_crc: int = 0
) -> None:
    """Write the header's bytes, with everything but the header CRC."""
    try:
        _LAYOUT.pack_into(
            target,
            0,
            MAGIC,
            header.major,
            header.type,
            header.codec,
            header.run_id,
            header.epoch,
            header.incarnation,
            header.rank,
            header.flags,
            header.seq,
            header.round,
            header.version,
            header.rate,
            header.plan,
            header.shard,
            header.part,
            body_len,
            body_crc,
            0,
        )
    except (struct.error, TypeError, OverflowError) as error:
        msg = f"a header field is out of range ({error}): {header!r:.600}"
        raise UsageError(msg) from error


def pack_header(header: Header) -> bytes:
    """The 100 bytes of a header whose body_len and body_crc are already right, CRC included.

    Raises:
        UsageError: a body of that length does not go with that header.
    """
    packed = bytearray(HEADER_BYTES)
    _pack_whole(memoryview(packed), header, header.body_len, header.body_crc)
    return bytes(packed)


def _pack_whole(target: memoryview, header: Header, body_len: int, body_crc: int) -> None:
    fault = _misfit(header, body_len)
    if fault:
        raise UsageError(fault)
    _pack_into(target, header, body_len, body_crc)
    _CRC.pack_into(target, _CRC_OFFSET, crc32c(target[:_CRC_OFFSET]))


def seal(frame: bytearray | memoryview, header: Header) -> None:
    """Write `header` with both CRCs in front of the body that `frame` holds behind HEADER_BYTES.

    Raises:
        UsageError: the frame has no room for a header, or its body does not go with it.

    Cost: one CRC pass over the body; nothing is copied.
    """
    view = memoryview(frame).cast("B")
    if view.nbytes < HEADER_BYTES:
        msg = f"a frame needs {HEADER_BYTES} bytes for its header, got {view.nbytes}"
        raise UsageError(msg)
    body = view[HEADER_BYTES:]
    _pack_whole(view, header, body.nbytes, crc32c(body))


def encode_frame(header: Header, body: Buffer = b"") -> bytearray:
    """A sealed frame with a copy of `body`; for a payload that should not be copied, use `seal`."""
    frame = bytearray(HEADER_BYTES)
    frame += body
    seal(frame, header)
    return frame


def encode_control(header: Header, body: ControlBody) -> bytearray:
    """A sealed control frame.

    Raises:
        UsageError: the header's type is not the body's.
    """
    expected = BODY_TYPES.get(header.type)
    if expected is not type(body):
        wanted = expected.__name__ if expected else "no control body"
        msg = f"{header.type.name} takes {wanted}, got {type(body).__name__}"
        raise UsageError(msg)
    return encode_frame(header, encode_body(body))


def decode_frame(buffer: Buffer, *, max_body: int = MAX_PAYLOAD_BYTES) -> Frame:
    """The frame in `buffer`; its body is a view, not a copy.

    Raises:
        RemoteWireError: these bytes are not exactly one whole, undamaged frame within the limits.
    """
    view = memoryview(buffer).cast("B")
    if not HEADER_BYTES <= view.nbytes <= HEADER_BYTES + max_body:
        msg = f"a frame has {HEADER_BYTES}..{HEADER_BYTES + max_body} bytes, got {view.nbytes}"
        raise RemoteWireError(msg)
    header = _decode_header(view)
    body = view[HEADER_BYTES:]
    if header.body_len != body.nbytes:
        msg = (
            f"{header.type.name} announces a body of {header.body_len} bytes and has {body.nbytes}"
        )
        raise RemoteWireError(msg)
    fault = _misfit(header, body.nbytes)
    if fault:
        raise RemoteWireError(fault)
    if crc32c(body) != header.body_crc:
        msg = f"{header.type.name} body of {body.nbytes} bytes is damaged (CRC)"
        raise RemoteWireError(msg)
    return Frame(header, body)


def _decode_header(view: memoryview) -> Header:
    magic, major, kind, codec, run_id, epoch, incarnation, rank, flags, *rest = _LAYOUT.unpack_from(
        view
    )
    seq, round_, version, rate, plan, shard, part, body_len, body_crc, header_crc = rest
    if magic != MAGIC:
        msg = f"a frame starts with {MAGIC!r}, got {magic!r}: the peer does not speak psq"
        raise RemoteWireError(msg)
    if major != MAJOR:
        msg = f"frame of protocol version {major}, this side speaks {MAJOR}: run the same psq"
        raise RemoteWireError(msg)
    if crc32c(view[:_CRC_OFFSET]) != header_crc:
        msg = "a header is damaged (CRC)"
        raise RemoteWireError(msg)
    known = _TYPES.get(kind)
    if known is None:
        msg = f"unknown message type {kind}"
        raise RemoteWireError(msg)
    named = _FLAGS[flags] if flags < len(_FLAGS) else Flags(flags)
    header = _unpacked(
        (
            *(known, codec, run_id, epoch, incarnation, rank, named, seq, round_, version, rate),
            *(plan, shard, part, body_len, body_crc, major),
        )
    )
    fault = _misuse(header)
    if fault:
        raise RemoteWireError(fault)
    return header


def _unpacked(values: tuple[object, ...]) -> Header:
    """A header of what was unpacked, in the order of its fields, none of them out of range.

    It takes a third of the time that `Header` does, which would look at the ranges again.
    """
    header = object.__new__(Header)
    for put, value in zip(_PUT, values, strict=True):
        put(header, value)
    return header


def decode_control(frame: Frame) -> ControlBody:
    """The control body of a decoded frame.

    Raises:
        RemoteWireError: the message has no control body, or its body is not a valid one.
    """
    if frame.header.type not in BODY_TYPES:
        msg = f"{frame.header.type.name} has no control body"
        raise RemoteWireError(msg)
    return decode_body(frame.header.type, frame.body)


def digest64(body: Buffer) -> int:
    """The 64-bit name of some bytes (BLAKE2b, 8 bytes, little endian), as headers name plans."""
    return int.from_bytes(blake2b(body, digest_size=8).digest(), "little")

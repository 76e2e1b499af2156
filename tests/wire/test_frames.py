from __future__ import annotations

import math
import struct
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from crc32c import crc32c
from hypothesis import example, given
from hypothesis import strategies as st

from psq_proto.errors import RemoteWireError, UsageError
from psq_proto.frames import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    Header,
    decode_control,
    decode_frame,
    digest64,
    encode_control,
    encode_frame,
    glance,
    pack_header,
    seal,
)
from psq_proto.messages import (
    BODY_TYPES,
    MAX_CONTROL_BYTES,
    MAX_PAYLOAD_BYTES,
    NO_SHARD,
    U32_MAX,
    U64_MAX,
    Cookie,
    Flags,
    MessageType,
)

U16, U32, U64 = st.integers(0, 0xFFFF), st.integers(0, U32_MAX), st.integers(0, U64_MAX)
SHARD = st.integers(0, NO_SHARD - 1)
MAY_BE_EMPTY = (MessageType.PLAN, MessageType.PROBE, MessageType.ECHO)
PUSH = Header(MessageType.PUSH, codec=0x101, shard=3, rate=0.1, seq=4, round=4, version=4)

# Offsets in the header of the fields that these tests falsify; proto/README.md has them all.
MAJOR_AT, TYPE_AT, FLAGS_AT, RATE_AT, BODY_LEN_AT, BODY_CRC_AT, HEADER_CRC_AT = (
    4,
    5,
    36,
    64,
    88,
    92,
    96,
)


@st.composite
def sealed_again(draw: st.DrawFn, fields: dict[str, Any], body: bytes) -> tuple[Header, bytes]:
    if draw(st.booleans()):
        return Header(MessageType.AGAIN, flags=Flags.SKIP, **fields), b""
    named = {"codec": draw(U16.filter(bool)), "shard": draw(SHARD)}
    return Header(MessageType.AGAIN, **fields, **named), body


@st.composite
def sealed(  # noqa: C901 - a case for each kind of message
    draw: st.DrawFn,
) -> tuple[Header, bytes]:
    """Any legal header with a body that goes with it."""
    kind = draw(st.sampled_from(MessageType))
    fields: dict[str, Any] = {
        "run_id": draw(st.binary(min_size=16, max_size=16)),
        **{name: draw(U32) for name in ("epoch", "incarnation", "rank")},
        **{name: draw(U64) for name in ("seq", "round", "version", "plan")},
    }
    body = draw(st.binary(min_size=1, max_size=64))
    if kind is MessageType.PUSH:
        fields["rate"] = draw(st.floats(0, allow_infinity=False))
    if kind is MessageType.PUSH and draw(st.booleans()):
        fields |= {"flags": Flags.SKIP, "shard": draw(SHARD | st.just(NO_SHARD))}
        body = b""
    elif kind in (MessageType.PUSH, MessageType.WEIGHTS):
        fields |= {"codec": draw(U16.filter(bool)), "shard": draw(SHARD)}
        fields["part"] = draw(U32)
    if kind is MessageType.AGAIN:
        return draw(sealed_again(fields, body))
    if kind is MessageType.WEIGHTS:
        fields["flags"] = draw(st.sampled_from([Flags.DELTA, Flags.FULL, Flags.MEAN]))
        fields["part"] = draw(U32) if fields["flags"] is Flags.FULL else 0
        if fields["flags"] is Flags.MEAN and draw(st.booleans()):
            fields["rate"] = draw(st.floats(0, allow_infinity=False))
        elif fields["flags"] is Flags.MEAN:
            fields |= {"flags": Flags.MEAN | Flags.SKIP, "codec": 0}
            body = b""
    if kind is MessageType.INIT:
        fields |= {"shard": draw(SHARD), "part": draw(U32)}
        body *= 4
    if kind in (MessageType.PULL, MessageType.CKPT) or (
        kind in MAY_BE_EMPTY and draw(st.booleans())
    ):
        body = b""
    if kind is MessageType.PROBE:
        fields["part"] = draw(st.integers(0, len(body)))
    return Header(kind, **fields), body


def resealed(frame: bytes | bytearray) -> bytearray:
    """The frame with its header CRC made right again: a peer that lies, not a damaged one."""
    changed = bytearray(frame)
    changed[HEADER_CRC_AT:HEADER_BYTES] = struct.pack("<I", crc32c(changed[:HEADER_CRC_AT]))
    return changed


@given(sealed())
def test_every_frame_comes_back_equal(message: tuple[Header, bytes]) -> None:
    header, body = message
    frame = decode_frame(encode_frame(header, body))
    assert frame.header == replace(header, body_len=len(body), body_crc=crc32c(body))
    assert frame.body == body


@given(sealed())
def test_sealing_in_place_makes_the_same_bytes_as_encoding(message: tuple[Header, bytes]) -> None:
    header, body = message
    in_place = bytearray(HEADER_BYTES) + body
    seal(memoryview(in_place), header)
    assert in_place == encode_frame(header, body)


@given(st.binary(max_size=300))
@example(b"PSQW" + bytes(96))
@example(bytes(resealed(b"PSQW\x01" + bytes(95))))
def test_any_bytes_give_a_frame_or_a_wire_error(raw: bytes) -> None:
    with pytest.raises(RemoteWireError):
        decode_frame(raw)


@given(sealed(), st.data())
def test_any_lie_that_a_peer_seals_gives_a_frame_or_a_wire_error(
    message: tuple[Header, bytes], data: st.DataObject
) -> None:
    frame = encode_frame(*message)
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, HEADER_CRC_AT - 1))] = data.draw(st.integers(0, 255))
    try:
        header, body = decode_frame(resealed(frame))
    except RemoteWireError:
        return
    assert encode_frame(header, body) == resealed(frame)


@given(sealed(), st.data())
def test_a_single_flipped_bit_is_found(message: tuple[Header, bytes], data: st.DataObject) -> None:
    frame = encode_frame(*message)
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RemoteWireError):
        decode_frame(frame)


def test_every_single_flipped_bit_of_one_frame_is_found() -> None:
    frame = encode_frame(PUSH, bytes(range(40)))
    for bit in range(8 * len(frame)):
        frame[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RemoteWireError):
            decode_frame(frame)
        frame[bit // 8] ^= 1 << bit % 8
    assert decode_frame(frame).body == bytes(range(40))


def test_every_truncation_and_every_addition_is_found() -> None:
    frame = encode_frame(PUSH, bytes(range(40)))
    for keep in range(len(frame)):
        with pytest.raises(RemoteWireError):
            decode_frame(frame[:keep])
    with pytest.raises(RemoteWireError, match="announces a body of 40 bytes and has 41"):
        decode_frame(frame + b"\x00")


def test_a_payload_is_never_copied() -> None:
    frame = bytearray(HEADER_BYTES + MAX_PAYLOAD_BYTES)
    tracemalloc.start()
    seal(frame, PUSH)
    body = decode_frame(frame).body
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 64 * 1024
    frame[HEADER_BYTES] = 77
    assert body[0] == 77


def test_a_frame_that_announces_gigabytes_costs_no_memory() -> None:
    frame = encode_frame(PUSH, b"x")
    frame[BODY_LEN_AT:BODY_CRC_AT] = b"\xff\xff\xff\xff"
    tracemalloc.start()
    with pytest.raises(RemoteWireError, match="announces a body of 4294967295 bytes and has 1"):
        decode_frame(resealed(frame))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 64 * 1024


def test_the_longest_frame_passes_and_one_byte_more_does_not() -> None:
    longest = bytearray(MAX_FRAME_BYTES)
    seal(longest, PUSH)
    assert decode_frame(longest).body.nbytes == MAX_PAYLOAD_BYTES
    with pytest.raises(RemoteWireError, match=r"a frame has 100..1048676 bytes, got 1048677"):
        decode_frame(longest + b"\x00")
    with pytest.raises(RemoteWireError, match=r"a frame has 100..164 bytes"):
        decode_frame(longest, max_body=64)
    with pytest.raises(UsageError, match=r"PUSH must have a body of 1..1048576 bytes"):
        encode_frame(PUSH, bytes(MAX_PAYLOAD_BYTES + 1))


def test_a_control_body_over_its_limit_is_refused_before_it_is_read() -> None:
    body = bytes(MAX_CONTROL_BYTES + 1)
    with pytest.raises(UsageError, match=r"HELLO must have a body of 1..65536 bytes"):
        encode_frame(Header(MessageType.HELLO), body)
    push = encode_frame(PUSH, body)
    push[TYPE_AT] = MessageType.HELLO
    with pytest.raises(RemoteWireError):
        decode_frame(resealed(push))


@pytest.mark.parametrize(
    ("offset", "lie", "words"),
    [
        (0, b"HTTP", "does not speak psq"),
        (MAJOR_AT, b"\x02", "protocol version 2, this side speaks 1"),
        (TYPE_AT, b"\x00", "unknown message type 0"),
        (TYPE_AT, b"\x3f", "unknown message type 63"),
        (TYPE_AT, b"\x6f", "unknown message type 111"),
        (FLAGS_AT, b"\x10", "reserved flag bits 0x10"),
        (FLAGS_AT, b"\x00\x00\x00\x80", "reserved flag bits 0x80000000"),
        (FLAGS_AT, b"\x02", "no flag but SKIP"),
        (RATE_AT, struct.pack("<d", math.nan), "rate nan"),
        (RATE_AT, struct.pack("<d", math.inf), "rate inf"),
        (RATE_AT, struct.pack("<d", -0.1), "rate -0.1"),
        (TYPE_AT, b"\x44", "WEIGHTS has rate 0.1"),
        (BODY_CRC_AT, b"\x00\x00\x00\x00", "body of 4 bytes is damaged"),
    ],
)
def test_each_lie_is_named(offset: int, lie: bytes, words: str) -> None:
    frame = encode_frame(PUSH, b"body")
    frame[offset : offset + len(lie)] = lie
    with pytest.raises(RemoteWireError, match=words):
        decode_frame(resealed(frame))


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (MessageType.PUSH, {"shard": 1}, "must name a codec"),
        (MessageType.PUSH, {"codec": 1, "shard": NO_SHARD}, "must name a codec and a shard"),
        (MessageType.AGAIN, {"shard": 1}, "must name a codec"),
        (MessageType.AGAIN, {"codec": 1, "shard": NO_SHARD}, "must name a codec and a shard"),
        (MessageType.AGAIN, {"codec": 1, "part": 1}, "no part"),
        (MessageType.AGAIN, {"codec": 1, "flags": Flags.FULL}, "no flag but SKIP"),
        (MessageType.AGAIN, {"flags": Flags.SKIP, "shard": 1}, "no codec and no shard"),
        (MessageType.PUSH, {"codec": 1, "flags": Flags.FULL}, "no flag but SKIP"),
        (MessageType.PUSH, {"codec": 1, "flags": Flags.MEAN}, "no flag but SKIP"),
        (MessageType.PUSH, {"flags": Flags.SKIP, "codec": 1}, "SKIP has codec 0 and part 0, got 1"),
        (MessageType.PUSH, {"flags": Flags.SKIP, "part": 1}, "SKIP has codec 0 and part 0"),
        (MessageType.PROBE, {"shard": 1}, "no shard"),
        (MessageType.ECHO, {"part": 1}, "no shard and no part"),
        (MessageType.JOB, {"flags": Flags.SKIP}, "no flags"),
        (MessageType.WEIGHTS, {"codec": 1}, "one of DELTA, FULL and MEAN"),
        (MessageType.WEIGHTS, {"codec": 1, "flags": Flags.DELTA | Flags.FULL}, "one of DELTA"),
        (MessageType.WEIGHTS, {"codec": 1, "flags": Flags.DELTA | Flags.MEAN}, "one of DELTA"),
        (MessageType.WEIGHTS, {"codec": 1, "flags": Flags.DELTA, "part": 1}, "no parts"),
        (MessageType.WEIGHTS, {"codec": 1, "flags": Flags.MEAN, "part": 1}, "no parts"),
        (MessageType.WEIGHTS, {"codec": 1, "flags": Flags.DELTA, "rate": 0.1}, "rate 0.1"),
        (MessageType.WEIGHTS, {"codec": 1, "flags": Flags.FULL, "rate": 0.1}, "rate 0.1"),
        (MessageType.WEIGHTS, {"flags": Flags.FULL}, "and a codec where they have a body"),
        (MessageType.WEIGHTS, {"flags": Flags.MEAN}, "and a codec where they have a body"),
        (MessageType.WEIGHTS, {"flags": Flags.DELTA | Flags.SKIP}, "or MEAN SKIP"),
        (MessageType.WEIGHTS, {"flags": Flags.MEAN | Flags.SKIP, "codec": 1}, "got codec 1"),
        (MessageType.WEIGHTS, {"flags": Flags.MEAN | Flags.SKIP, "rate": 0.1}, "got codec 0"),
        (MessageType.INIT, {"codec": 1}, "no codec"),
        (MessageType.INIT, {"shard": NO_SHARD}, "must name a shard"),
        (MessageType.PULL, {"shard": 1}, "no shard"),
        (MessageType.STATUS, {"part": 1}, "no shard and no part"),
        (MessageType.HELLO, {"flags": Flags.SKIP}, "no flags"),
        (MessageType.PULL, {"rate": 0.1}, "rate 0.1"),
        (MessageType.HELLO, {"run_id": b"short"}, "run_id of 16 bytes"),
        (MessageType.HELLO, {"rank": -1}, "out of range"),
        (MessageType.HELLO, {"epoch": U32_MAX + 1}, "out of range"),
        (MessageType.HELLO, {"seq": 0.5}, "out of range"),
        (MessageType.HELLO, {"major": 2}, "has major 1"),
    ],
)
def test_a_header_that_cannot_be_sent_cannot_be_made(
    kind: MessageType, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        Header(kind, **fields)


@pytest.mark.parametrize(
    ("header", "body", "words"),
    [
        (Header(MessageType.PULL), b"x", "PULL has no body"),
        (Header(MessageType.PUSH, flags=Flags.SKIP, shard=NO_SHARD), b"x", "PUSH has no body here"),
        (PUSH, b"", "must have a body"),
        (Header(MessageType.WEIGHTS, flags=Flags.MEAN | Flags.SKIP), b"x", "has no body here"),
        (Header(MessageType.INIT), b"abc", "4-byte floats, got 3 bytes"),
        (Header(MessageType.PROBE, part=4), b"abc", "PROBE of 3 bytes wants 4 back"),
        (Header(MessageType.PROBE), bytes(MAX_PAYLOAD_BYTES + 1), r"a body of 0\.\.1048576 bytes"),
        (Header(MessageType.JOB), b"", r"JOB must have a body of 1\.\.1048576 bytes, got 0"),
    ],
)
def test_a_body_that_does_not_go_with_its_header_is_refused(
    header: Header, body: bytes, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        encode_frame(header, body)


def test_a_packed_header_needs_its_body_length() -> None:
    body = b"payload"
    header = replace(PUSH, body_len=len(body), body_crc=crc32c(body))
    assert pack_header(header) + body == encode_frame(PUSH, body)
    with pytest.raises(UsageError, match="must have a body"):
        pack_header(PUSH)


def test_a_frame_without_room_for_a_header_cannot_be_sealed() -> None:
    with pytest.raises(UsageError, match="needs 100 bytes"):
        seal(bytearray(99), PUSH)


def test_a_control_frame_takes_only_its_own_body() -> None:
    with pytest.raises(UsageError, match="HELLO takes Hello, got Cookie"):
        encode_control(Header(MessageType.HELLO), Cookie(1))
    with pytest.raises(UsageError, match="PULL takes no control body, got Cookie"):
        encode_control(Header(MessageType.PULL), Cookie(1))
    with pytest.raises(RemoteWireError, match="PUSH has no control body"):
        decode_control(decode_frame(encode_frame(PUSH, b"x")))


@given(st.sampled_from(sorted(BODY_TYPES)), st.binary(min_size=1, max_size=80))
def test_any_control_body_gives_a_message_or_a_wire_error(kind: MessageType, raw: bytes) -> None:
    frame = decode_frame(encode_frame(Header(kind), raw))
    try:
        assert type(decode_control(frame)) is BODY_TYPES[kind]
    except RemoteWireError:
        return


def test_a_read_only_or_shaped_buffer_is_as_good_as_any() -> None:
    frame = encode_frame(PUSH, bytes(28))
    for buffer in (bytes(frame), memoryview(frame).toreadonly(), memoryview(frame).cast("I")):
        assert decode_frame(buffer).body == bytes(28)


def test_the_digest_is_blake2b_of_eight_bytes_little_endian() -> None:
    assert digest64(b"") == 0xB4B2_7974_57A0_A6E4
    assert digest64(memoryview(b"plan")) == digest64(b"plan") != digest64(b"plan ")


def test_a_glance_shows_what_a_header_says_and_checks_nothing() -> None:
    header = replace(PUSH, rank=3, round=2**40, shard=17)
    frame = bytearray(encode_frame(header, b"x"))
    assert glance(frame) == (MessageType.PUSH, 3, 2**40, 17)
    frame[-1] ^= 1
    assert glance(frame) == (MessageType.PUSH, 3, 2**40, 17)
    assert glance(frame[: HEADER_BYTES - 1]) is None

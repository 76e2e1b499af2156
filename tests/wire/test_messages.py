from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psq_proto.errors import RemoteWireError, UsageError
from psq_proto.limits import CONTROL_LIMITS
from psq_proto.messages import (
    BODY_TYPES,
    DATA_TYPES,
    MAX_CONTROL_BYTES,
    MAX_LIST_ITEMS,
    MAX_TEXT_BYTES,
    U32_MAX,
    U64_MAX,
    ControlBody,
    Error,
    ErrorCode,
    Heartbeat,
    Hello,
    Join,
    Leave,
    MessageType,
    Recall,
    Status,
    Verdict,
    Welcome,
    clip_text,
    decode_body,
    encode_body,
    from_worker,
)
from psq_proto.packing import pack, unpack

BODIES = st.one_of([st.from_type(body) for body in BODY_TYPES.values()])
TYPE_OF = {body: kind for kind, body in BODY_TYPES.items()}


@given(BODIES)
def test_every_control_body_comes_back_equal(body: ControlBody) -> None:
    assert decode_body(TYPE_OF[type(body)], encode_body(body)) == body


@given(BODIES, BODIES)
def test_a_body_is_never_taken_for_that_of_another_message(
    body: ControlBody, other: ControlBody
) -> None:
    if type(body).__slots__ == type(other).__slots__:
        return
    with pytest.raises(RemoteWireError, match="body must be a map of"):
        decode_body(TYPE_OF[type(other)], encode_body(body))


@given(st.sampled_from(sorted(BODY_TYPES)), st.binary(max_size=200))
def test_any_bytes_give_a_body_or_a_wire_error(kind: MessageType, raw: bytes) -> None:
    try:
        body = decode_body(kind, raw)
    except RemoteWireError:
        return
    assert type(body) is BODY_TYPES[kind]


WRONG_VALUES = st.sampled_from(
    [None, True, -2, 0.5, math.nan, math.inf, -1.0, "", "x", b"x", (), ((1,),), {}]
)


@given(BODIES, st.data(), WRONG_VALUES)
def test_a_wrong_field_gives_a_wire_error_or_an_equal_value(
    body: ControlBody, data: st.DataObject, value: object
) -> None:
    kind = TYPE_OF[type(body)]
    plain = unpack(encode_body(body), CONTROL_LIMITS)
    name = data.draw(st.sampled_from(sorted(plain)))
    plain[name] = value
    try:
        decoded = decode_body(kind, pack(plain))
    except RemoteWireError as error:
        assert kind.name in str(error)  # noqa: PT017 - only one of two outcomes raises
    else:
        assert getattr(decoded, name) == value


@pytest.mark.parametrize("kind", BODY_TYPES)
def test_missing_and_extra_fields_are_named(kind: MessageType) -> None:
    with pytest.raises(RemoteWireError, match="surprise"):
        decode_body(kind, pack({"surprise": 1}))
    with pytest.raises(RemoteWireError, match=f"{kind.name} body must be a map of .*; got tuple"):
        decode_body(kind, pack([1]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Hello(nonce=-1), "nonce must be a whole number 0"),
        (lambda: Hello(nonce=True), "nonce must be a whole number"),
        (lambda: Hello(nonce=1, majors=()), "at least one protocol version"),
        (lambda: Hello(nonce=1, majors=(0,)), "majors must be a whole number 1..255, got 0"),
        (lambda: Join(lineage=U64_MAX + 1), "lineage must be"),
        (lambda: Join(lineage=1, pending=-2), "pending must be"),
        (lambda: Join(lineage=1, host="h" * (MAX_TEXT_BYTES + 1)), "at most 4096 bytes"),
        (lambda: Join(lineage=1, host="\ud800"), "UTF-8"),
        (lambda: Heartbeat(progress=0.5), "progress must be"),  # type: ignore[arg-type]
        (lambda: Leave("bored"), "reason must be one of done, error"),  # type: ignore[arg-type]
        (lambda: Verdict("applied", server_s=math.nan), "finite number of seconds"),
        (lambda: Verdict("applied", server_s=-1), "finite number of seconds"),
        (lambda: Verdict("applied", rejected=[1]), "must be a tuple"),  # type: ignore[arg-type]
        (lambda: Verdict("applied", rejected=(0,) * (MAX_LIST_ITEMS + 1)), "at most 1024 items"),
        (lambda: Verdict("applied", rejected=(2, 1)), "ascending order, got 1 after 2"),
        (lambda: Verdict("applied", rejected=(1, 1)), "ascending order, got 1 after 1"),
        (lambda: Verdict("applied", rejected=(U32_MAX,)), "rejected must be a whole number"),
        (lambda: Verdict("applied", rejected=(True,)), "rejected must be a whole number"),
        (lambda: Recall(()), "at least one"),
        (lambda: Recall((2, 1)), "ascending order, got 1 after 2"),
        (lambda: Verdict("rejected", rejected=(1,)), "names no shards of its own"),
        (lambda: Status(0, 0, resolved=-2), "resolved must be"),
        (lambda: Status(0, 0, clock_s=math.inf), "clock_s must be a finite number"),
        (lambda: Status(0, 0, missing=[1]), "must be a tuple"),  # type: ignore[arg-type]
        (lambda: Status(0, 0, missing=(0,) * (MAX_LIST_ITEMS + 1)), "at most 1024 items"),
        (lambda: Status(0, 0, waiting=((1,),)), "pairs"),  # type: ignore[arg-type]
        (lambda: Status(0, 0, waiting=((1, "x"),)), "seconds"),  # type: ignore[arg-type]
        (lambda: Welcome("continue", 0, 1.0, 1, 2, False), "init_wanted"),  # type: ignore[arg-type]  # noqa: FBT003
        (lambda: Error("plan", fatal=1), "fatal must be true"),  # type: ignore[arg-type]
    ],
)
def test_a_body_that_cannot_be_sent_cannot_be_made(make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()


def test_whole_seconds_mean_the_same_as_floats() -> None:
    assert Verdict("applied", server_s=2) == Verdict("applied", server_s=2.0)
    assert encode_body(Verdict("applied", server_s=2)) == encode_body(
        Verdict("applied", server_s=2.0)
    )


def test_an_error_code_travels_as_a_plain_word() -> None:
    assert type(Error(ErrorCode.PLAN).code) is str


def test_the_fullest_status_fits_in_a_control_body() -> None:
    rows = tuple((rank, 1e9 + rank) for rank in range(MAX_LIST_ITEMS))
    full = Status(
        *(U64_MAX, U64_MAX, tuple(range(2**31, 2**31 + MAX_LIST_ITEMS)), rows, "x" * 4096),
        resolved=U64_MAX,
        clock_s=1e300,
    )
    assert len(encode_body(full)) < MAX_CONTROL_BYTES
    assert decode_body(MessageType.STATUS, encode_body(full)) == full


def test_the_longest_list_of_refused_shards_fits_in_a_control_body() -> None:
    shards = tuple(range(U32_MAX - MAX_LIST_ITEMS, U32_MAX))
    full = Verdict("applied", "x" * 4096, 1.5, shards)
    assert decode_body(MessageType.VERDICT, encode_body(full)) == full


@given(st.text(st.characters(), max_size=3000))
def test_clipped_text_always_fits_and_short_text_stays(text: str) -> None:
    Error("x", clip_text(text))
    if text.isascii():
        assert clip_text(text) == text


def test_clipping_never_cuts_a_character_in_two() -> None:
    assert clip_text("é" * 4096) == "é" * 2048


def test_every_message_type_has_one_sender_and_one_kind_of_body() -> None:
    assert {kind for kind in MessageType if from_worker(kind)} == {*range(1, 13)}
    assert not DATA_TYPES & BODY_TYPES.keys()
    assert DATA_TYPES | BODY_TYPES.keys() | {MessageType.PULL, MessageType.CKPT} == set(MessageType)


@pytest.mark.parametrize("body", BODY_TYPES.values())
def test_bodies_are_frozen_and_slotted(body: type[Any]) -> None:
    assert body.__dataclass_params__.frozen
    assert [field.name for field in dataclasses.fields(body)] == list(body.__slots__)

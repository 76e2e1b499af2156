from __future__ import annotations

import tracemalloc

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from psq_proto.errors import RemoteWireError
from psq_proto.limits import CONTROL_LIMITS, PLAN_LIMITS
from psq_proto.packing import PackLimits, pack, unpack

SMALL = PackLimits(
    total_bytes=100, map_items=2, array_items=3, str_bytes=4, bin_bytes=5, depth=2, items=8
)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=40)
    | st.binary(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=9), inner, max_size=5)
    ),
    max_leaves=30,
)


@given(PLAIN)
def test_what_is_packed_is_unpacked(value: object) -> None:
    assert unpack(pack(value), PackLimits(1 << 20, 64, 1024, 4096, 4096, 100, 10_000)) == value


@given(PLAIN, st.integers(0, 10_000))
def test_a_value_cut_short_is_refused(value: object, keep: int) -> None:
    packed = pack(value)
    with pytest.raises(RemoteWireError):
        unpack(packed[: keep % len(packed)], CONTROL_LIMITS)


@given(st.binary(max_size=300))
@example(b"\x91" * 200 + b"\x01")
@example(b"\xde\x00")
@example(b"\x81\xc4\x01k\x01")
@example(b"\x81\xa1\xff\x01")
@example(b"\x82\xa1k\x01\xa1k\x02")
def test_any_bytes_give_msgpacks_value_or_a_wire_error(body: bytes) -> None:
    try:
        value = unpack(body, CONTROL_LIMITS)
    except RemoteWireError:
        return
    assert repr(value) == repr(msgpack.unpackb(body, use_list=False))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("fives", "string of length 5, the limit is 4"),
        (b"sixsix", "bytes of length 6, the limit is 5"),
        ([1, 2, 3, 4], "array of length 4, the limit is 3"),
        ({"a": 1, "b": 2, "c": 3}, "map of length 3, the limit is 2"),
        ([[[1]]], "nested deeper than 2"),
        ([[1, 2, 3], [1, 2, 3]], "over 8 items"),
        ([b"12345"] * 3 + [b""] * 90, "bytes, the limit is 100"),
    ],
)
def test_each_limit_is_kept_and_named(value: object, words: str) -> None:
    with pytest.raises(RemoteWireError, match=words):
        unpack(pack(value), SMALL)


@pytest.mark.parametrize("value", ["four", b"fives", [1, 2, 3], {"a": 1, "b": 2}, [[1]], []])
def test_a_value_at_its_limit_passes(value: object) -> None:
    assert unpack(pack(value), SMALL, use_list=True) == value


@pytest.mark.parametrize(
    "body",
    [
        pack(1) + b"\x00",
        msgpack.packb(msgpack.Timestamp(1)),
        msgpack.packb(msgpack.ExtType(5, b"x")),
        b"\xc1",
        pack({1: 2}),
        b"\x82\xa1k\x01\xa1k\x02",
        b"",
    ],
    ids=["trailing", "timestamp", "extension", "reserved tag", "key", "key twice", "empty"],
)
def test_what_this_protocol_never_sends_is_refused(body: bytes) -> None:
    with pytest.raises(RemoteWireError):
        unpack(body, CONTROL_LIMITS)


@pytest.mark.parametrize("limits", [CONTROL_LIMITS, PLAN_LIMITS], ids=["control", "plan"])
@pytest.mark.parametrize(
    "tag", [b"\xdc\x04\x00", b"\xdd\x00\x01\x00\x00", b"\xdf\x00\x00\x00\x40", b"\x91", b"\x81\xa0"]
)
def test_nested_claims_cost_no_memory(limits: PackLimits, tag: bytes) -> None:
    bomb = tag * (limits.total_bytes // len(tag))
    tracemalloc.start()
    with pytest.raises(RemoteWireError):
        unpack(bomb, limits)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 64 * 1024


def test_the_dearest_control_body_that_passes_stays_small() -> None:
    entries = ({},) * 1000
    dearest = pack((entries,) * 6)
    tracemalloc.start()
    unpack(dearest, CONTROL_LIMITS)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20

"""psq.plan: equal plans are equal bytes, others are told apart in words or refused."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psq.errors import ConfigError, RemotePlanError
from psq.plan import Plan
from psq.recipe import preset
from psq_proto.messages import MAX_PAYLOAD_BYTES

TENSORS = [("conv.weight", (8, 1, 3, 3)), ("conv.bias", (8,)), ("fc.weight", (10, 8))]


def plan(tensors=TENSORS, recipe="server-adam", world_size=2):
    return Plan.of(tensors, preset(recipe), world_size)


def test_a_plan_survives_the_wire_with_the_same_digest_and_layout():
    other = Plan.parse(plan().body)
    assert other == plan()
    assert other.digest == plan().digest
    assert other.layout == plan().layout


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (plan(world_size=3), "world_size: the job has 2, it says 3"),
        (
            plan(recipe="fp32"),
            "recipe downlink.codec: the job has 'lloyd-max:bits=3', it says 'fp32'",
        ),
        (
            plan([TENSORS[0], ("conv.bias", (9,)), TENSORS[2]]),
            r"tensor 1: the job has 'conv.bias' \[8\], it says 'conv.bias' \[9\]",
        ),
        (plan(TENSORS[:2]), r"number of tensors: the job has 3, it says 2 .*'fc.weight' \[10, 8\]"),
    ],
)
def test_the_first_difference_is_named(other, words):
    assert plan().digest != other.digest
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(plan().difference(other))


def test_equal_plans_differ_in_nothing():
    assert plan().difference(plan()) == ""


def test_a_plan_over_the_message_limit_is_refused_at_home():
    names = [("x" * 1000 + str(i), (1,)) for i in range(1100)]
    with pytest.raises(ConfigError, match=str(MAX_PAYLOAD_BYTES)):
        plan(names)


@pytest.mark.parametrize("world_size", [0, -1, 4097])
def test_a_world_size_out_of_range_is_refused(world_size):
    with pytest.raises(ConfigError, match="world_size"):
        plan(world_size=world_size)


def test_an_unknown_codec_is_refused():
    with pytest.raises(ConfigError):
        Plan.of(TENSORS, preset("qadam").with_codecs(uplink="zip"), 2)


def plain(**changes):
    return msgpack.packb(msgpack.unpackb(plan().body) | changes)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        msgpack.packb([]),
        plan().body + b"\x00",
        plain(format=1),
        plain(world_size=2.0),
        plain(world_size=10**9),
        plain(recipe=[]),
        plain(tensors=[["w", [2**41]]]),
        plain(tensors=[["w", [2**30, 2**30]]]),
        plain(tensors=[["w", [2**40]], ["b", [1]]]),
        plain(tensors=[["w", [0]]]),
        plain(tensors=[["w", [True]]]),
        plain(tensors=[["w", [1] * 17]]),
        plain(tensors=[["w"]]),
        plain(tensors=[]),
        plain(tensors=[["w", [1]], ["w", [1]]]),
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 5000,
    ],
)
def test_bytes_that_are_no_plan_are_refused(body):
    with pytest.raises(RemotePlanError):
        Plan.parse(body).layout  # noqa: B018 - the property is the act


@given(st.binary(max_size=300))
def test_any_bytes_give_a_plan_error_and_nothing_else(body):
    with pytest.raises(RemotePlanError):
        Plan.parse(body)


def test_a_plan_in_another_byte_form_is_refused():
    shuffled = dict(reversed(list(msgpack.unpackb(plan().body).items())))
    with pytest.raises(RemotePlanError, match="canonical"):
        Plan.parse(msgpack.packb(shuffled))

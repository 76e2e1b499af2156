"""Who gets whole weights from an aggregator that has none."""

from __future__ import annotations

import pytest

from psq.codec import get_codec
from psq_proto.frames import Header
from psq_proto.messages import Flags, MessageType
from psq_server.tree_whole import PULL_AGAIN_S, WholeWeights

PARTS = 2
FP32 = get_codec("fp32").wire_id


def frame(shard, part, version=0):
    return Header(
        MessageType.WEIGHTS, codec=FP32, flags=Flags.FULL, shard=shard, part=part, version=version
    )


@pytest.fixture
def whole():
    return WholeWeights((0, 1), 0.0)


def took_all(whole, now_s=0.0, version=0):
    return [whole.took(frame(k, p, version), PARTS, now_s) for k in (0, 1) for p in range(PARTS)]


def test_the_first_pull_serves_those_that_waited_for_it(whole):
    whole.want([b"a", b"b"], (0, 1))
    whole.join_pull()
    assert whole.receivers(0) == (b"a", b"b")
    assert took_all(whole) == [False, True, False, True]
    assert whole.receivers(0) == ()
    assert not whole.is_due(0.0)


def test_who_comes_while_a_pull_is_under_way_is_served_by_the_next(whole):
    whole.join_pull()
    whole.took(frame(0, 0), PARTS, 0.0)
    whole.want([b"late"], (0, 1))
    assert whole.receivers(0) == ()
    assert not whole.is_due(1.0)
    took_all(whole)
    assert whole.is_due(1.0)
    whole.begin(1.0)
    assert whole.receivers(0) == whole.receivers(1) == (b"late",)


def test_a_pull_that_brings_nothing_more_is_begun_again_for_the_same(whole):
    whole.want([b"a"], (0, 1))
    whole.join_pull()
    whole.took(frame(0, 0), PARTS, 1.0)
    assert not whole.is_due(PULL_AGAIN_S)
    assert whole.is_due(1.0 + PULL_AGAIN_S)
    whole.begin(1.0 + PULL_AGAIN_S)
    assert whole.receivers(0) == (b"a",)
    assert took_all(whole, 7.0) == [False, True, False, True]


def test_parts_of_two_versions_are_not_one_shard(whole):
    whole.join_pull()
    assert not whole.took(frame(0, 0, 3), PARTS, 0.0)
    assert not whole.took(frame(0, 1, 4), PARTS, 0.0)
    assert whole.took(frame(0, 0, 4), PARTS, 0.0)

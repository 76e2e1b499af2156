"""Weights in their turn, for workers that compute the same as others."""

from __future__ import annotations

import pytest

from psq.client.round import Round
from psq.client.turns import HELD_VERSIONS, Turns
from psq.codec import get_codec
from psq.plan import Plan
from psq.presets import preset
from psq.rules.coded import MAX_LAG
from psq_proto.frames import Header
from psq_proto.messages import NONE, Flags, MessageType

BODY = memoryview(b"body")
FP32 = get_codec("fp32").wire_id


def plan_of(recipe):
    return Plan.of([("w", (10,))], preset(recipe), 2)


def weights(version):
    return Header(MessageType.WEIGHTS, codec=FP32, flags=Flags.DELTA, version=version)


@pytest.fixture
def turns():
    return Turns(plan_of("coded"))


def open_round(number, *, said):
    current = Round(number, 0.1, (0,))
    if said:
        current.push(0)
    return current


def test_other_recipes_take_weights_as_they_come():
    turns = Turns(plan_of("server-adam"))
    assert not turns.keeps(weights(9), BODY, 3, open_round(3, said=False))
    assert turns.held_versions == HELD_VERSIONS


def test_nothing_is_taken_before_all_of_the_round_is_said(turns):
    assert turns.keeps(weights(4), BODY, 3, open_round(3, said=False))
    assert [header.version for header, _ in turns.take()] == [4]
    assert not turns.keeps(weights(4), BODY, 3, open_round(3, said=True))


def test_later_versions_wait_for_their_rounds_in_the_order_they_came(turns):
    current = open_round(3, said=True)
    assert all(turns.keeps(weights(version), BODY, 3, current) for version in (5, 6))
    assert turns.keeps(weights(5), BODY, 4, None)
    assert [header.version for header, _ in turns.take()] == [5, 6, 5]
    assert not turns.take()


def test_a_verdict_that_names_a_later_version_lets_the_worker_go_there(turns):
    current = open_round(3, said=True)
    current.target = 9
    assert not turns.keeps(weights(9), BODY, 3, current)
    assert turns.keeps(weights(10), BODY, 3, current)


def test_first_weights_and_those_asked_for_after_a_loss_are_taken_at_once(turns):
    assert not turns.keeps(weights(7), BODY, NONE, None)
    turns.jumps = True
    assert not turns.keeps(weights(7), BODY, 3, open_round(3, said=True))
    assert turns.keeps(weights(7), BODY, 3, open_round(3, said=False))


def test_what_waits_is_bounded(turns):
    for version in range(100):
        turns.keeps(weights(5 + version), BODY, 3, open_round(3, said=True))
    assert len(turns.take()) == turns.held_versions == MAX_LAG + 2


def test_a_round_is_over_when_the_server_has_forgotten_it(turns):
    assert not turns.is_over(3, 3 + MAX_LAG)
    assert turns.is_over(3, 4 + MAX_LAG)

"""A network learns with hostile workers in the job: real codecs, residuals, the real reducer."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[4] / "bench"
STEPS = 150
CLOSE = 0.06  # of honest training's accuracy, which is about 0.74; guessing gives 0.17

MEDIAN = ("aggregate=median",)
TRIMMED = ("aggregate=trimmed-mean", "aggregate.f=5")
KRUM = ("aggregate=krum", "aggregate.f=4", "aggregate.m=5", "uplink.error_feedback=false")
CLIP = ("aggregate=clip", "aggregate.norm=1")
MAJORITY = ("aggregate=majority", "uplink.error_feedback=false")
KARDAM = ("aggregate=kardam", "aggregate.f=3", "aggregate.dampening=none")
ONE_BIT = {"codec": "sign", "lr": 0.003}
ONE_BY_ONE = {"asynchronous": True, "lr": 0.02, "steps": 100}


@pytest.fixture(scope="module")
def train():
    sys.path.insert(0, str(BENCH))
    try:
        attacked = importlib.import_module("attacked")
    finally:
        sys.path.remove(str(BENCH))
    del sys.modules["attacked"]

    @cache
    def run(given=(), **case):
        return attacked.train(attacked.Case(given, **{"steps": STEPS} | case))

    return run


@pytest.mark.parametrize(
    ("attack", "hostile", "more"),
    [
        ("scaled", 1, {}),
        ("random", 1, {"strength": 1000.0}),
        ("sign-flip", 5, {"strength": 3.0}),
        ("scaled", 1, ONE_BIT | {"lr": 0.3}),
        ("scaled", 1, ONE_BY_ONE),
    ],
)
def test_the_mean_does_not_withstand(train, attack, hostile, more):
    honest = train(**more).accuracy
    assert honest > 0.7
    assert train(attack=attack, hostile=hostile, **more).accuracy < honest - 0.2


@pytest.mark.parametrize("attack", ["scaled", "random", "sign-flip", "nan", "silent"])
@pytest.mark.parametrize(
    ("given", "hostile", "more"),
    [
        (MEDIAN, 3, {}),
        (("aggregate=trimmed-mean", "aggregate.f=3"), 3, {}),
        (KRUM, 4, {}),
        (KRUM, 4, {"codec": "sign"}),
        (MAJORITY, 3, ONE_BIT),
        (KARDAM, 3, ONE_BY_ONE),
    ],
    ids=["median", "trimmed-mean", "krum", "krum-sign", "majority", "kardam"],
)
def test_a_robust_aggregate_learns_as_if_nobody_attacked(train, attack, given, hostile, more):
    honest = train(given, **more).accuracy
    attacked = train(given, attack=attack, hostile=hostile, **more)
    assert honest > 0.7
    assert attacked.accuracy > honest - CLOSE
    if attack == "nan":
        rounds = more.get("steps", STEPS)
        assert all(attacked.refused[rank, "payload"] == rounds for rank in range(hostile))


@pytest.mark.parametrize("given", [MEDIAN, TRIMMED], ids=["median", "trimmed-mean"])
@pytest.mark.parametrize("attack", ["scaled", "random", "sign-flip", "nan", "silent"])
def test_five_of_eleven_slow_a_median_down_and_do_not_turn_it(train, given, attack):
    attacked = train(given, attack=attack, hostile=5, strength=1e6 if attack == "scaled" else None)
    assert attacked.accuracy > 0.55


@pytest.mark.parametrize("attack", ["scaled", "sign-flip"])
def test_five_of_eleven_do_not_outvote_the_others(train, attack):
    assert train(MAJORITY, attack=attack, hostile=5, **ONE_BIT).accuracy > 0.5


@pytest.mark.parametrize("attack", ["scaled", "random"])
def test_clipping_bounds_what_the_loud_can_do(train, attack):
    attacked = train(CLIP, attack=attack, hostile=3, strength=1e4)
    assert attacked.accuracy > train(CLIP).accuracy - CLOSE


def test_krum_without_attackers_refuses_honest_workers_too(train):
    result = train(KRUM)
    assert sum(result.refused.values()) == 6 * STEPS
    assert min(result.applied[rank] for rank in range(11)) > 0


def test_krum_refuses_each_loud_message_by_name(train):
    result = train(KRUM, attack="scaled", hostile=4)
    assert [result.refused[rank, "krum"] for rank in range(4)] == [STEPS] * 4


def test_with_error_feedback_krum_soon_hears_the_same_workers_for_ever(train):
    fed_back = KRUM[:-1]
    heard = train(fed_back).applied
    assert sum(count > 0.8 * STEPS for count in heard.values()) == 5
    assert len(heard) < 11
    assert train(fed_back, attack="sign-flip", hostile=4).accuracy < train(KRUM).accuracy - 0.1


def test_kardam_gives_refused_messages_back_and_still_learns(train):
    result = train(KARDAM, attack="scaled", hostile=3, **ONE_BY_ONE)
    honest = sum(count for (rank, _), count in result.refused.items() if rank >= 3)
    assert honest > ONE_BY_ONE["steps"]
    kinds = {kind for _, kind in result.refused}
    assert kinds == {"lipschitz", "frequency", "warm-up"}
    assert sum(result.applied[rank] for rank in range(3)) < 0.1 * sum(result.applied.values())


def test_a_round_that_too_many_are_absent_from_moves_nothing(train):
    result = train(("aggregate=trimmed-mean", "aggregate.f=2"), attack="silent", hostile=3)
    assert not result.applied
    assert {kind for _, kind in result.refused} == {"too-few"}

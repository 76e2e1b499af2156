"""How far a server's clock is, told by heartbeats over a link with delays."""

import random

import pytest

from psq.client.offset import MAX_UNANSWERED, ClockOffset, OffsetEstimate

SKEW_S = 1234.5


def ask(estimate, rng, now_s, *, up_s=0.001, jitter_s=0.05):
    """One heartbeat and its answer; returns when the answer came."""
    there_s = now_s + up_s + jitter_s * rng.random()
    got_s = there_s + up_s + jitter_s * rng.random()
    estimate.asked(now_s)
    estimate.answered(got_s, there_s + SKEW_S)
    return got_s


@pytest.mark.parametrize("seed", range(20))
def test_a_skewed_clock_is_found_within_half_the_shortest_round_trip(seed):
    rng, estimate, now_s = random.Random(seed), OffsetEstimate(), 0.0  # noqa: S311 - a test
    shortest_s = float("inf")
    for _ in range(50):
        before_s, now_s = now_s, ask(estimate, rng, now_s)
        shortest_s = min(shortest_s, now_s - before_s)
    assert estimate.best is not None
    assert estimate.best.round_trip_s == pytest.approx(shortest_s)
    assert abs(estimate.best.offset_s - SKEW_S) <= 0.5 * shortest_s + 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_answers_that_are_lost_or_unseen_or_late_never_break_the_bound(seed):
    rng, estimate = random.Random(seed), OffsetEstimate()  # noqa: S311 - a test
    now_s, under_way = 0.0, []
    for _ in range(300):
        now_s += rng.random()
        if rng.random() < 0.5:
            estimate.asked(now_s)
            if rng.random() < 0.8:  # else its answer is lost
                under_way.append(now_s + SKEW_S)
        elif under_way:
            clock_s = under_way.pop(0)
            if rng.random() < 0.3:
                estimate.unseen()
            else:
                estimate.answered(now_s, clock_s)
    assert estimate.best is not None
    assert abs(estimate.best.offset_s - SKEW_S) <= 0.5 * estimate.best.round_trip_s + 1e-9


def test_a_longer_round_trip_changes_nothing():
    estimate = OffsetEstimate()
    for sent_s, got_s, clock_s in ((0.0, 1.0, 10.5), (2.0, 5.0, 99.0), (6.0, 6.5, 16.25)):
        estimate.asked(sent_s)
        estimate.answered(got_s, clock_s)
    assert estimate.best == ClockOffset(10.0, 0.5)


def test_what_was_asked_on_a_connection_that_broke_is_forgotten():
    estimate = OffsetEstimate()
    estimate.asked(0.0)
    estimate.restart()
    estimate.asked(100.0)
    estimate.answered(101.0, 105.5)
    assert estimate.best == ClockOffset(5.0, 1.0)


def test_of_too_many_unanswered_heartbeats_the_oldest_give_no_sample():
    estimate = OffsetEstimate()
    for number in range(MAX_UNANSWERED + 1):
        estimate.asked(float(number))
    estimate.answered(1000.0, 0.0)
    assert estimate.best is None  # it answers a heartbeat that was forgotten
    estimate.answered(1000.0, 500.5)
    assert estimate.best == ClockOffset(0.0, 999.0)


def test_an_answer_to_nothing_gives_no_sample():
    estimate = OffsetEstimate()
    estimate.answered(1.0, 2.0)
    assert estimate.best is None

from __future__ import annotations

import pytest

from psq.clock import closes, may_step, members, reducible, staleness


@pytest.mark.parametrize(("step", "have", "behind"), [(3, 3, 0), (5, 3, 2), (3, 5, 0)])
def test_staleness_counts_the_rounds_that_the_weights_lack(step, have, behind):
    assert staleness(step, have) == behind


def test_a_synchronous_step_needs_the_newest_weights():
    assert may_step(4, 4)
    assert not may_step(5, 4)


def test_a_bound_lets_a_step_run_that_far_ahead():
    assert may_step(6, 4, max_staleness=2)
    assert not may_step(7, 4, max_staleness=2)


def test_every_rank_is_a_member_until_it_has_finished():
    assert members(3, finished=(), contributed=()) == (0, 1, 2)
    assert members(3, finished={1}, contributed=()) == (0, 2)


def test_what_a_finished_rank_has_said_still_counts():
    assert members(3, finished={1, 2}, contributed={1}) == (0, 1)


def test_a_round_closes_when_every_member_has_contributed():
    assert closes((0, 1), {0, 1, 2})
    assert not closes((0, 1), {0})


def test_a_round_without_members_never_closes():
    assert not closes((), ())


def test_a_shard_may_be_reduced_when_every_contributor_has_staged_it():
    staged = {0: {0, 1, 2}, 1: {2, 1}}
    assert reducible((0, 1), staged, range(3)) == (1, 2)
    assert reducible((0, 2), staged, range(3)) == ()


def test_nothing_to_sum_makes_every_shard_reducible():
    assert reducible((), {}, range(2)) == (0, 1)

"""How a step ended, put together from what several servers said of its contributions."""

from __future__ import annotations

from psq.client.round import Round, merge
from psq_proto.messages import Verdict


def told(number, version, outcome="applied", rejected=(), shards=(0, 1)):
    """A contribution computed from version `number`, and its verdict."""
    made = Round(number, 0.1, shards)
    for shard in shards:
        made.push(shard)
    made.take(Verdict(outcome=outcome, reason="", server_s=0.0, rejected=rejected), version)
    return made


def test_a_step_is_as_stale_as_the_stalest_of_what_counts():
    assert merge([told(3, 4)], 4).staleness == 0
    assert merge([told(3, 6), told(3, 5)], 5).staleness == 2


def test_what_does_not_count_is_not_stale():
    late = told(3, 9, outcome="rejected")
    refused = told(3, 9, rejected=(0, 1))
    assert merge([late, refused, told(3, 5)], 5).staleness == 1
    assert merge([late], 9).staleness == 0


def test_what_was_said_before_a_reset_does_not_go_back_into_a_residual():
    made = Round(3, 0.1, (0, 1))
    made.push(0)
    made.welcomed(5, is_reset=True)
    made.push(1)  # computed before, encoded from the new residual, and never sent
    assert (made.outcome, made.target, made.rejected()) == ("rejected", 5, [1])


def test_a_reset_after_the_verdict_changes_nothing_of_it():
    made = told(3, 4, rejected=(1,))
    made.welcomed(5, is_reset=True)
    assert (made.outcome, made.target, made.rejected()) == ("applied", 4, [1])

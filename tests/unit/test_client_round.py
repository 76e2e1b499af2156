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

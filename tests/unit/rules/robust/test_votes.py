"""Majority vote."""

from __future__ import annotations

import numpy as np
import pytest

from psq.errors import ConfigError, UsageError
from psq.rules.votes import Majority


def elect(bench, messages, weights=None):
    rule = Majority({}, layout=bench.layout, world_size=len(messages))
    out = np.empty(bench.shard.numel, np.float32)
    rule.combine(0, bench.said(messages, weights), out)
    return out


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7, 8, 33])
def test_the_vote_is_the_sign_of_the_sum_of_signs_and_a_tie_is_plus(bench, sign_spec, workers):
    messages = [bench.say(values, sign_spec) for values in bench.values(workers)]
    total = sum(np.sign(bench.decoded(said)) for said in messages)
    assert workers % 2 or (total == 0).any()
    np.testing.assert_array_equal(elect(bench, messages), np.where(total >= 0, 1.0, -1.0))


def test_weights_are_that_many_votes(bench):
    messages = [bench.say(values, "sign") for values in bench.values(4)]
    weights = [1, 5, 0, 3]
    total = sum(w * np.sign(bench.decoded(s)) for w, s in zip(weights, messages, strict=True))
    np.testing.assert_array_equal(elect(bench, messages, weights), np.where(total >= 0, 1, -1))
    assert (elect(bench, messages, weights) != elect(bench, messages)).any()


def test_whatever_size_a_worker_claims_it_has_one_vote(bench):
    honest = [bench.say(values, "sign") for values in np.abs(bench.values(2))]
    loud = bench.say(np.full(bench.shard.numel, -(2.0**50)), "sign")
    assert (elect(bench, [*honest, loud]) == 1.0).all()
    mean = np.mean([bench.decoded(said) for said in (*honest, loud)], axis=0)
    assert (mean < 0.0).all()


def test_payloads_of_different_blocks_vote_together(bench):
    specs = ("sign", "sign:block=256", "sign:block=0")
    messages = [bench.say(v, s) for v, s in zip(bench.values(3), specs, strict=True)]
    total = sum(np.sign(bench.decoded(said)) for said in messages)
    np.testing.assert_array_equal(elect(bench, messages), np.sign(total))


def test_a_codec_that_says_more_than_signs_is_refused(bench):
    with pytest.raises(ConfigError, match="counted on sign payloads"):
        elect(bench, [bench.say(bench.values(1)[0], "uniform:bits=4")])


@pytest.mark.parametrize("weight", [0.5, -1.0])
def test_a_weight_that_is_no_number_of_votes_is_refused(bench, weight):
    with pytest.raises(UsageError, match=r"rank 0 has .* votes"):
        elect(bench, [bench.say(bench.values(1)[0], "sign")], [weight])


def test_a_vote_without_voters_is_refused(bench):
    with pytest.raises(UsageError, match="nobody voted on shard 0"):
        elect(bench, [bench.say(bench.values(1)[0], "sign")], [0])

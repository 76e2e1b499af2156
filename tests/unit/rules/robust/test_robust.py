"""Median, trimmed mean, Krum, clipping: against their definitions on decoded values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from psq.errors import ConfigError
from psq.rules.base import Judgement
from psq.rules.robust import Clip, Krum, Median, TrimmedMean, _merge_exchange, _network


def table_of(bench, messages):
    return np.array([bench.decoded(said) for said in messages])


def combine(bench, rule, messages, weights=None):
    out = np.full(bench.shard.numel, np.nan, np.float32)
    rule.combine(0, bench.said(messages, weights), out)
    return out


def median_of(bench, messages):
    return combine(bench, Median({}, layout=bench.layout, world_size=len(messages)), messages)


def trimmed_of(bench, messages, f):
    rule = TrimmedMean({"f": f}, layout=bench.layout, world_size=len(messages))
    return combine(bench, rule, messages)


def make_krum(bench, world_size, f=1, m=1):
    return Krum({"f": f, "m": m}, layout=bench.layout, world_size=world_size)


def round_of(bench, values, spec="sign", **given):
    messages = {rank: {0: bench.say(v, spec)} for rank, v in enumerate(values)}
    return bench.round(messages, **given)


# ---- value by value ------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 5, 8])
def test_the_median_is_numpys_of_the_decoded_values(bench, spec, workers):
    messages = [bench.say(values, spec) for values in bench.values(workers)]
    expected = np.median(table_of(bench, messages), axis=0)
    np.testing.assert_array_equal(median_of(bench, messages), expected)


@pytest.mark.parametrize(("workers", "f"), [(1, 0), (3, 1), (5, 2), (8, 2), (11, 5)])
def test_the_trimmed_mean_is_the_mean_without_the_extremes(bench, spec, workers, f):
    messages = [bench.say(values, spec) for values in bench.values(workers)]
    kept = np.sort(table_of(bench, messages), axis=0)[f : workers - f]
    scale = np.abs(kept).max(axis=0) * 1e-6 + 1e-30
    off = np.abs(trimmed_of(bench, messages, f) - kept.astype(np.float64).mean(axis=0))
    assert (off <= scale).all()


def test_bits_do_not_depend_on_who_said_what(bench, spec):
    messages = [bench.say(values, spec) for values in bench.values(6)]
    median, trimmed = median_of(bench, messages), trimmed_of(bench, messages, 2)
    rng = np.random.default_rng(3)
    for _ in range(5):
        shuffled = [messages[i] for i in rng.permutation(len(messages))]
        assert median_of(bench, shuffled).tobytes() == median.tobytes()
        assert trimmed_of(bench, shuffled, 2).tobytes() == trimmed.tobytes()


def test_zeros_of_both_signs_have_one_median_whatever_their_order(bench):
    zero = bench.say(np.zeros(bench.shard.numel), "fp32")
    minus = bench.say(np.full(bench.shard.numel, -0.0), "fp32")
    seen = {
        median_of(bench, said).tobytes() for said in itertools.permutations((zero, minus, minus))
    }
    assert len(seen) == 1


@pytest.mark.parametrize("count", range(1, 12))
def test_the_network_sorts_every_input_of_zeros_and_ones(count):
    inputs = np.array(list(itertools.product((0, 1), repeat=count))).T.copy()
    for i, j in _merge_exchange(count):
        inputs[[i, j]] = np.sort(inputs[[i, j]], axis=0)
    assert (np.diff(inputs, axis=0) >= 0).all()


@pytest.mark.parametrize("count", [5, 8, 9])
def test_the_network_without_needless_comparisons_still_finds_its_places(count):
    low, high = (count - 1) // 2, count // 2
    inputs = np.array(list(itertools.product((0, 1), repeat=count))).T.copy()
    expected = np.sort(inputs, axis=0)[low : high + 1]
    for i, j in _network(count, low, high):
        inputs[[i, j]] = np.sort(inputs[[i, j]], axis=0)
    np.testing.assert_array_equal(inputs[low : high + 1], expected)
    assert len(_network(count, low, high)) < len(list(_merge_exchange(count)))


@pytest.mark.parametrize("loud", [1e9, -1e9])
def test_hostile_values_do_not_leave_the_honest_range(bench, loud):
    honest = bench.values(5)
    messages = [bench.say(v, "fp32") for v in (*honest, *np.full((2, bench.shard.numel), loud))]
    for result in (median_of(bench, messages), trimmed_of(bench, messages, 2)):
        assert (result >= honest.min(axis=0)).all()
        assert (result <= honest.max(axis=0)).all()
    assert (np.abs(table_of(bench, messages).mean(axis=0)) > 1e8).all()


def test_a_weight_that_a_worker_asks_for_changes_neither(bench):
    messages = [bench.say(values, "log:k=2") for values in bench.values(5)]
    for rule in (
        Median({}, layout=bench.layout, world_size=5),
        TrimmedMean({"f": 1}, layout=bench.layout, world_size=5),
    ):
        plain = combine(bench, rule, messages)
        np.testing.assert_array_equal(combine(bench, rule, messages, [1, 1, 9e9, 1, 1]), plain)


def test_trimming_needs_more_workers_than_it_leaves_out(bench):
    with pytest.raises(ConfigError, match="trimmed-mean with f=2 needs 5 workers or more, there a"):
        TrimmedMean({"f": 2}, layout=bench.layout, world_size=4)


def test_a_round_that_more_than_f_are_absent_from_is_not_trimmed_but_refused(bench):
    rule = TrimmedMean({"f": 1}, layout=bench.layout, world_size=4)
    verdicts = rule.judge(round_of(bench, bench.values(2)))
    assert set(verdicts) == {0, 1}
    for verdict in verdicts.values():
        assert verdict.refused.startswith("too-few: trimmed-mean with f=1 needs 3 messages of 4")
    assert set(rule.judge(round_of(bench, bench.values(3))).values()) == {Judgement()}


def test_the_absent_are_of_the_f_so_fewer_are_trimmed(bench):
    messages = [bench.say(values, "fp32") for values in bench.values(3)]
    rule = TrimmedMean({"f": 2}, layout=bench.layout, world_size=5)
    np.testing.assert_array_equal(combine(bench, rule, messages), median_of(bench, messages))


# ---- message by message --------------------------------------------------------------------------


def krum_by_definition(table, f):
    apart = ((table[:, None].astype(np.float64) - table) ** 2).sum(axis=2)
    return [np.sort(np.delete(row, i))[: len(table) - f - 2].sum() for i, row in enumerate(apart)]


@pytest.mark.parametrize(("workers", "f", "m"), [(3, 0, 1), (5, 1, 2), (9, 3, 1), (11, 2, 7)])
def test_krum_keeps_the_messages_with_the_smallest_scores(bench, spec, workers, f, m):
    view = round_of(bench, bench.values(workers), spec)
    verdicts = make_krum(bench, workers, f, m).judge(view)
    table = table_of(bench, [view.payload(rank, 0) for rank in view.ranks])
    best = np.argsort(krum_by_definition(table, f), kind="stable")[:m]
    assert {rank for rank, verdict in verdicts.items() if not verdict.refused} == set(best)
    assert set(verdicts) == set(range(workers))


def test_krum_looks_at_all_shards_together(make_bench):
    bench = make_bench(shards=2)
    near, far = bench.values(7), bench.values(7, seed=1)
    near[:2] *= 1.05  # a little farther than others in one shard, far away in the other
    far[:2] *= 30.0
    messages = {
        rank: {0: bench.say(near[rank], "fp32"), 1: bench.say(far[rank], "fp32", shard=1)}
        for rank in range(7)
    }
    verdicts = make_krum(bench, 7, f=2, m=3).judge(bench.round(messages))
    refused = {rank for rank, verdict in verdicts.items() if verdict.refused}
    assert {0, 1} <= refused


def test_krum_says_why(bench):
    values = bench.values(5)
    values[3] = 50.0
    verdicts = make_krum(bench, 5, f=1, m=2).judge(round_of(bench, values))
    assert verdicts[3].refused.startswith("krum: the message's score is ")
    assert "the 2 smallest of 5 are taken" in verdicts[3].refused


def test_equal_scores_go_to_the_lower_rank(bench):
    verdicts = make_krum(bench, 5).judge(round_of(bench, [bench.values(1)[0]] * 5))
    assert [rank for rank, verdict in verdicts.items() if not verdict.refused] == [0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("spec", ["sign", "log:k=2", "fp32"])
def test_krum_never_takes_what_is_not_finite(bench, spec, bad):
    values = bench.values(5)
    values[0, 5] = bad
    view = round_of(bench, values, spec)
    assert not np.isfinite(table_of(bench, [view.payload(0, 0)])).all()
    verdicts = make_krum(bench, 5, f=1, m=2).judge(view)
    assert verdicts[0].refused
    assert sum(not verdict.refused for verdict in verdicts.values()) == 2


def test_who_says_nothing_of_a_shard_is_compared_as_zeros(bench):
    values = np.full((5, bench.shard.numel), 3.0)
    view = round_of(bench, values)
    view.messages[4] = {}
    verdicts = make_krum(bench, 5, f=1, m=2).judge(view)
    assert verdicts[4].refused
    assert not verdicts[0].refused


@pytest.mark.parametrize(
    ("workers", "f", "m", "words"),
    [
        (4, 1, 1, "krum with f=1 needs 5 workers or more, there are 4"),
        (6, 2, 1, "krum with f=2 needs 7 workers or more, there are 6"),
        (7, 2, 4, "cannot choose m=4 of 7 workers: m is 1 to 3"),
        (7, 2, 0, "cannot choose m=0"),
        (7, -1, 1, "f=-1"),
    ],
)
def test_what_krum_cannot_promise_is_refused_in_words(bench, workers, f, m, words):
    with pytest.raises(ConfigError, match=words):
        make_krum(bench, workers, f, m)


def test_a_round_that_more_than_f_are_absent_from_is_refused_by_krum(bench):
    verdicts = make_krum(bench, 7, f=2).judge(round_of(bench, bench.values(4)))
    assert len(verdicts) == 4
    for verdict in verdicts.values():
        assert "too-few: krum with f=2 needs 5 messages of 7" in verdict.refused


def test_silence_of_the_f_does_not_stop_krum(bench):
    values = bench.values(5)
    verdicts = make_krum(bench, 7, f=2, m=3).judge(round_of(bench, values))
    assert sum(not verdict.refused for verdict in verdicts.values()) == 3


def test_krums_chosen_are_averaged_with_weights_of_one(bench):
    view = round_of(bench, bench.values(5), "log:k=2", weights={2: 1e6})
    verdicts = make_krum(bench, 5, f=1, m=2).judge(view)
    assert {verdict.weight for verdict in verdicts.values() if not verdict.refused} == {1.0}


def test_clipping_bounds_each_message_and_divides_by_their_number(bench, spec):
    values = bench.values(3)
    values[2] *= 1e4
    view = round_of(bench, values, spec)
    table = table_of(bench, [view.payload(rank, 0) for rank in view.ranks]).astype(np.float64)
    norms = np.sqrt((table**2).sum(axis=1))
    limit = float(norms[1])
    rule = Clip({"norm": limit}, layout=bench.layout, world_size=3)
    verdicts = rule.judge(view)
    weights = [verdicts[rank].weight for rank in view.ranks]
    np.testing.assert_allclose(weights, np.minimum(1.0, limit / norms), rtol=1e-4)
    result = combine(bench, rule, [view.payload(rank, 0) for rank in view.ranks], weights)
    expected = (table * np.minimum(1.0, limit / norms)[:, None]).mean(axis=0)
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert np.linalg.norm(result) <= limit * 1.001


def test_clipping_leaves_zeros_alone_and_refuses_what_has_no_norm(bench):
    values = np.zeros((2, bench.shard.numel))
    values[1, 0] = math.nan
    rule = Clip({"norm": 1.0}, layout=bench.layout, world_size=2)
    verdicts = rule.judge(round_of(bench, values))
    assert verdicts[0] == Judgement(1.0)
    assert verdicts[1].refused == "clip: the message's norm is nan: it cannot be clipped"


@pytest.mark.parametrize("norm", [0.0, -1.0, math.inf, math.nan])
def test_a_norm_that_clips_nothing_or_everything_is_refused(bench, norm):
    with pytest.raises(ConfigError, match="it must be finite and above 0"):
        Clip({"norm": norm}, layout=bench.layout, world_size=2)

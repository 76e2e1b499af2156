"""What is done on packed words equals the same thing done on decoded values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psq.codec import ShardCodec, get_codec
from psq.errors import ConfigError
from psq.rules.packed import SignPlanes, Votes, distances, write_signs


def signs(plane, shard):
    out = np.empty(shard.numel, np.float32)
    write_signs(plane, shard, out)
    return out


def spoil_padding(said):
    """Set every bit of a sign payload that stands for no value."""
    codec, payload = said
    real = np.zeros(codec.shard.numel, np.float32)  # 0 is said as +: no bit of a real value is set
    mask = np.zeros_like(payload)
    codec.encode(real - 1.0, mask)
    at = 0
    for segment in codec.shard.segments:
        head = 4 * codec.codec.format.scale_count(segment.numel)
        size = codec.codec.nbytes(segment.numel)
        words = slice(at + head, at + size)
        payload[words] |= ~mask[words]
        at += size


def test_a_plane_holds_the_signs_of_the_decoded_values(bench, sign_spec):
    said = bench.say(bench.values(1)[0], sign_spec)
    plane = SignPlanes(said[0]).plane(said[1])
    assert (signs(plane, bench.shard) == np.sign(bench.decoded(said))).all()


def test_padding_that_a_hostile_worker_sets_is_cleared(bench, sign_spec):
    said = bench.say(bench.values(1)[0], sign_spec)
    clean, before = SignPlanes(said[0]).plane(said[1]), said[1].copy()
    spoil_padding(said)
    assert (said[1] != before).any()
    np.testing.assert_array_equal(SignPlanes(said[0]).plane(said[1]), clean)


def test_scales_are_those_of_each_half_group(bench, sign_spec):
    said = bench.say(bench.values(1)[0], sign_spec)
    sizes, scales = np.abs(bench.decoded(said)), SignPlanes(said[0]).scales(said[1])
    at = unit = 0
    for numel in bench.numels:
        for start in range(0, numel, 256):
            assert scales[unit + start // 256] == sizes[at + start]
        at, unit = at + numel, unit + 2 * -(-numel // 512)
    assert unit == scales.size


def test_only_sign_payloads_have_planes(bench):
    with pytest.raises(ConfigError, match="counted on sign payloads, got codec 'log:k=6'"):
        SignPlanes(ShardCodec(get_codec("log:k=6"), bench.shard))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(0, 2**32))
def test_counts_over_a_threshold_are_exact(weights, seed):
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (len(weights), 128)).astype(np.uint8)
    votes = Votes()
    votes.add(np.packbits(np.ones(128, np.uint8), bitorder="little").view(np.uint64))
    for row, weight in zip(bits, weights, strict=True):
        votes.add(np.packbits(row, bitorder="little").view(np.uint64), weight)
    counts = 1 + np.asarray(weights) @ bits
    for threshold in (0, 1, 2, sum(weights) // 2, sum(weights), 3 * sum(weights) + 8):
        over = np.unpackbits(votes.over(threshold).view(np.uint8), bitorder="little")
        np.testing.assert_array_equal(over, counts > threshold)


def test_a_thousand_votes_are_counted_by_a_few_planes():
    votes = Votes()
    for index in range(1000):
        votes.add(np.full(2, index % 4 == 0, np.uint64))
    assert votes.over(249).tolist() == [1, 1]
    assert votes.over(250).tolist() == [0, 0]
    assert sum(len(kept) for kept in votes._digits) <= 20


def test_distances_are_those_of_the_decoded_values(bench, spec):
    messages = [bench.say(values, spec) for values in bench.values(5)]
    table = np.array([bench.decoded(said) for said in messages], np.float64)
    exact = ((table[:, None] - table) ** 2).sum(axis=2)
    np.testing.assert_allclose(distances(bench.shard, messages), exact, rtol=1e-4)


def test_distances_of_signs_ignore_padding_and_keep_what_nearly_cancels(bench, sign_spec):
    values = bench.values(1)[0]
    nearly = values.copy()
    nearly[0] = -nearly[0]
    messages = [bench.say(values, sign_spec), bench.say(nearly, sign_spec)]
    spoil_padding(messages[0])
    one, other = (bench.decoded(said).astype(np.float64) for said in messages)
    exact = ((one - other) ** 2).sum()
    assert exact > 0
    np.testing.assert_allclose(distances(bench.shard, messages)[0, 1], exact, rtol=1e-12)


def test_sign_codecs_of_different_blocks_are_compared_exactly(bench):
    specs = ("sign", "sign:block=256", "sign:block=0", "sign:block=512,norm=l2")
    messages = [bench.say(v, s) for v, s in zip(bench.values(4), specs, strict=True)]
    table = np.array([bench.decoded(said) for said in messages], np.float64)
    exact = ((table[:, None] - table) ** 2).sum(axis=2)
    np.testing.assert_allclose(distances(bench.shard, messages), exact, rtol=1e-12)


@pytest.mark.parametrize("other", ["log:k=2", "fp32"])
def test_a_codec_beside_signs_is_compared_too(bench, other):
    messages = [bench.say(v, s) for v, s in zip(bench.values(2), ("sign", other), strict=True)]
    table = np.array([bench.decoded(said) for said in messages], np.float64)
    exact = ((table[0] - table[1]) ** 2).sum()
    np.testing.assert_allclose(distances(bench.shard, messages)[0, 1], exact, rtol=1e-4)


def test_the_distance_to_nothing_is_the_norm(bench, spec):
    said = bench.say(bench.values(1)[0], spec)
    exact = (bench.decoded(said).astype(np.float64) ** 2).sum()
    np.testing.assert_allclose(distances(bench.shard, [None, said])[0, 1], exact, rtol=1e-4)

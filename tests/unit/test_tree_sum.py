"""An aggregator's arithmetic: piece by piece as if at once, and nothing is lost."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from psq.codec import ShardCodec, get_codec
from psq.errors import RemotePayloadError
from psq.plan import Plan
from psq.presets import preset
from psq.rules import Said
from psq_server.tree_pieces import PIECE_NUMEL, cuts
from psq_server.tree_sum import PartialSum

SPECS = [("long", (2 * PIECE_NUMEL + 5000,)), ("short", (40,)), ("even", (PIECE_NUMEL,))]
CODECS = [
    "sign",
    "sign:block=0",
    "log:k=2",
    "log:k=6,block=256",
    "uniform:bits=3,block=8192",
    "uniform:bits=8,block=0",
    "lloyd-max:bits=3",
    "topk:k=8",
    "bf16",
    "fp32",
]


def plan_of(uplink, specs=SPECS):
    return Plan.of(
        specs, preset("server-adam").with_codecs(uplink=uplink, downlink="delta:sign"), 4
    )


def noise(numel, seed):
    return np.random.default_rng(seed).normal(0, 0.1, numel).astype(np.float32)


def said_by(codec, vectors, weights=None):
    """What leaves say, and the vectors that this means."""
    messages, meant = [], []
    for rank, values in enumerate(vectors):
        payload = np.empty(codec.nbytes, np.uint8)
        codec.encode(values, payload, seed=rank)
        out = np.empty_like(values)
        codec.decode(payload, out)
        messages.append(Said(rank, codec, payload, 1.0 if weights is None else weights[rank]))
        meant.append(out)
    return messages, meant


def decoded(codec, payload):
    out = np.empty(codec.shard.numel, np.float32)
    codec.decode(payload, out)
    return out


@pytest.mark.parametrize("spec", CODECS)
def test_pieces_give_the_bits_that_whole_shards_would(spec):
    plan = plan_of(spec)
    sums = PartialSum(plan, 0)
    for shard in plan.owned:
        codec = ShardCodec(get_codec(spec), shard)
        residual = np.zeros(shard.numel, np.float32)
        for step in range(2):
            messages, meant = said_by(codec, [noise(shard.numel, 9 * step + i) for i in range(3)])
            payload = np.empty(codec.nbytes, np.uint8)
            assert sums.write(shard.index, messages, 0.1, codec, payload) == 3
            expected = np.empty(codec.nbytes, np.uint8)
            mean = ((meant[0] + meant[1]) + meant[2]) * np.float32(1 / 3)
            codec.encode_ef(mean, residual, expected)
            assert payload.tobytes() == expected.tobytes()
            assert sums.vector(shard.index).tobytes() == residual.tobytes()


def test_a_segment_that_is_longer_than_a_piece_is_cut_unless_one_scale_spans_it():
    assert [at.stop for at in cuts(get_codec("sign"), PIECE_NUMEL + 1)] == [
        PIECE_NUMEL,
        PIECE_NUMEL + 1,
    ]
    assert len(cuts(get_codec("sign:block=0"), PIECE_NUMEL + 1)) == 1
    assert len(cuts(get_codec("fp32"), PIECE_NUMEL + 1)) == 2


def test_no_vector_of_a_shard_is_made():
    plan = plan_of("log:k=2", [("long", (1 << 20,))])
    [shard] = plan.owned
    codec = ShardCodec(get_codec("log:k=2"), shard)
    messages, _ = said_by(codec, [noise(shard.numel, seed) for seed in range(2)])
    payload = np.empty(codec.nbytes, np.uint8)
    sums = PartialSum(plan, 0)
    sums.write(0, messages, 0.1, codec, payload)
    tracemalloc.start()
    sums.write(0, messages, 0.1, codec, payload)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4 * PIECE_NUMEL < 4 * shard.numel


def dyadic(numel, seed):
    """Small whole numbers, the largest of each block a power of two: log grids say them exactly."""
    values = np.random.default_rng(seed).choice([0.0, 2.0, 4.0, 8.0, -4.0, -8.0], numel)
    values[::256] = 8.0
    return values.astype(np.float32)


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (1, 3, 2, 2)])
def test_over_a_tree_what_leaves_said_is_what_the_root_took_and_what_is_left(weights):
    """Exactly: two levels, four leaves; weights change, a message is refused, leaves are silent."""
    spec = "log:k=2,block=256"
    plan = plan_of(spec, [("w", (1024,))])
    [shard] = plan.owned
    codec = ShardCodec(get_codec(spec), shard)
    lower, upper = [PartialSum(plan, 0), PartialSum(plan, 2)], PartialSum(plan, 0)
    said = np.zeros(shard.numel)
    applied = np.zeros(shard.numel)
    for step in range(4):
        now = [weight << (step == 2) for weight in weights]  # powers of two add up exactly
        leaves, meant = said_by(codec, [dyadic(shard.numel, 4 * step + i) for i in range(4)], now)
        spoke = leaves[:2], [] if step == 1 else leaves[2:]
        said += sum(
            one.weight * meant[one.rank].astype(np.float64) for each in spoke for one in each
        )
        messages = []
        for rank, (sums, mine) in enumerate(zip(lower, spoke, strict=True)):
            if not mine:
                continue
            payload = np.empty(codec.nbytes, np.uint8)
            weight = sums.write(0, mine, 0.1, codec, payload)
            messages.append(Said(2 * rank, codec, payload, weight))
        top = np.empty(codec.nbytes, np.uint8)
        weight = upper.write(0, messages, 0.1, codec, top)
        if step == 2:
            assert upper.restore(0, codec, top)  # the root refuses this one
        else:
            applied += weight * decoded(codec, top).astype(np.float64)
    left = sum(sums.weight(0) * sums.vector(0).astype(np.float64) for sums in (*lower, upper))
    assert np.abs(upper.vector(0)).max() > 0
    assert np.array_equal(said, applied + left)


def test_the_roots_mean_over_messages_is_the_mean_over_leaves():
    plan = plan_of("fp32", [("w", (3000,))])
    [shard] = plan.owned
    codec = ShardCodec(get_codec("fp32"), shard)
    values = [np.round(64 * noise(shard.numel, seed)) for seed in range(6)]
    leaves, _ = said_by(codec, values)
    means, weights = [], []
    for mine in (leaves[:4], leaves[4:]):
        payload = np.empty(codec.nbytes, np.uint8)
        weights.append(PartialSum(plan, mine[0].rank).write(0, mine, 0.1, codec, payload))
        means.append(decoded(codec, payload))
    assert weights == [4, 2]
    over_messages = (4 * means[0] + 2 * means[1]) / 6
    assert np.array_equal(over_messages, np.sum(values, axis=0, dtype=np.float32) / 6)


def test_a_residual_follows_the_weight_and_the_rate_of_its_message():
    plan = plan_of("sign", [("w", (512,))])
    [shard] = plan.owned
    codec = ShardCodec(get_codec("sign"), shard)
    payload = np.empty(codec.nbytes, np.uint8)
    zeros, _ = said_by(codec, [np.zeros(512, np.float32)] * 4)
    for rescales, factor in ((False, 2.0), (True, 8.0)):
        sums = PartialSum(plan, 0, rescales=rescales)
        some, _ = said_by(codec, [noise(512, seed) for seed in range(4)])
        sums.write(0, some, 0.4, codec, payload)
        before = sums.vector(0).copy()
        assert np.abs(before).max() > 0
        sums.write(0, zeros[:2], 0.1, codec, payload)
        after = sums.vector(0) + decoded(codec, payload)
        assert np.allclose(after, factor * before, rtol=1e-5, atol=1e-7)


def test_a_message_that_no_server_would_take_is_given_up():
    plan = plan_of("fp32", [("w", (512,))])
    [shard] = plan.owned
    codec = ShardCodec(get_codec("fp32"), shard)
    sums = PartialSum(plan, 0)
    sums.vector(0)[:] = 1.0
    assert not sums.restore(0, codec, np.full(512, 2.0**60, np.float32).view(np.uint8))
    assert not sums.vector(0).any()


def test_weights_that_no_message_can_bear_are_refused():
    plan = plan_of("fp32", [("w", (512,))])
    codec = ShardCodec(get_codec("fp32"), plan.owned[0])
    leaves, _ = said_by(codec, [noise(512, 0)] * 2, [2**32 - 1, 1])
    with pytest.raises(RemotePayloadError, match="add up to 4294967296"):
        PartialSum(plan, 0).write(0, leaves, 0.1, codec, np.empty(codec.nbytes, np.uint8))

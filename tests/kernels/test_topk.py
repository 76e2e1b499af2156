"""The topk codec: what it says, what it keeps, and what it takes from others, on every level."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psq import kernels
from psq.codec import ShardCodec, get_codec
from psq.codec.shard import MAX_SCALE
from psq.errors import RemotePayloadError
from psq.layout import Segment, Shard

LEVELS = kernels.available()
SHAPES = [f"topk:k={k},block={b}" for k, b in itertools.product((1, 4, 16, 128), (256, 1024, 8192))]
some = settings(max_examples=60, deadline=None)


def encode(name, spec, values, residual=None):
    codec = get_codec(spec)
    payload = np.full(codec.nbytes(values.size), 0xA5, np.uint8)
    with kernels.use(name):
        if residual is None:
            codec.encode(values, payload)
        else:
            codec.encode_ef(values, residual, payload)
    return payload


def decode(name, spec, payload, numel, base=None):
    out = np.full(numel, np.nan, np.float32) if base is None else base.copy()
    with kernels.use(name):
        (get_codec(spec).decode if base is None else get_codec(spec).decode_add)(payload, out)
    return out


def largest(block, k):
    """Places of the k largest magnitudes, the lower one of equals: the slow way."""
    order = sorted(range(block.size), key=lambda place: (-abs(block[place]), place))
    return sorted(order[:k])


@st.composite
def segments(draw, numel=None):
    """Any size and sparsity, many equal magnitudes, zeros of both signs."""
    numel = draw(st.integers(1, 3000)) if numel is None else numel
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.standard_normal(numel) * 2.0 ** draw(st.integers(-60, 60))
    if draw(st.booleans()):
        values = np.round(values / np.abs(values).max() * draw(st.integers(1, 9)))
    values[rng.random(numel) < draw(st.sampled_from([0, 0.5, 0.99, 1]))] *= 0
    return values.astype(np.float32)


def blocks(spec, values):
    block = get_codec(spec).format.block
    return [values[at : at + block] for at in range(0, values.size, block)]


@pytest.mark.parametrize("name", LEVELS)
@some
@given(values=segments(), spec=st.sampled_from(SHAPES))
def test_the_k_largest_of_each_block_are_said_as_their_mean_with_their_signs(name, values, spec):
    k = 1 << get_codec(spec).format.parameter
    said = decode(name, spec, encode(name, spec, values), values.size)
    for block, came in zip(blocks(spec, values), blocks(spec, said), strict=True):
        places = largest(block, k)
        mean = np.abs(block[places].astype(np.float64)).mean()
        others = np.delete(came, places)
        assert not others.any()
        np.testing.assert_allclose(abs(came[places]), mean, rtol=1e-5, atol=2.0**-100)
        np.testing.assert_array_equal(np.signbit(came[places]), np.signbit(block[places]))


@pytest.mark.parametrize("name", LEVELS)
@some
@given(values=segments(), spec=st.sampled_from(SHAPES), data=st.data())
def test_what_is_not_said_stays_in_the_residual(name, values, spec, data):
    before = data.draw(segments(values.size))
    residual = before.copy()
    payload = encode(name, spec, values, residual)
    c, said = values + before, decode(name, spec, payload, values.size)
    np.testing.assert_array_equal(residual, c - said)
    unsaid = said == 0
    np.testing.assert_array_equal(residual[unsaid], c[unsaid])


@pytest.mark.parametrize("name", LEVELS)
@some
@given(values=segments(), spec=st.sampled_from(SHAPES))
def test_each_block_loses_at_least_the_share_of_its_size_that_k_values_have(name, values, spec):
    """Contraction: |c - d|^2 <= |c|^2 - (sum of the k largest)^2 / k."""
    k = 1 << get_codec(spec).format.parameter
    said = decode(name, spec, encode(name, spec, values), values.size)
    for block, came in zip(blocks(spec, values), blocks(spec, said), strict=True):
        c = block.astype(np.float64)
        top = np.sort(abs(c))[::-1][:k]
        bound = (c**2).sum() - top.sum() ** 2 / top.size
        assert ((c - came) ** 2).sum() <= bound + 1e-5 * (c**2).sum()


@some
@given(values=segments(), spec=st.sampled_from(SHAPES), data=st.data())
def test_every_level_gives_the_same_bytes_each_time(values, spec, data):
    before = data.draw(segments(values.size))
    seen = set()
    for name in (*LEVELS, *LEVELS):
        residual = before.copy()
        payload = encode(name, spec, values, residual)
        base = decode(name, spec, payload, values.size, values)
        seen.add((payload.tobytes(), residual.tobytes(), base.tobytes()))
    assert len(seen) == 1


@some
@given(values=segments(), spec=st.sampled_from(SHAPES), data=st.data())
def test_every_level_leaves_the_same_bf16_residual(values, spec, data):
    before = (data.draw(segments(values.size)).view(np.uint32) >> 16).astype(np.uint16)
    seen = set()
    for name in LEVELS:
        residual = before.copy()
        payload = encode(name, spec, values, residual)
        seen.add((payload.tobytes(), residual.tobytes()))
    assert len(seen) == 1


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("spec", SHAPES)
def test_error_feedback_says_everything_in_time(name, spec):
    """What goes in is what was said plus what is still there, after any number of steps."""
    rng, total = np.random.default_rng(1), np.zeros(2500)
    residual, said = np.zeros(2500, np.float32), np.zeros(2500)
    for _ in range(20):
        values = rng.standard_normal(2500).astype(np.float32)
        total += values
        said += decode(name, spec, encode(name, spec, values, residual), 2500)
    np.testing.assert_allclose(said + residual, total, atol=1e-4)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("numel", [1, 2, 15, 16, 17, 127, 128, 129, 255, 257])
def test_a_short_block_says_as_many_values_as_it_has_in_a_payload_of_the_usual_size(name, numel):
    spec, values = "topk:k=128,block=256", np.arange(1, numel + 1, dtype=np.float32)
    payload = encode(name, spec, values)
    assert payload.size == -(-numel // 256) * (4 + 128 * 9 // 8)
    said = decode(name, spec, payload, numel)
    tail = numel % 256
    assert np.count_nonzero(said) == min(tail, 128) + (128 if numel > 256 else 0)
    used = (min(tail, 128) * 9 + 7) // 8
    assert not payload[payload.size - 128 * 9 // 8 + used :].any()
    get_codec(spec).check(payload, numel)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("zero", [0.0, -0.0, 2.0**-120])
def test_a_block_of_nothing_says_nothing_and_is_welcome(name, zero):
    values = np.full(1500, zero, np.float32)
    residual = np.zeros(1500, np.float32)
    payload = encode(name, "topk:k=4", values, residual)
    get_codec("topk:k=4").check(payload, 1500)
    assert not payload[:8].any()
    assert not decode(name, "topk:k=4", payload, 1500).any()
    np.testing.assert_array_equal(residual, values)


@pytest.mark.parametrize("name", LEVELS)
def test_adding_a_payload_leaves_alone_what_it_does_not_name(name):
    payload = encode(name, "topk:k=4", np.arange(1024, dtype=np.float32))
    base = np.full(1024, -0.0, np.float32)
    out = decode(name, "topk:k=4", payload, 1024, base)
    assert np.signbit(out[:1020]).all()
    assert (out[1020:] == 1021.5).all()


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_block_whose_sum_is_not_finite_is_marked_and_keeps_its_residual(name, bad):
    values, residual = np.ones(3000, np.float32), np.full(3000, 0.5, np.float32)
    values[1100:1103] = bad
    payload = encode(name, "topk:k=4", values, residual)
    assert np.isnan(payload[:12].view("<f4")).tolist() == [False, True, False]
    assert not payload[12 + 6 : 12 + 12].any()
    assert (residual[1024:2048] == 0.5).all()
    assert np.count_nonzero(residual != 1.5) == 1024 + 8
    with pytest.raises(RemotePayloadError, match="NaN or Inf"):
        get_codec("topk:k=4").check(payload, 3000)


def packed(entries, bits):
    stream = sum(entry << (bits * i) for i, entry in enumerate(entries))
    return stream.to_bytes(-(-len(entries) * bits // 8), "little")


ENTRIES = {
    "in order": ([1, 5, 9, 255], True),
    "in order, with signs": ([1 | 256, 5, 9 | 256, 255 | 256], True),
    "twice the same": ([1, 5, 5, 9], False),
    "downwards": ([1, 9, 5, 255], False),
    "the first not the lowest": ([7, 1, 9, 255], False),
    "all zero": ([0, 0, 0, 0], False),
}


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("case", ENTRIES)
def test_entries_out_of_order_are_refused_and_decode_to_those_in_order(name, case):
    entries, fits = ENTRIES[case]
    payload = np.float32(2).tobytes() + packed(entries, 9)
    codec, expected, first = get_codec("topk:k=4,block=256"), np.zeros(256, np.float32), 0
    for entry in entries:
        if entry % 256 >= first:
            expected[entry % 256] = -2 if entry > 255 else 2
            first = entry % 256 + 1
    np.testing.assert_array_equal(decode(name, codec.spec, payload, 256), expected)
    np.testing.assert_array_equal(decode(name, codec.spec, payload, 256, expected), 2 * expected)
    with kernels.use(name):
        if fits:
            codec.check(payload, 256)
            return
        with pytest.raises(RemotePayloadError, match="do not ascend within their blocks"):
            codec.check(payload, 256)


@pytest.mark.parametrize("name", LEVELS)
def test_an_entry_beyond_a_short_block_is_refused_and_touches_nothing(name):
    payload = np.float32(2).tobytes() + packed([1, 5, 9, 100], 9)
    out = np.zeros(256, np.float32)
    with kernels.use(name):
        codec = get_codec("topk:k=4,block=256")
        codec.decode(payload, out[:100])
        assert np.flatnonzero(out).tolist() == [1, 5, 9]
        with pytest.raises(RemotePayloadError, match="do not ascend"):
            codec.check(payload, 100)
        codec.check(payload, 101)


@pytest.mark.parametrize("name", LEVELS)
def test_only_a_topk_payload_is_asked_for_its_order(name):
    sign = get_codec("sign")
    with pytest.raises(ValueError, match="entries are those of topk"):
        kernels.get(name).topk_ascends(*sign.format, bytes(sign.nbytes(100)), 100)


def test_scales_are_found_in_segments_of_any_number_of_bytes():
    numels = (1000, 3, 2050)
    offsets = np.cumsum([0, *numels])
    parts = tuple(Segment(i, 0, n, int(offsets[i])) for i, n in enumerate(numels))
    shard = ShardCodec(get_codec("topk:k=1"), Shard(0, 0, int(offsets[-1]), parts))
    payload = np.zeros(shard.nbytes, np.uint8)
    shard.encode(np.repeat(np.float32([1, -2, 4]), numels), payload)
    assert shard.nbytes == 5 * (4 + 2)
    assert shard.scales(payload).tolist() == [1, 2, 4, 4, 4]
    shard.check(payload)
    shard.check_bound(payload)
    shard.encode(np.full(int(offsets[-1]), 2 * MAX_SCALE, np.float32), payload)
    with pytest.raises(RemotePayloadError, match="the limit is"):
        shard.check_bound(payload)


def test_four_of_a_thousand_values_cost_less_than_a_twelfth_of_a_bit():
    assert get_codec("topk:k=4").nbytes(1 << 20) * 8 / (1 << 20) < 1 / 12

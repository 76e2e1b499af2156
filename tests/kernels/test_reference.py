"""The NumPy definition against the formulas it states, written out the slow way."""

from __future__ import annotations

import numpy as np
import pytest

from psq.codec import get_codec
from psq.kernels import reference
from psq.kernels.quantizers import CENTROIDS, lowbias32


def encode(spec, values, residual=None, start=0):
    codec = get_codec(spec)
    values = np.asarray(values, np.float32)
    payload = np.zeros(codec.nbytes(values.size), np.uint8)
    reference.encode(*codec.format, values, residual, payload, start)
    return payload


def decode(spec, payload, numel):
    out = np.zeros(numel, np.float32)
    reference.decode(*get_codec(spec).format, payload, out, False)  # noqa: FBT003
    return out


def scales(spec, payload, numel):
    return payload[: 4 * get_codec(spec).format.scale_count(numel)].view("<f4")


def round_trip(spec, values):
    return decode(spec, encode(spec, values), len(values))


def test_value_16_j_plus_l_is_bit_j_of_word_lane_l():
    for at in (0, 1, 15, 16, 37, 511, 512, 600):
        values = np.ones(700, np.float32)
        values[at] = -1.0
        words = encode("sign", values)[4:].view("<u4").reshape(-1, 16)
        group, row, lane = at // 512, at % 512 // 16, at % 16
        assert words[group, lane] == 1 << row
        assert np.count_nonzero(words) == 1


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_lanes_words_are_one_stream_of_codes_least_bit_first(bits):
    largest = (1 << (bits - 1)) - 1
    for at in (0, 16, 10 * 16 + 3, 21 * 16 + 5, 31 * 16 + 15):
        values = np.zeros(512, np.float32)
        values[at] = -largest  # the step is 1
        words = encode(f"uniform:bits={bits}", values)[4:].view("<u4").reshape(bits, 16)
        stream = sum(int(word) << (32 * w) for w, word in enumerate(words[:, at % 16]))
        assert stream == ((1 << bits) - largest) << (bits * (at // 16))
        assert np.count_nonzero(words) == np.count_nonzero(words[:, at % 16])


def test_sixteen_lanes_then_halves_are_summed_in_the_stated_order(gradient):
    values = gradient(1000)
    lanes = [np.float32(0)] * 16
    for i, value in enumerate(values):
        lanes[i % 16] = np.float32(lanes[i % 16] + abs(value))
    for half in (8, 4, 2, 1):
        lanes = [np.float32(lanes[i] + lanes[i + half]) for i in range(half)]
    scale = scales("sign", encode("sign", values), 1000)
    assert scale.tolist() == [np.float32(lanes[0] / np.float32(1000))]


def test_a_whole_segment_adds_its_chunks_in_double(gradient):
    values = gradient(20_000)
    chunks = [values[at : at + 8192] for at in range(0, 20_000, 8192)]
    means = [scales("sign:block=8192", encode("sign:block=8192", c), c.size)[0] for c in chunks]
    expected = sum(float(m) * c.size for m, c in zip(means, chunks, strict=True)) / 20_000
    got = scales("sign:block=0", encode("sign:block=0", values), 20_000)
    assert got == pytest.approx([expected], rel=2e-7)


def test_a_short_block_is_divided_by_its_real_length():
    values = np.full(1024 + 700, 0.5, np.float32)
    for spec in ("sign", "sign:norm=l2", "sign:block=0"):
        assert set(scales(spec, encode(spec, values), values.size)) == {np.float32(0.5)}


@pytest.mark.parametrize("k", range(7))
def test_log_takes_the_nearest_power_of_two_ties_away_from_zero(k):
    rng = np.random.default_rng(k)
    ties = [0.75 * 2.0**-j for j in range(k)] + [2.0 ** -(k + 1)]
    values = np.array([1.0, *ties, *np.exp(-5 * rng.random(900)), 0.0], np.float32)
    values *= rng.choice([-3.0, 3.0], values.size)
    grid = 3.0 * np.array([0.0, *(2.0**-j for j in range(k, -1, -1))])
    distance = abs(abs(values.astype(np.float64))[:, None] - grid)
    nearest = grid[grid.size - 1 - distance[:, ::-1].argmin(axis=1)]  # the larger of two
    np.testing.assert_array_equal(abs(round_trip(f"log:k={k}", values)), nearest)
    assert not (round_trip(f"log:k={k}", values) * values < 0).any()


@pytest.mark.parametrize("k", range(7))
def test_log_has_as_many_bits_as_its_levels_need(k):
    assert get_codec(f"log:k={k}").bits == np.ceil(np.log2(2 * k + 3))


@pytest.mark.parametrize("bits", range(2, 9))
def test_uniform_takes_the_nearest_level(bits, rng):
    values = rng.uniform(-1, 1, 1000).astype(np.float32)
    step = float(scales(f"uniform:bits={bits}", encode(f"uniform:bits={bits}", values), 1000)[0])
    largest = (1 << (bits - 1)) - 1
    assert 0 <= step / (abs(values).max() / largest) - 1 < 2**-15
    expected = np.rint(values.astype(np.float64) / step) * step
    np.testing.assert_array_equal(round_trip(f"uniform:bits={bits}", values), expected)
    assert abs(expected).max() == largest * step


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_lloyd_max_takes_the_nearest_centroid_and_the_best_scale(bits, rng):
    values = rng.standard_normal(1024).astype(np.float32) * 7
    spec = f"lloyd-max:bits={bits}"
    got = round_trip(spec, values).astype(np.float64)
    points = CENTROIDS[bits].astype(np.float64)
    size = abs(values) / np.sqrt((values.astype(np.float64) ** 2).mean())
    q = points[abs(size[:, None] - points).argmin(axis=1)]
    best = (abs(values) * q).sum() / (q * q).sum()
    np.testing.assert_allclose(got, np.sign(values) * q * best, rtol=1e-5)
    error = ((got - values) ** 2).sum()
    for factor in (0.999, 1.001):
        assert ((got * factor - values) ** 2).sum() > error


def test_lloyd_max_does_not_count_padding(rng):
    values = rng.standard_normal(530).astype(np.float32)
    alone, longer = encode("lloyd-max:bits=2", values), np.zeros(1024, np.float32)
    longer[:530] = values
    ours = scales("lloyd-max:bits=2", alone, 530)
    assert ours > 1.2 * scales("lloyd-max:bits=2", encode("lloyd-max:bits=2", longer), 1024)


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1.0, 1.0),
        (1.0 + 2.0**-8, 1.0),  # a tie goes to the even neighbour
        (1.0 + 3 * 2.0**-8, 1.0 + 2.0**-6),
        (1.0 + 2.0**-8 + 2.0**-20, 1.0 + 2.0**-7),
        (-1.0 - 3 * 2.0**-8, -1.0 - 2.0**-6),
        (3.4e38, 3.3895313892515355e38),  # stays finite
        (1e-45, 0.0),
        (np.inf, np.inf),
        (-np.inf, -np.inf),
    ],
)
def test_bf16_rounds_to_the_nearest_even(value, rounded):
    assert round_trip("bf16", [value]) == [np.float32(rounded)]


def test_stochastic_rounds_up_as_often_as_the_fraction_says(rng):
    values = rng.uniform(-7, 7, 512).astype(np.float32)
    values[0] = 7.0  # the step is 1
    draws = np.array([decoded_at(values, start) for start in range(0, 2**32, 2**32 // 500)])
    assert set(np.unique(abs(draws - values) // 1)) <= {0.0}
    standard_error = 0.5 / np.sqrt(len(draws))
    assert abs(draws.mean(axis=0) - values).max() < 5 * standard_error


def decoded_at(values, start):
    return decode(
        "uniform:bits=4", encode("uniform:bits=4,stochastic=true", values, start=start), 512
    )


def test_stochastic_keeps_what_needs_no_rounding():
    values = np.resize(np.arange(-7, 8, dtype=np.float32), 512)
    np.testing.assert_array_equal(decoded_at(values, 99), values)


def test_the_hash_is_the_published_one():
    def in_python(x):
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    inputs = [0, 1, 2, 77, 0x80000000, 0xFFFFFFFF]
    expected = [in_python(x) for x in inputs]
    assert lowbias32(np.array(inputs, np.uint32)).tolist() == expected

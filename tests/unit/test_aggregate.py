from __future__ import annotations

import numpy as np
import pytest

from psq.aggregate import mean
from psq.codec import get_codec

NUMEL = 1500


def encoded(codec, *values):
    payloads = []
    for array in values:
        payload = np.empty(codec.nbytes(NUMEL), np.uint8)
        codec.encode(array, payload)
        payloads.append(payload)
    return payloads


def contributions(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(NUMEL, dtype=np.float32) for _ in range(count)]


def test_one_contribution_is_its_own_mean():
    (values,) = contributions(1)
    out = np.full(NUMEL, np.nan, np.float32)
    codec = get_codec("fp32")
    mean(codec, encoded(codec, values), out)
    assert out.tobytes() == values.tobytes()


@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_sum_is_taken_in_the_given_order_and_multiplied_by_the_rounded_inverse(count):
    arrays = contributions(count)
    expected = arrays[0].copy()
    for array in arrays[1:]:
        expected += array
    expected *= np.float32(1.0 / count)
    out, codec = np.empty(NUMEL, np.float32), get_codec("fp32")
    mean(codec, encoded(codec, *arrays), out)
    assert out.tobytes() == expected.tobytes()


def test_the_order_is_part_of_the_result():
    """1e8 + -1e8 + 1 keeps the 1, 1e8 + 1 + -1e8 loses it."""
    big, one = np.full(NUMEL, 1e8, np.float32), np.ones(NUMEL, np.float32)
    out, codec = np.empty(NUMEL, np.float32), get_codec("fp32")
    mean(codec, encoded(codec, big, -big, one), out)
    assert out.any()
    mean(codec, encoded(codec, big, one, -big), out)
    assert not out.any()


def test_quantized_contributions_are_averaged_as_they_decode():
    codec, arrays = get_codec("sign"), contributions(4)
    payloads = encoded(codec, *arrays)
    decoded = np.empty((4, NUMEL), np.float32)
    for payload, row in zip(payloads, decoded, strict=True):
        codec.decode(payload, row)
    out = np.empty(NUMEL, np.float32)
    mean(codec, payloads, out)
    np.testing.assert_allclose(out, decoded.mean(0), atol=1e-6)

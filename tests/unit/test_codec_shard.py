"""A codec over the segments of a shard."""

from __future__ import annotations

import numpy as np
import pytest

from psq.codec import MAX_SCALE, ShardCodec, codec_specs, get_codec
from psq.errors import RemotePayloadError, UsageError
from psq.layout import Segment, Shard

NUMELS = (700, 1, 512, 2049)
SPECS = ("sign", "uniform:bits=4,stochastic=true", "log:k=2,block=256", "bf16", "fp32")


@pytest.fixture(params=SPECS)
def shard(request):
    offsets = np.cumsum([0, *NUMELS])
    segments = tuple(
        Segment(tensor, 0, numel, int(offset))
        for tensor, (numel, offset) in enumerate(zip(NUMELS, offsets, strict=False))
    )
    return ShardCodec(get_codec(request.param), Shard(3, 10_000, int(offsets[-1]), segments))


def parts_of(flat):
    return np.split(flat, np.cumsum(NUMELS)[:-1])


def values(seed=0):
    return np.random.default_rng(seed).standard_normal(sum(NUMELS)).astype(np.float32)


def test_a_payload_is_the_payloads_of_the_segments_in_order(shard):
    payload = bytearray(shard.nbytes)
    shard.encode(values(), payload)
    at = 0
    for part in parts_of(values()):
        size = shard.codec.nbytes(part.size)
        if not shard.codec.stochastic:
            alone = bytearray(size)
            shard.codec.encode(part, alone)
            assert payload[at : at + size] == alone
        out, expected = np.zeros(part.size, np.float32), np.zeros(sum(NUMELS), np.float32)
        shard.codec.decode(payload[at : at + size], out)
        shard.decode(payload, expected)
        start = sum(NUMELS[: NUMELS.index(part.size)])
        np.testing.assert_array_equal(out, expected[start : start + part.size])
        at += size
    assert at == shard.nbytes


def test_flat_and_segmented_arrays_give_the_same_bytes(shard):
    flat, listed = np.zeros((2, shard.nbytes), np.uint8)
    residual, same = values(1), values(1)
    shard.encode_ef(values(), residual, flat, seed=4)
    copies = [part.copy() for part in parts_of(values())]
    shard.encode_segments(copies, same, listed, seed=4)
    np.testing.assert_array_equal(flat, listed)
    np.testing.assert_array_equal(residual, same)
    out, parts = values(2), [part.copy() for part in parts_of(values(2))]
    shard.decode_add(flat, out)
    shard.decode_add_segments(flat, parts)
    np.testing.assert_array_equal(np.concatenate(parts), out)
    shard.decode(flat, out)
    shard.decode_segments(flat, parts)
    np.testing.assert_array_equal(np.concatenate(parts), out)


def test_decoded_plus_residual_is_what_was_to_be_sent(shard):
    payload, residual, out = bytearray(shard.nbytes), values(1), np.zeros(sum(NUMELS), np.float32)
    shard.encode_ef(values(), residual, payload)
    shard.decode(payload, out)
    np.testing.assert_allclose(out + residual, values() + values(1), rtol=0, atol=1e-6)


def test_segments_draw_from_streams_of_their_own():
    segments = (Segment(0, 0, 512, 0), Segment(1, 0, 512, 512))
    codec = get_codec("uniform:bits=2,stochastic=true")
    shard = ShardCodec(codec, Shard(0, 0, 1024, segments))
    payload = np.zeros(shard.nbytes, np.uint8)
    shard.encode(np.resize(np.linspace(-1, 1, 512, dtype=np.float32), 1024), payload, seed=1)
    first, second = np.split(payload, 2)
    assert (first != second).any()


def test_wrong_lengths_of_ours_are_usage_errors(shard):
    payload, flat = bytearray(shard.nbytes), values()
    for short in (payload[:-1], payload + b"x", b""):
        with pytest.raises(UsageError, match="payload of shard 3 has"):
            shard.encode(flat, short)
        with pytest.raises(UsageError, match="payload of shard 3 has"):
            shard.decode(short, flat)
    for wrong in (flat[1:], np.zeros(0, np.float32)):
        for call in (
            lambda a: shard.encode(a, payload),
            lambda a: shard.encode_ef(a, flat, payload),
            lambda a: shard.encode_ef(flat, a, payload),
            lambda a: shard.decode(payload, a),
            lambda a: shard.decode_add(payload, a),
        ):
            with pytest.raises(UsageError, match=r"shard 3 has 3262 values"):
                call(wrong)


def test_segments_of_the_wrong_sizes_are_usage_errors(shard):
    parts = parts_of(values())
    for wrong in (parts[:-1], parts[::-1], [*parts, parts[0]], []):
        for call in (
            lambda a: shard.encode_segments(a, None, bytearray(shard.nbytes)),
            lambda a: shard.decode_segments(bytearray(shard.nbytes), a),
            lambda a: shard.decode_add_segments(bytearray(shard.nbytes), a),
        ):
            with pytest.raises(UsageError, match=r"segments of \[700, 1, 512, 2049\] values"):
                call(wrong)


def test_check_names_the_shard_and_the_tensor(shard):
    payload, flat = np.zeros(shard.nbytes, np.uint8), values()
    shard.encode(flat, payload)
    shard.check(payload)
    shard.check(payload.tobytes())
    with pytest.raises(RemotePayloadError, match=r"shard 3 .* must have \d+ bytes, got 7"):
        shard.check(bytes(7))
    flat[-1] = np.nan
    shard.encode(flat, payload)
    with pytest.raises(RemotePayloadError, match=r"shard 3, tensor 3: .* NaN or Inf"):
        shard.check(payload)


def test_a_payload_that_is_not_contiguous_is_refused(shard):
    with pytest.raises(TypeError):
        shard.encode(values(), np.zeros(2 * shard.nbytes, np.uint8)[::2])


@pytest.mark.parametrize("spec", codec_specs())
def test_what_is_within_the_bound_can_be_squared_and_one_beyond_it_is_refused(spec):
    shard = ShardCodec(get_codec(spec), Shard(3, 0, 600, (Segment(0, 0, 600, 0),)))
    payload, out = np.zeros(shard.nbytes, np.uint8), np.empty(600, np.float32)
    shard.encode(np.linspace(-1, 1, 600, dtype=np.float32), payload)
    shard.check_bound(payload)
    if shard.codec.format.scale_count(600):
        rng = np.random.default_rng(0)
        payload[:] = rng.integers(0, 256, shard.nbytes, np.uint8)
        scales = payload[: 4 * shard.codec.format.scale_count(600)].view("<f4")
        scales[:] = MAX_SCALE
        shard.check_bound(payload)
        shard.decode(payload, out)
        assert np.isfinite(np.square(out)).all()
        scales[-1] = -1.01 * MAX_SCALE
    else:
        shard.encode(np.full(600, -1.01 * MAX_SCALE, np.float32), payload)
    with pytest.raises(
        RemotePayloadError, match=r"shard 3 .* scale of 7.2.e\+16, the limit is 7.21"
    ):
        shard.check_bound(payload)


def test_the_scales_of_all_segments_are_found(shard):
    payload = np.zeros(shard.nbytes, np.uint8)
    shard.encode(np.repeat(np.float32([1, 2, 4, 8]), NUMELS), payload)
    scales = shard.scales(payload)
    counts = [shard.codec.format.scale_count(n) for n in NUMELS]
    if not any(counts):
        assert scales.max() == 8
        return
    largest = np.array([part.max() for part in np.split(scales, np.cumsum(counts)[:-1])])
    np.testing.assert_allclose(largest / largest[0], [1, 2, 4, 8])

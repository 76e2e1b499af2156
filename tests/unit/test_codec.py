"""Laws that hold for every codec, and the registry."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psq.codec import codec_of_wire_id, codec_specs, get_codec
from psq.codec.base import random_start
from psq.codec.registry import all_codecs
from psq.errors import ConfigError, RemotePayloadError

SPECS = (*codec_specs(), "sign:block=256", "log:k=2,block=0", "uniform:bits=3,block=512")
EXACT = tuple(s for s in SPECS if s.startswith(("log", "bf16", "fp32", "uniform")))
DETERMINISTIC = tuple(spec for spec in SPECS if "stochastic" not in spec)

every_codec = pytest.mark.parametrize("spec", SPECS)
some = settings(max_examples=25, deadline=None)


@st.composite
def segments(draw, numel=None):
    """Any length, scale and sparsity, with a few values of hypothesis's own choice."""
    numel = draw(st.integers(1, 1500)) if numel is None else numel
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.standard_normal(numel) * 2.0 ** draw(st.integers(-50, 50))
    values *= 2.0 ** (draw(st.sampled_from([0, 3, 10])) * rng.standard_normal(numel))
    values[rng.random(numel) < draw(st.sampled_from([0, 0, 0.5, 1]))] = 0
    chosen = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-60, 2.0**60, 0.75, 0.5, 1.5, 1 / 3])
    for at, value in draw(st.lists(st.tuples(st.integers(0, numel - 1), chosen), max_size=5)):
        values[at] = value
    return np.clip(values, -(2.0**60), 2.0**60).astype(np.float32)


def payload_of(codec, values, seed=0):
    payload = np.zeros(codec.nbytes(values.size), np.uint8)
    codec.encode(values, payload, seed=seed)
    return payload


def decoded(codec, payload, numel):
    out = np.full(numel, np.nan, np.float32)
    codec.decode(payload, out)
    return out


def gradient(numel, seed=0):
    rng = np.random.default_rng(seed)
    sizes = np.exp(2 * rng.standard_normal(numel // 64 + 1)).repeat(64)[:numel]
    return (rng.standard_normal(numel) * sizes).astype(np.float32)


# ---- laws ----------------------------------------------------------------------------------------


@every_codec
@some
@given(values=segments(), data=st.data())
def test_decoded_plus_residual_is_what_was_to_be_sent(spec, values, data):
    codec = get_codec(spec)
    residual = data.draw(segments(values.size))
    wanted = values + residual
    payload = np.zeros(codec.nbytes(values.size), np.uint8)
    codec.encode_ef(values, residual, payload, seed=5)
    d = decoded(codec, payload, values.size)
    if codec.stochastic or spec not in EXACT:
        # residual = c - d, rounded once: off by half a unit in the last place of c or d at most
        error = abs(d.astype(np.float64) + residual - wanted)
        assert (error <= 2.0**-24 * (abs(wanted) + abs(d))).all()
    else:
        np.testing.assert_array_equal(d.astype(np.float64) + residual, wanted)


@every_codec
@some
@given(values=segments())
def test_encoding_is_encoding_with_a_residual_of_zero(spec, values):
    codec, residual = get_codec(spec), np.zeros_like(values)
    payload = np.zeros(codec.nbytes(values.size), np.uint8)
    codec.encode_ef(values + np.float32(0), residual, payload, seed=9)
    np.testing.assert_array_equal(payload, payload_of(codec, values + np.float32(0), seed=9))


@pytest.mark.parametrize("spec", [spec for spec in DETERMINISTIC if "norm=l2" not in spec])
@some
@given(values=segments())
def test_what_is_left_is_never_more_than_what_was_there(spec, values):
    codec = get_codec(spec)
    c = values.astype(np.float64)
    rest = c - decoded(codec, payload_of(codec, values), values.size)
    assert (rest**2).sum() <= (c**2).sum() * (1 + 1e-5)


@some
@given(values=segments())
def test_sign_contracts_by_the_density_of_the_block(values):
    codec = get_codec("sign:block=0")
    c = values.astype(np.float64)
    rest = c - decoded(codec, payload_of(codec, values), values.size)
    bound = (c**2).sum() - abs(c).sum() ** 2 / c.size
    assert (rest**2).sum() <= bound + 1e-5 * (c**2).sum()


@some
@given(values=segments())
def test_sign_with_an_l2_scale_leaves_less_than_twice_what_was_there(values):
    codec = get_codec("sign:norm=l2,block=0")
    c = values.astype(np.float64)
    rest = c - decoded(codec, payload_of(codec, values), values.size)
    assert (rest**2).sum() <= 2 * (c**2).sum() * (1 + 1e-5)


@pytest.mark.parametrize("spec", [s for s in EXACT if "stochastic" not in s])
@some
@given(values=segments())
def test_a_decoded_segment_encodes_to_the_same_payload(spec, values):
    codec = get_codec(spec)
    payload = payload_of(codec, values)
    again = payload_of(codec, decoded(codec, payload, values.size))
    np.testing.assert_array_equal(again, payload)


def test_a_decoded_sign_segment_keeps_its_signs_and_nearly_its_scale():
    codec, values = get_codec("sign"), gradient(1500)
    payload = payload_of(codec, values)
    again = payload_of(codec, decoded(codec, payload, 1500))
    np.testing.assert_array_equal(again[8:], payload[8:])
    np.testing.assert_allclose(again[:8].view("<f4"), payload[:8].view("<f4"), rtol=1e-5)


@every_codec
def test_a_payload_has_exactly_the_bytes_it_says(spec):
    codec = get_codec(spec)
    for numel in (0, 1, 255, 511, 512, 513, 1023, 1024, 1025, 100_000):
        scales = codec.format.scale_count(numel)
        words = numel * 4 if spec == "fp32" else -(-numel // 512) * 64 * codec.bits
        if spec.startswith("topk"):
            words = scales * -(-int(spec.partition("=")[2]) * 11 // 8)  # 10 bits of place, a sign
        assert codec.nbytes(numel) == 4 * scales + words
        payload_of(codec, gradient(numel))  # writes that many, or raises
    assert codec.nbytes(0) == 0


@every_codec
def test_encode_writes_every_byte(spec):
    codec, values = get_codec(spec), gradient(700)
    one, other = (np.full(codec.nbytes(700), fill, np.uint8) for fill in (0, 255))
    codec.encode(values, one)
    codec.encode(values, other)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.startswith("topk")])
@pytest.mark.parametrize("numel", [1, 40, 552, 1030])
def test_equal_values_survive_whatever_the_padding(spec, numel):
    codec, values = get_codec(spec), np.full(numel, -0.3, np.float32)
    d = decoded(codec, payload_of(codec, values), numel)
    step = 1 / ((1 << (codec.bits - 1)) - 1) if codec.stochastic else 1e-4
    np.testing.assert_allclose(d, values, rtol=1e-2 if spec == "bf16" else step)


@every_codec
@pytest.mark.parametrize("zero", [0.0, -0.0, 2.0**-110, -(2.0**-149)])
def test_a_block_of_nothing_decodes_to_zero_and_stays_in_the_residual(spec, zero):
    codec = get_codec(spec)
    values, residual = np.full(1500, zero, np.float32), np.zeros(1500, np.float32)
    payload = np.zeros(codec.nbytes(1500), np.uint8)
    codec.encode_ef(values, residual, payload)
    codec.check(payload, 1500)
    d = decoded(codec, payload, 1500)
    if codec.format.scale_count(1):
        assert not d.any()
        assert not payload[: 4 * codec.format.scale_count(1500)].any()
    np.testing.assert_array_equal(d + residual, values)


@every_codec
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_block_that_is_not_finite_is_refused_and_leaves_its_residual_alone(spec, bad):
    codec, values, residual = get_codec(spec), gradient(2100), gradient(2100, seed=1)
    values[1030] = bad
    before = residual.copy()
    payload = np.zeros(codec.nbytes(2100), np.uint8)
    codec.encode_ef(values, residual, payload, seed=1)
    assert np.isfinite(residual).all()
    assert residual[1030] == before[1030]
    with pytest.raises(RemotePayloadError, match="NaN or Inf"):
        codec.check(payload, 2100)
    if codec.format.block == 1024:
        np.testing.assert_array_equal(residual[1024:2048], before[1024:2048])
        assert (residual[:1024] != before[:1024]).any()
        assert (residual[2048:] != before[2048:]).any()


@every_codec
@pytest.mark.parametrize("largest", [1.0, 1 - 2.0**-14, 1 - 2.0**-17])
def test_a_residual_stays_finite_up_to_the_largest_float32(spec, largest):
    """Each block is either said, with a finite value for each code, or refused and left alone."""
    codec, values = get_codec(spec), np.repeat(gradient(3), 700)
    values[::97] = np.float32(largest) * np.finfo(np.float32).max
    values[::194] *= -1
    residual, payload = np.zeros_like(values), np.zeros(codec.nbytes(values.size), np.uint8)
    codec.encode_ef(values, residual, payload, seed=5)
    assert np.isfinite(residual).all()
    said = decoded(codec, payload, values.size)
    assert not np.isinf(said).any()
    if codec.spec.startswith("uniform"):
        codec.check(payload, values.size)


@every_codec
def test_decode_add_adds_what_decode_writes(spec):
    codec, out = get_codec(spec), gradient(1500, seed=2)
    payload = payload_of(codec, gradient(1500))
    expected = out + decoded(codec, payload, 1500)
    codec.decode_add(payload, out)
    np.testing.assert_array_equal(out, expected)


@every_codec
@some
@given(data=st.data(), numel=st.integers(0, 1100))
def test_any_bytes_decode_and_are_checked_without_harm(spec, data, numel):
    codec = get_codec(spec)
    seed = data.draw(st.integers(0, 2**32 - 1))
    payload = np.random.default_rng(seed).bytes(codec.nbytes(numel))
    out = decoded(codec, payload, numel)
    codec.decode_add(payload, out)
    try:
        codec.check(payload, numel)
    except RemotePayloadError as error:
        wrong = ("NaN or Inf", "do not ascend")
        assert any(words in str(error) for words in wrong)  # noqa: PT017 - either outcome is right


@every_codec
def test_a_wrong_length_is_refused(spec):
    codec, out = get_codec(spec), np.zeros(600, np.float32)
    for length in (0, codec.nbytes(600) - 1, codec.nbytes(600) + 1):
        with pytest.raises(RemotePayloadError, match=rf"must have {codec.nbytes(600)} bytes"):
            codec.check(bytes(length), 600)
        with pytest.raises(ValueError, match="payload has"):
            codec.decode(bytes(length), out)
    assert not out.any()


# ---- randomness ----------------------------------------------------------------------------------

STOCHASTIC = tuple(spec for spec in codec_specs() if "stochastic" in spec)


@pytest.mark.parametrize("spec", STOCHASTIC)
def test_a_seed_replays_its_payload_and_another_does_not(spec):
    codec, values = get_codec(spec), gradient(3000)
    first = payload_of(codec, values, seed=2**63 + 1)
    np.testing.assert_array_equal(payload_of(codec, values, seed=2**63 + 1), first)
    for other in (0, 1, 2**63, 2**63 + 2):
        assert (payload_of(codec, values, seed=other) != first).any()


@pytest.mark.parametrize("spec", STOCHASTIC)
def test_stochastic_rounding_has_no_bias(spec):
    codec, values = get_codec(spec), np.linspace(-1, 1, 512, dtype=np.float32)
    draws = np.array([decoded(codec, payload_of(codec, values, s), 512) for s in range(1000)])
    step = 1 / ((1 << (codec.bits - 1)) - 1)
    assert abs(draws.mean(axis=0) - values).max() < 5 * step / 2 / np.sqrt(1000)
    assert abs((draws - values).mean()) < 5 * step / 2 / np.sqrt(1000 * 512)


def test_neighbouring_values_and_seeds_draw_independently():
    codec, values = get_codec(STOCHASTIC[0]), np.full(4096, 0.5, np.float32)
    values[::1024] = 1.0
    draws = np.array([decoded(codec, payload_of(codec, values, s), 4096) for s in range(64)]) - 0.5
    draws = draws[:, np.arange(4096) % 1024 > 0]
    for shifted in (
        np.roll(draws, 1, axis=0),
        np.roll(draws, 1, axis=1),
        np.roll(draws, 16, axis=1),
    ):
        assert abs((draws * shifted).mean()) < 0.25 * 5 / np.sqrt(draws.size)


def test_random_starts_of_small_seeds_are_spread():
    starts = np.array(sorted(random_start(seed) for seed in range(1000)))
    assert len(set(starts)) == 1000
    assert np.diff(starts).max() < 12 * 2**32 / 1000


# ---- registry ------------------------------------------------------------------------------------

WIRE_IDS = {
    "sign": 0x0131,
    "sign:norm=l2": 0x0132,
    "sign:block=0": 0x0101,
    "sign:block=8192": 0x0161,
    "log:k=0": 0x0230,
    "log:k=6": 0x0236,
    "log:k=6,block=256": 0x0216,
    "uniform:bits=2": 0x0332,
    "uniform:bits=8": 0x0338,
    "uniform:bits=4,stochastic=true": 0x0434,
    "lloyd-max:bits=1": 0x0531,
    "lloyd-max:bits=4,block=512": 0x0524,
    "bf16": 0x0600,
    "fp32": 0x0700,
    "topk:k=1": 0x0830,
    "topk:k=16": 0x0834,
    "topk:k=128,block=8192": 0x0867,
}


@pytest.mark.parametrize("spec", WIRE_IDS)
def test_wire_ids_are_what_they_always_were(spec):
    assert get_codec(spec).wire_id == WIRE_IDS[spec]


def test_every_codec_is_found_by_its_spec_and_its_wire_id():
    codecs = all_codecs()
    assert len({codec.wire_id for codec in codecs}) == len({c.spec for c in codecs}) == len(codecs)
    for codec in codecs:
        assert get_codec(codec.spec).wire_id == codec.wire_id
        assert codec_of_wire_id(codec.wire_id).spec == codec.spec
        assert 0 < codec.wire_id < 1 << 16
        assert codec.spec in repr(codec)


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("sign:block=1024", "sign"),
        ("sign:norm=l1", "sign"),
        ("sign:block=256,norm=l2", "sign:norm=l2,block=256"),
        ("log", "log:k=6"),
        ("uniform", "uniform:bits=4"),
        ("uniform:stochastic=true", "uniform:bits=4,stochastic=true"),
        ("uniform:stochastic=false,bits=8", "uniform:bits=8"),
        ("lloyd-max", "lloyd-max:bits=2"),
        ("topk", "topk:k=16"),
    ],
)
def test_a_spec_is_canonical_whatever_was_written(written, canonical):
    assert get_codec(written).spec == canonical


def test_the_same_text_gives_the_same_object():
    assert get_codec("sign") is get_codec("sign")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "no codec is called ''; there are sign, log, uniform, lloyd-max, bf16, fp32, topk"),
        ("Sign", "no codec is called 'Sign'"),
        ("sign:", "'sign' has no option ''; its options are norm, block"),
        ("sign:k=1", "'sign' has no option 'k'"),
        ("sign:block", "block cannot be ''; it is one of 0, 256, 512, 1024, 2048, 4096, 8192"),
        ("sign:block=1000", "block cannot be '1000'"),
        ("log:k=7", "k cannot be '7'; it is one of 0, 1, 2, 3, 4, 5, 6"),
        ("log:k=1,k=2", "option 'k' is given twice"),
        ("uniform:bits=9", "bits cannot be '9'; it is one of 2, 3, 4, 5, 6, 7, 8"),
        ("uniform:stochastic=yes", "stochastic cannot be 'yes'; it is one of false, true"),
        ("topk:k=3", "k cannot be '3'; it is one of 1, 2, 4, 8, 16, 32, 64, 128"),
        ("topk:block=0", "block cannot be '0'; it is one of 256, 512, 1024, 2048, 4096, 8192"),
        ("bf16:block=256", "'bf16' has no option 'block'; it has none"),
    ],
)
def test_a_wrong_spec_says_what_exists(spec, message):
    with pytest.raises(ConfigError) as caught:
        get_codec(spec)
    assert message in str(caught.value)


@pytest.mark.parametrize("wire_id", [0, 1, 0x0130, 0x0733, 0xFFFF])
def test_an_unknown_wire_id_is_the_peers_error(wire_id):
    with pytest.raises(RemotePayloadError, match="names no codec of this version"):
        codec_of_wire_id(wire_id)


def test_one_bit_a_value_is_at_least_28_times_smaller_than_float32():
    numel = 1 << 20
    assert 4 * numel / get_codec("sign").nbytes(numel) > 31

"""Codec kernels of every native level against the NumPy definition, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from psq import kernels
from psq.codec import get_codec
from psq.codec.registry import all_codecs
from psq.kernels import BLOCKS, Family, Format
from psq.kernels.quantizers import CENTROIDS, quantize_bf16
from psq.kernels.reference import _norm

NATIVE = [name for name in kernels.available() if name != kernels.REFERENCE]
SIZES = (0, 1, 15, 16, 17, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 3000, 9000)
SPECS = [codec.spec for codec in all_codecs()]
native = pytest.mark.skipif(not NATIVE, reason="this installation has no native level")
reference = kernels.get(kernels.REFERENCE)


@pytest.fixture(params=NATIVE)
def other(request):
    return kernels.get(request.param)


def encoded(level, form, values, residual, *, start=7, shift=0):  # noqa: PLR0913
    """Payload and new residual; `shift` bytes off any alignment."""
    payload = np.full(form.payload_bytes(values.size) + shift, 0xA5, np.uint8)[shift:]
    rest = None if residual is None else unaligned(residual, shift)
    level.encode(*form, unaligned(values, shift), rest, payload, start)
    return payload, rest


def unaligned(array, shift):
    raw = np.zeros(array.nbytes + shift, np.uint8)[shift:]
    raw[:] = array.view(np.uint8)
    return raw.view(np.float32)


def decoded(level, form, payload, base, *, add):
    out = base.copy()
    level.decode(*form, payload, out, add)
    return out


def assert_same_bits(level, form, values, residual, *, shift=0):
    ours, rest = encoded(level, form, values, residual, shift=shift)
    theirs, expected_rest = encoded(reference, form, values, residual)
    assert ours.tobytes() == theirs.tobytes()
    if residual is not None:
        assert rest.tobytes() == expected_rest.tobytes()
    base = np.linspace(-3, 3, values.size, dtype=np.float32)
    for add in (False, True):
        mine = decoded(level, form, ours, base, add=add)
        np.testing.assert_array_equal(mine, decoded(reference, form, theirs, base, add=add))


@native
@pytest.mark.parametrize("spec", SPECS)
def test_every_codec_gives_the_bits_of_the_reference_at_every_length(other, spec, gradient):
    form = get_codec(spec).format
    for numel in SIZES:
        values, residual = gradient(numel), gradient(numel) * np.float32(0.25)
        assert_same_bits(other, form, values, None)
        assert_same_bits(other, form, values, residual)


@native
@pytest.mark.parametrize("spec", SPECS)
def test_a_bf16_residual_gives_the_bits_of_the_reference_at_every_length(other, spec, gradient):
    form = get_codec(spec).format
    for numel in SIZES:
        values, residual = gradient(numel), halves(gradient(numel))
        payload, rest = np.empty(form.payload_bytes(numel), np.uint8), residual.copy()
        other.encode(*form, values, rest, payload, 7)
        expected_payload, expected_rest = np.empty_like(payload), residual.copy()
        reference.encode(*form, values, expected_rest, expected_payload, 7)
        assert payload.tobytes() == expected_payload.tobytes()
        assert rest.tobytes() == expected_rest.tobytes()


@native
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_bf16_residual_of_a_block_that_is_not_finite_stays(other, codec, bad, gradient):
    values, residual = gradient(1300), halves(gradient(1300))
    values[300] = bad
    rests = []
    for level in (other, reference):
        rest, payload = residual.copy(), np.empty(codec.nbytes(1300), np.uint8)
        level.encode(*codec.format, values, rest, payload, 7)
        rests.append(rest)
    assert rests[0].tobytes() == rests[1].tobytes()
    if bad != 3e38:
        assert rests[0][300] == residual[300]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("residual", ["none", "f32", "bf16"])
def test_norms_are_those_that_scales_are_made_from(level, block, largest, residual, gradient):
    form = get_codec(f"{'log:k=0' if largest else 'sign:norm=l2'},block={block}").format
    for numel in (0, 1, 255, 512, 1300, 20_000):
        values = gradient(numel)
        values[700:701] = np.nan
        rest = {"none": None, "f32": gradient(numel), "bf16": halves(gradient(numel))}[residual]
        payload, before = payload_of(form, numel), None if rest is None else rest.copy()
        out = np.empty(form.scale_count(numel), np.float32)
        level.block_norms(values, rest, block, largest, out)
        assert rest is None or rest.tobytes() == before.tobytes()
        reference.encode(*form, values, rest, payload, 0)
        assert out.tobytes() == payload[: 4 * out.size].tobytes()


def test_norms_of_what_does_not_fit_are_refused(level):
    values, out = np.ones(600, np.float32), np.empty(1, np.float32)
    with pytest.raises(ValueError, match="out has 1 elements, must have 3"):
        level.block_norms(values, None, 256, True, out)  # noqa: FBT003
    with pytest.raises(ValueError, match="there are no blocks of 100 values"):
        level.block_norms(values, None, 100, True, out)  # noqa: FBT003
    with pytest.raises(ValueError, match="residual has 599 elements"):
        level.block_norms(values, np.ones(599, np.float32), 1024, False, out)  # noqa: FBT003
    level.block_norms(frozen(values), frozen(values.copy()), 1024, False, out)  # noqa: FBT003
    assert out[0] == 2.0


def halves(values):
    """Upper halves of float32s: bf16, cut off."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def test_a_bf16_residual_is_what_f32_leaves_rounded_to_nearest(level, codec, gradient):
    values, residual = gradient(3000), halves(gradient(3000))
    wide = (residual.astype(np.uint32) << 16).view(np.float32)
    ours, theirs = (np.empty(codec.nbytes(3000), np.uint8) for _ in range(2))
    level.encode(*codec.format, values, residual, ours, 7)
    level.encode(*codec.format, values, wide, theirs, 7)
    assert ours.tobytes() == theirs.tobytes()
    assert residual.tobytes() == quantize_bf16(wide)[0].astype(np.uint16).tobytes()


def test_a_bf16_residual_of_another_length_or_layout_is_refused(level):
    form, payload = get_codec("sign").format, np.zeros(132, np.uint8)
    values = np.ones(600, np.float32)
    with pytest.raises(ValueError, match="residual has 599 elements"):
        level.encode(*form, values, np.zeros(599, np.uint16), payload, 0)
    for wrong in (np.zeros((2, 300), np.uint16), frozen(np.zeros(600, np.uint16))):
        with pytest.raises(TypeError, match="residual must be a writable, C-contiguous 1-D uint16"):
            level.encode(*form, values, wrong, payload, 0)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("residual", ["none", "f32", "bf16"])
def test_clearing_zeroes_what_is_finite_and_changes_nothing_else(level, spec, residual, gradient):
    form = get_codec(spec).format
    for numel in (0, 1, 513, 3000, 9001):
        values = gradient(numel)
        values[2000:2001] = np.nan
        values[numel // 2 : numel // 2 + 1] = -np.inf
        rest = {"none": None, "f32": gradient(numel), "bf16": halves(gradient(numel))}[residual]
        expected_rest = None if rest is None else rest.copy()
        came, expected, cleared = payload_of(form, numel), payload_of(form, numel), values.copy()
        level.encode(*form, values, expected_rest, expected, 7)
        level.encode(*form, cleared, rest, came, 7, True)  # noqa: FBT003
        assert came.tobytes() == expected.tobytes()
        assert rest is None or rest.tobytes() == expected_rest.tobytes()
        kept = np.where(np.isfinite(values), np.float32(0.0), values)
        assert cleared.tobytes() == kept.tobytes()


def payload_of(form, numel):
    return np.full(form.payload_bytes(numel), 0xA5, np.uint8)


def test_only_what_can_be_written_is_cleared(level):
    form, values = get_codec("sign").format, frozen(np.ones(600, np.float32))
    with pytest.raises(TypeError, match="values must be a writable, C-contiguous 1-D float32"):
        level.encode(*form, values, None, payload_of(form, 600), 0, True)  # noqa: FBT003


@native
def test_any_alignment_gives_the_same_bits(other, codec, gradient):
    values, residual = gradient(1300), gradient(1300)
    for shift in (1, 2, 3, 4, 20):
        assert_same_bits(other, codec.format, values, residual, shift=shift)


@native
@pytest.mark.parametrize("block", [0, 256, 1024])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, np.finfo(np.float32).max])
def test_a_block_that_is_not_finite_gives_the_same_bits(other, codec, block, bad, gradient):
    form = codec.format._replace(block=block)
    form = form if form.is_known else codec.format  # bf16 and fp32 have no blocks
    for at in (0, 300, 1290):
        values = gradient(1300)
        values[at : at + 3] = bad
        assert_same_bits(other, form, values, gradient(1300))
        assert_same_bits(other, form, values, None)


@native
@pytest.mark.parametrize(
    "exponent", [-149, -140, -126, -120, -107, -103, -101, -100, -99, -63, -60, 0, 60, 63, 100, 126]
)
def test_values_of_any_size_give_the_same_bits(other, codec, exponent, rng):
    values = (rng.standard_normal(1100) * 2.0**exponent).astype(np.float32)
    assert_same_bits(other, codec.format, values, values[::-1].copy())


@native
@settings(deadline=None)
@given(
    values=arrays.arrays(np.float32, st.integers(0, 60), elements=st.floats(width=32)),
    numel=st.integers(0, 700),
    spec=st.sampled_from(SPECS),
    name=st.sampled_from(NATIVE or ["none"]),
    start=st.integers(0, 2**32 - 1),
)
def test_any_floats_at_all_give_the_same_bits(values, numel, spec, name, start):
    values = np.resize(values, numel)
    form, level = get_codec(spec).format, kernels.get(name)
    for residual in (None, values[::-1].copy()):
        ours, rest = encoded(level, form, values, residual, start=start)
        theirs, expected = encoded(reference, form, values, residual, start=start)
        assert ours.tobytes() == theirs.tobytes()
        if residual is not None:
            assert rest.tobytes() == expected.tobytes()


@native
@settings(deadline=None)
@given(data=st.data(), spec=st.sampled_from(SPECS), numel=st.integers(0, 1100))
def test_any_bytes_of_the_right_length_decode_alike_everywhere(data, spec, numel):
    form = get_codec(spec).format
    seed = data.draw(st.integers(0, 2**32 - 1))
    payload = np.random.default_rng(seed).bytes(form.payload_bytes(numel))
    base = np.ones(numel, np.float32)
    finite = {
        kernels.get(name).payload_finite(*form, payload, numel) for name in kernels.available()
    }
    assert len(finite) == 1
    for name in NATIVE:
        for add in (False, True):
            np.testing.assert_array_equal(
                decoded(kernels.get(name), form, payload, base, add=add),
                decoded(reference, form, payload, base, add=add),
            )


@native
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_value_halfway_between_two_centroids_takes_the_outer_one_on_every_level(other, bits):
    form = get_codec(f"lloyd-max:bits={bits},block=256").format
    points = CENTROIDS[bits]
    for level, halfway in enumerate((points[:-1] + points[1:]) * np.float32(0.5)):
        values = of_norm_one(form, halfway)
        payload, _ = encoded(reference, form, values, None)
        came = decoded(other, form, payload, np.zeros_like(values), add=False)
        assert came[0] == points[level + 1] * payload[:4].view(np.float32)[0]
        assert_same_bits(other, form, values, None)


def of_norm_one(form, value):
    """A block that begins with this value and whose root mean square is 1 to the last bit."""
    values = np.zeros(256, np.float32)
    values[:3] = value, 15, np.sqrt(256 - 15**2 - np.float64(value) ** 2)
    assert _norm(values, form) == 1
    return values


@native
@pytest.mark.parametrize("spec", ["sign", "sign:norm=l2", "lloyd-max:bits=2", "log:k=2"])
def test_a_segment_of_many_chunks_under_one_scale_gives_the_same_bits(other, spec, gradient):
    form = get_codec(spec).format._replace(block=0)
    for numel in (5 * 8192 + 3, 21 * 8192):
        assert_same_bits(other, form, gradient(numel), gradient(numel))


@pytest.mark.parametrize("numel", [2**40, 2**62, 2**63, 2**64 - 1])
def test_a_number_of_values_whose_bytes_would_overflow_is_refused(level, codec, numel):
    with pytest.raises(ValueError, match="payload"):
        level.payload_finite(*codec.format, b"", numel)


def test_a_finite_check_sees_one_bad_value_anywhere(level):
    for numel in (1, 15, 16, 17, 8192, 8193, 20_000):
        values = np.full(numel, -3e38, np.float32)
        assert level.all_finite(values)
        for at in {0, numel // 2, numel - 1}:
            for bad in (np.nan, np.inf, -np.inf):
                values[at] = bad
                assert not level.all_finite(values)
            values[at] = 0
    assert level.all_finite(np.zeros(0, np.float32))


WRONG_ARGUMENTS = {
    "float64 values": (lambda a: a | {"values": a["values"].astype(np.float64)}, TypeError),
    "2-D values": (lambda a: a | {"values": a["values"].reshape(2, -1)}, TypeError),
    "strided values": (lambda a: a | {"values": np.zeros(1200, np.float32)[::2]}, TypeError),
    "a list": (lambda a: a | {"values": [1.0]}, TypeError),
    "no values": (lambda a: a | {"values": None}, TypeError),
    "short residual": (lambda a: a | {"residual": a["residual"][1:]}, ValueError),
    "float64 residual": (lambda a: a | {"residual": np.zeros(600)}, TypeError),
    "read-only residual": (lambda a: a | {"residual": frozen(a["residual"])}, TypeError),
    "short payload": (lambda a: a | {"payload": a["payload"][1:]}, ValueError),
    "long payload": (lambda a: a | {"payload": np.zeros(9999, np.uint8)}, ValueError),
    "read-only payload": (lambda a: a | {"payload": bytes(a["payload"])}, TypeError),
    "float payload": (lambda a: a | {"payload": a["payload"].view(np.float32)}, TypeError),
}


def frozen(array):
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("wrong", WRONG_ARGUMENTS)
def test_a_wrong_argument_is_refused_by_name_before_anything_is_written(level, wrong):
    change, error = WRONG_ARGUMENTS[wrong]
    form = get_codec("sign").format
    usual = {
        "values": np.ones(600, np.float32),
        "residual": np.zeros(600, np.float32),
        "payload": np.zeros(form.payload_bytes(600), np.uint8),
    }
    with pytest.raises(error, match=r"values|residual|payload"):
        level.encode(*form, *change(usual).values(), 0)
    assert not usual["payload"].any()
    assert not usual["residual"].any()


@pytest.mark.parametrize(
    "form",
    [
        Format(0, 1, 1, 1024),
        Format(99, 1, 1, 1024),
        Format(Family.SIGN, 1, 3, 1024),
        Format(Family.SIGN, 2, 1, 1024),
        Format(Family.SIGN, 1, 1, 100),
        Format(Family.SIGN, 1, 1, 16384),
        Format(Family.LOG, 4, 7, 1024),
        Format(Family.LOG, 3, 3, 1024),
        Format(Family.LOG, 5, 0, 1024),
        Format(Family.UNIFORM, 1, 0, 1024),
        Format(Family.UNIFORM, 9, 0, 1024),
        Format(Family.STOCHASTIC, 4, 1, 1024),
        Format(Family.LLOYD_MAX, 5, 0, 1024),
        Format(Family.BF16, 16, 0, 1024),
        Format(Family.FP32, 16, 0, 0),
    ],
)
def test_an_unknown_format_is_refused(level, form):
    assert not form.is_known
    with pytest.raises(ValueError, match="no format of family"):
        level.encode(*form, np.zeros(1, np.float32), None, bytearray(4096), 0)
    with pytest.raises(ValueError, match="no format of family"):
        level.decode(*form, bytearray(4096), np.zeros(1, np.float32), False)  # noqa: FBT003
    with pytest.raises(ValueError, match="no format of family"):
        level.payload_finite(*form, bytearray(4096), 1)


def test_native_and_reference_know_the_same_formats(level):
    for family in range(9):
        for bits in (0, 1, 2, 3, 4, 5, 8, 16, 32):
            for parameter in range(-1, 16):
                form = Format(family, bits, parameter, 0)
                assert form.is_known == accepts(level, form), form
    for block in range(0, 20_000, 64):
        form = Format(Family.SIGN, 1, 1, block)
        assert (block in BLOCKS) == form.is_known == accepts(level, form)


def accepts(level, form):
    try:
        level.encode(*form, np.zeros(0, np.float32), None, bytearray(0), 0)
    except ValueError:
        return False
    return True


def test_payloads_may_be_any_buffer_of_bytes(level):
    form = get_codec("uniform:bits=3").format
    values, out = np.linspace(-1, 1, 700, dtype=np.float32), np.zeros(700, np.float32)
    payload = bytearray(form.payload_bytes(700) + 3)
    level.encode(*form, values, None, memoryview(payload)[3:], 0)
    expected = np.zeros(form.payload_bytes(700), np.uint8)
    reference.encode(*form, values, None, expected, 0)
    assert bytes(payload[3:]) == expected.tobytes()
    for buffer in (bytes(payload[3:]), memoryview(payload)[3:].toreadonly(), expected):
        level.decode(*form, buffer, out, False)  # noqa: FBT003
        assert abs(out - values).max() < 0.2

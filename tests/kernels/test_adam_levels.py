"""Adam on every native level this machine has, against the NumPy definition, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from psq import kernels
from psq.kernels import AdamCoefficients, CorrectionCoefficients

NATIVE = [name for name in kernels.available() if name != kernels.REFERENCE]
SIZES = (0, 1, 15, 16, 17, 511, 4099)


def f32(value):
    return float(np.float32(value))


def coefficients(**changes):
    usual = {
        "m_weight": f32(0.1),
        "theta": f32(0.999),
        "theta_rest": f32(0.001),
        "step_size": f32(2e-3),
        "root": f32(0.3),
        "eps_inside": 0.0,
        "eps_outside": f32(1e-8),
        "l2": 0.0,
        "decay": 0.0,
    }
    return AdamCoefficients(**(usual | changes))


def correction(**changes):
    usual = {
        "m_scale": f32(2.0),
        "v_scale": f32(11.0),
        "noise_ratio": f32(0.2),
        "signal_scale": f32(1.25),
        "update_s": 1.0,
        "s_scale": f32(30.0),
        "own_share": f32(1 / 3),
        "mean_share": f32(2 / 3),
    }
    return CorrectionCoefficients(**(usual | changes))


def vectors(numel, seed=0):
    """g, m, v, third, x: many decades, zeros, and values whose squares leave float32."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.uniform(-40, 20, (5, numel)))
    arrays = (rng.standard_normal((5, numel)) * scale).astype(np.float32)
    arrays[:, ::7] = 0.0
    arrays[0, 3::101] = 3e38
    arrays[0, 4::103] = 1e-45
    arrays[2:4] = np.abs(arrays[2:4])
    return [array.copy() for array in arrays]


def run(level, mode, numel, numbers, extra):
    g, m, v, third, x = vectors(numel)
    out = np.full(numel, np.nan, np.float32)
    level = kernels.get(level)
    weights = x if numbers.l2 or numbers.decay else None
    if mode == "corrected":
        level.adam_update_corrected(g, m, v, third, out, numbers, extra, x=weights)
    else:
        vmax = third if mode == "amsgrad" else None
        level.adam_update(g, m, v, out, numbers, vmax=vmax, x=weights)
    return [array.tobytes() for array in (m, v, third, out)]


NUMBERS = {
    "torch": coefficients(),
    "from-g": coefficients(m_weight=f32(-0.3)),
    "no-momentum": coefficients(m_weight=0.0),
    "eps-inside": coefficients(eps_inside=f32(1e-8), eps_outside=0.0),
    "no-eps": coefficients(eps_outside=0.0),
    "l2": coefficients(l2=f32(0.1)),
    "decay": coefficients(decay=f32(1e-5)),
}


@pytest.mark.parametrize("level", NATIVE)
@pytest.mark.parametrize("mode", ["plain", "amsgrad", "corrected"])
@pytest.mark.parametrize("numbers", NUMBERS)
def test_a_level_has_the_bits_of_the_definition(level, mode, numbers):
    for numel in SIZES:
        expected = run("reference", mode, numel, NUMBERS[numbers], correction())
        assert run(level, mode, numel, NUMBERS[numbers], correction()) == expected


@pytest.mark.parametrize("level", NATIVE)
def test_a_level_leaves_s_alone_until_the_correction_starts(level):
    early = correction(update_s=0.0)
    expected = run("reference", "corrected", 100, coefficients(), early)
    came = run(level, "corrected", 100, coefficients(), early)
    assert came == expected
    assert came[2] == vectors(100)[3].tobytes()


@pytest.mark.parametrize("level", kernels.available())
def test_the_direction_may_overwrite_the_gradient(level):
    g, m, v, _, _ = vectors(100)
    apart = run(level, "plain", 100, coefficients(), None)[3]
    kernels.get(level).adam_update(g, m, v, g, coefficients())
    assert g.tobytes() == apart


@pytest.mark.parametrize("level", NATIVE)
def test_unaligned_vectors_are_welcome(level):
    g, m, v, _, _ = vectors(100)
    raw = np.zeros(4 * 100 + 1, np.uint8)
    odd = np.frombuffer(raw.data[1:], np.float32)
    odd[:] = g
    out = np.empty(100, np.float32)
    kernels.get(level).adam_update(odd, m, v, out, coefficients())
    assert out.tobytes() == run("reference", "plain", 100, coefficients(), None)[3]


@pytest.mark.parametrize("level", NATIVE)
def test_a_vector_of_another_length_is_named(level):
    g, m, v, _, x = vectors(100)
    kernel = kernels.get(level).adam_update
    with pytest.raises(ValueError, match=r"v has 99 elements, must have 100: one for each of g"):
        kernel(g, m, v[:99], g, coefficients())
    with pytest.raises(ValueError, match=r"x has 1 elements"):
        kernel(g, m, v, g, coefficients(), x=x[:1])


@pytest.mark.parametrize("level", NATIVE)
def test_what_is_no_float32_vector_is_named(level):
    g, m, v, third, _ = vectors(100)
    kernel = kernels.get(level)
    with pytest.raises(TypeError, match="m must be a writable, C-contiguous 1-D float32 array"):
        kernel.adam_update(g, m.astype(np.float64), v, g, coefficients())
    third.flags.writeable = False
    with pytest.raises(TypeError, match="vmax must be a writable"):
        kernel.adam_update(g, m, v, g, coefficients(), vmax=third)
    with pytest.raises(TypeError, match="s must be a writable"):
        kernel.adam_update_corrected(g, m, v, third, g, coefficients(), correction())


@pytest.mark.parametrize("level", NATIVE)
def test_a_tuple_that_is_not_the_coefficients_is_refused(level):
    g, m, v, _, _ = vectors(100)
    with pytest.raises(ValueError, match="coefficients has 2 numbers, must have 9"):
        kernels.get(level).adam_update(g, m, v, g, (0.1, 0.9))

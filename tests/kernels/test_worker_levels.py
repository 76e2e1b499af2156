"""A worker's fused push on every level, against the passes that define it."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from psq import kernels
from psq.codec import get_codec
from psq.kernels import AdamCoefficients, Blend, CorrectionCoefficients, WorkerStep
from psq.kernels.reference_worker import absorb, compose, rescale

NATIVE = [name for name in kernels.available() if name != kernels.REFERENCE]
SEGMENTS = (5000, 1, 512, 2048, 77)
TOTAL = sum(SEGMENTS)
SPECS = (
    "sign",
    "sign:block=0",
    "log:k=6,block=256",
    "uniform:bits=8,block=8192",
    "uniform:bits=4,stochastic=true",
    "lloyd-max:bits=4,block=256",
    "lloyd-max:bits=3,block=0",
    "bf16",
    "fp32",
)
ADAM = AdamCoefficients(
    *(float(np.float32(n)) for n in (0.1, 0.999, 0.001, 2e-3, 0.3, 0.0, 1e-8, 0.0, 1e-5))
)
CORRECTION = CorrectionCoefficients(
    *(float(np.float32(n)) for n in (2.0, 11.0, 0.2, 1.25, 1.0, 30.0, 0.25, 0.75))
)
BLEND = Blend(float(np.float32(0.9)), float(np.float32(0.1)))
MODES = ["gradient", "blend", "units", "adam", "amsgrad", "corrected"]
RESIDUALS = {"none": None, "f32": np.float32, "bf16": np.uint16}


def make_step(spec, mode, residual, *, says=True, seed=0):
    """A step with vectors of its own: the same for the same arguments."""
    rng = np.random.default_rng(seed)
    form = get_codec(spec).format

    def vector(scale=1.0):
        return (rng.standard_normal(TOTAL) * scale).astype(np.float32)

    g, x, kept = vector(), vector(), vector(1e-3)
    adam, blends = mode in {"adam", "amsgrad", "corrected"}, mode in {"blend", "units"}
    if residual == "bf16":
        kept = (kept.view(np.uint32) >> 16).astype(np.uint16)
    cuts = np.cumsum(SEGMENTS)[:-1]
    nbytes = sum(form.payload_bytes(numel) for numel in SEGMENTS)
    return WorkerStep(
        uplink=form,
        gradients=np.split(g, cuts),
        starts=[11 * i for i in range(len(SEGMENTS))],
        payload=np.full(nbytes, 0xA5, np.uint8) if says else None,
        residual=None if residual == "none" else kept,
        adam=ADAM if adam else None,
        correction=CORRECTION if mode == "corrected" else None,
        m=vector() if adam else None,
        v=np.abs(vector()) if adam else None,
        third=np.abs(vector()) if mode in {"amsgrad", "corrected"} else None,
        blend=BLEND if blends else None,
        before=vector() if blends else None,
        unit=np.abs(vector()) + np.float32(1e-3) if mode == "units" else None,
        weights=np.split(x, cuts) if adam else None,
        scratch=np.full(max(SEGMENTS), np.nan, np.float32) if adam or blends else None,
    )


def written(step):
    names = ("payload", "residual", "m", "v", "third")
    arrays = (getattr(step, name) for name in names)
    return {name: None if a is None else a.tobytes() for name, a in zip(names, arrays, strict=True)}


@pytest.mark.parametrize("level", NATIVE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("spec", SPECS)
def test_one_pass_has_the_bits_of_the_passes_that_define_it(level, mode, residual, spec):
    expected, came = (make_step(spec, mode, residual) for _ in range(2))
    compose(kernels.get("reference"), expected)
    kernels.get(level).worker_step(came)
    assert written(came) == written(expected)


@pytest.mark.parametrize("level", NATIVE)
@pytest.mark.parametrize("mode", ["gradient", "units", "adam"])
@pytest.mark.parametrize("residual", ["f32", "bf16"])
def test_a_push_without_a_payload_waits_in_the_residual_with_the_same_bits(level, mode, residual):
    expected, came = (make_step("sign", mode, residual, says=False) for _ in range(2))
    before = came.residual.copy()
    compose(kernels.get("reference"), expected)
    kernels.get(level).worker_step(came)
    assert written(came) == written(expected)
    assert (came.residual != before).mean() > 0.3


@pytest.mark.parametrize("name", kernels.available())
@pytest.mark.parametrize("mode", ["gradient", "blend", "units", "adam", "corrected"])
@pytest.mark.parametrize("says", [True, False])
def test_a_push_that_clears_its_gradients_changes_nothing_else(name, mode, says):
    for spec, residual in itertools.product(("sign", "lloyd-max:bits=3,block=0"), ("f32", "bf16")):
        expected, came = (make_step(spec, mode, residual, says=says) for _ in range(2))
        for step in (expected, came):
            step.gradients[0][17] = np.inf if mode == "gradient" else 1.0
        kernels.get(name).worker_step(expected)
        kernels.get(name).worker_step(dataclasses.replace(came, clear=True))
        assert written(came) == written(expected)
        left = np.flatnonzero(np.concatenate(came.gradients))
        assert left.tolist() == ([17] if mode == "gradient" else [])


@pytest.mark.parametrize("level", NATIVE)
@pytest.mark.parametrize("mode", ["gradient", "units", "adam"])
@pytest.mark.parametrize("residual", ["f32", "bf16"])
@pytest.mark.parametrize("spec", [*SPECS, "sign:block=512", "topk", None])
def test_a_rescaled_residual_has_the_bits_of_the_reference(level, mode, residual, spec):
    steps = [make_step(spec or "sign", mode, residual, says=spec is not None) for _ in range(2)]
    steps = [dataclasses.replace(step, residual_scale=1 / 3) for step in steps]
    for step in steps:
        if mode == "gradient":  # a block in the midst, which keeps its old residual
            step.gradients[0][1500] = np.nan
    compose(kernels.get("reference"), steps[0])
    kernels.get(level).worker_step(steps[1])
    assert written(steps[1]) == written(steps[0])


@pytest.mark.parametrize("name", kernels.available())
@pytest.mark.parametrize("residual", ["f32", "bf16"])
def test_a_rescaled_residual_is_rescaled_before_anything_else(name, residual):
    for spec, says in (("sign", True), ("log:k=2,block=0", True), ("sign", False)):
        expected, came = (make_step(spec, "gradient", residual, says=says) for _ in range(2))
        rescale(expected.residual, 0.75)
        kernels.get(name).worker_step(expected)
        kernels.get(name).worker_step(dataclasses.replace(came, residual_scale=0.75))
        assert written(came) == written(expected)


@pytest.mark.parametrize("name", kernels.available())
def test_a_product_that_is_not_finite_is_given_up(name):
    for residual in ("f32", "bf16"):
        step = make_step("sign", "gradient", residual, says=False)
        step.gradients[0][:] = 0.0
        step.residual[:2] = np.float32(1e30) if residual == "f32" else 0x7200
        kernels.get(name).worker_step(dataclasses.replace(step, residual_scale=1e30))
        assert step.residual[:2].tolist() == [0, 0]


@pytest.mark.parametrize("name", kernels.available())
def test_what_waits_is_residual_plus_gradient_to_the_last_bit(name):
    step = make_step("sign", "gradient", "f32", says=False)
    expected = step.residual + np.concatenate(step.gradients)
    kernels.get(name).worker_step(step)
    assert step.residual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", kernels.available())
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_does_not_wait(name, bad):
    for residual in ("f32", "bf16"):
        step = make_step("sign", "gradient", residual, says=False)
        before = step.residual.copy()
        step.gradients[0][17] = bad
        kernels.get(name).worker_step(step)
        assert step.residual[17] == before[17]
        assert np.isfinite(step.residual.astype(np.float32)).all()


def test_bf16_rounds_to_nearest_even_and_stays_finite():
    residual = np.zeros(4, np.uint16)
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF], np.uint32)
    absorb(ties.view(np.float32), residual)
    assert [hex(bits) for bits in residual] == ["0x3f80", "0x3f82", "0x3f81", "0x7f7f"]


WRONG = {
    "m has 99": {"m": np.zeros(99, np.float32)},
    "residual has 3 elements": {"residual": np.zeros(3, np.float32)},
    "payload has 1 elements": {"payload": np.zeros(1, np.uint8)},
    "starts must be one": {"starts": [1]},
    "weights": {"weights": [np.zeros(1, np.float32)]},
    "residual_scale must be": {"residual_scale": float("inf")},
    "and 1 where there is no residual": {"residual": None, "residual_scale": 0.5},
    "there must be a residual": {"payload": None, "residual": None},
    "go together": {"m": None},
    "only with third": {"correction": CORRECTION, "third": None},
    "scratch has 10 elements": {"scratch": np.zeros(10, np.float32)},
    "blend and before go together": {"blend": BLEND},
    "none of them with adam": {"blend": BLEND, "before": np.zeros(TOTAL, np.float32)},
    "unit only with them": {"unit": np.ones(TOTAL, np.float32)},
    "before has 3 elements": {"blend": BLEND, "before": np.zeros(3, np.float32)},
}


@pytest.mark.parametrize("name", kernels.available())
@pytest.mark.parametrize("why", WRONG)
def test_what_does_not_go_together_is_refused_before_anything_is_written(name, why):
    usual = make_step("sign", "amsgrad", "f32")
    before = written(usual)
    with pytest.raises(ValueError, match=why):
        kernels.get(name).worker_step(dataclasses.replace(usual, **WRONG[why]))
    assert written(usual) == before

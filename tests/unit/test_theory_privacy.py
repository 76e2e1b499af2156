"""The accountant against integrals, closed forms and the noise that workers really add."""

import math

import numpy as np
import pytest

from psq.errors import ConfigError, UsageError
from psq.plan import Plan
from psq.presets import preset
from psq.rules import make_direction
from psq.theory import (
    Release,
    classic_sigma,
    gaussian_delta,
    gaussian_epsilon,
    privacy_words,
    rdp,
    rdp_epsilon,
    recipe_release,
    sigma_for,
    spent,
)

DELTA = 1e-5
AXIS = np.linspace(-60.0, 60.0, 1_200_001)


def density(mean, sigma):
    return np.exp(-(((AXIS - mean) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))


def integral(values):
    return float(np.sum(values) * (AXIS[1] - AXIS[0]))


@pytest.mark.parametrize("order", [1.5, 2.0, 8.0])
def test_rdp_of_a_step_is_the_integral_that_defines_it(order):
    release = Release(clip=0.75, sigma=2.0, steps=1)
    p, q = density(0.0, 2.0), density(release.sensitivity, 2.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(p > 0, (q / np.where(p > 0, p, 1.0)) ** order * p, 0.0)
    divergence = math.log(integral(ratio)) / (order - 1)
    assert rdp(release, order) == pytest.approx(divergence, rel=1e-6)
    assert rdp(release, order) == pytest.approx(order * 1.5**2 / (2 * 2.0**2))


def test_rdp_of_many_steps_is_the_sum_of_theirs():
    one, many = Release(1.0, 5.0, 1), Release(1.0, 5.0, 400)
    assert rdp(many, 3.0) == pytest.approx(400 * rdp(one, 3.0))
    assert rdp_epsilon(many, DELTA) == pytest.approx(rdp_epsilon(Release(20.0, 5.0, 1), DELTA))


@pytest.mark.parametrize("mu", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0])
def test_the_exact_curve_is_the_integral_that_defines_it(mu, epsilon):
    p, q = density(0.0, 1.0), density(mu, 1.0)
    delta = integral(np.maximum(q - math.exp(epsilon) * p, 0.0))
    assert gaussian_delta(mu, epsilon) == pytest.approx(delta, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("mu", [0.01, 0.3, 1.0, 5.0, 60.0])
def test_the_exact_epsilon_inverts_the_exact_curve(mu):
    epsilon = gaussian_epsilon(mu, DELTA)
    assert gaussian_delta(mu, epsilon) <= DELTA
    if epsilon > 0:
        assert gaussian_delta(mu, epsilon) == pytest.approx(DELTA, rel=1e-6)


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
@pytest.mark.parametrize("steps", [1, 100, 10_000])
@pytest.mark.parametrize("sigma", [1.0, 10.0, 300.0])
def test_what_is_stated_lies_between_the_exact_value_and_mironovs_closed_form(sigma, steps, delta):
    release = Release(1.0, sigma, steps)
    rho = release.mu**2 / 2
    closed = rho + 2 * math.sqrt(rho * math.log(1 / delta))
    found = spent(release, delta)
    assert found.exact <= found.epsilon <= closed * (1 + 1e-6)
    assert found.one_step <= found.exact * (1 + 1e-9)


def test_the_classic_noise_is_enough_and_not_much_too_much():
    sigma = classic_sigma(2.0, 0.9, DELTA)
    assert sigma == pytest.approx(2 / 0.9 * math.sqrt(2 * math.log(1.25e5)))
    assert 0.5 < gaussian_epsilon(2.0 / sigma, DELTA) <= 0.9
    for epsilon in (0.0, 1.0, 2.0):
        with pytest.raises(UsageError, match="between 0 and 1"):
            classic_sigma(2.0, epsilon, DELTA)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 20.0])
def test_the_noise_for_a_target_meets_it_and_less_does_not(epsilon):
    sigma = sigma_for(epsilon, DELTA, clip=0.5, steps=300)
    assert rdp_epsilon(Release(0.5, sigma, 300), DELTA)[0] <= epsilon
    assert rdp_epsilon(Release(0.5, 0.999 * sigma, 300), DELTA)[0] > epsilon


def test_no_noise_promises_nothing_and_no_step_reveals_nothing():
    silent = spent(Release(1.0, 0.0, 5), DELTA)
    assert math.isinf(silent.epsilon)
    assert math.isinf(silent.exact)
    assert "infinite" in privacy_words(Release(1.0, 0.0, 5))
    unsaid = spent(Release(1.0, 0.0, 0), DELTA)
    assert (unsaid.epsilon, unsaid.exact) == (0.0, 0.0)
    assert sigma_for(1.0, DELTA, clip=1.0, steps=0) == 0.0


def test_more_steps_less_noise_and_smaller_delta_cost_more():
    base = spent(Release(1.0, 10.0, 100), DELTA).epsilon
    assert spent(Release(1.0, 10.0, 101), DELTA).epsilon > base
    assert spent(Release(1.0, 9.9, 100), DELTA).epsilon > base
    assert spent(Release(1.0, 10.0, 100), DELTA / 10).epsilon > base


def test_what_is_no_mechanism_or_no_probability_is_refused():
    for clip, sigma, steps in ((0.0, 1.0, 1), (math.nan, 1.0, 1), (1.0, -1.0, 1), (1.0, 1.0, -1)):
        with pytest.raises(ConfigError):
            Release(clip, sigma, steps)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(UsageError, match="delta"):
            spent(Release(1.0, 1.0, 1), delta)
    for epsilon in (0.0, math.inf):
        with pytest.raises(UsageError, match="epsilon"):
            sigma_for(epsilon, DELTA, clip=1.0, steps=1)


def test_a_recipes_release_is_that_of_its_direction():
    recipe = preset("dp-sign").with_options(direction={"clip": 2.0, "sigma": 3.0})
    assert recipe_release(recipe, 7) == Release(2.0, 3.0, 7)
    assert recipe_release(preset("server-adam"), 7) is None


def said(recipe, gradients, secret):
    """What a worker's direction writes of a whole gradient in one step."""
    plan = Plan.of([("a", (3000,)), ("b", (500,))], recipe, 2)
    rule = make_direction(recipe, layout=plan.layout, world_size=2, rank=0, seed=0)
    rule.use_secret(secret)
    parts = []
    for shard in plan.layout.shards:
        cut = gradients[shard.offset : shard.offset + shard.numel]
        parts.append([cut[s.offset : s.offset + s.numel] for s in shard.segments])
    rule.prepare(1, 0.1, parts)
    out = np.empty(plan.layout.numel, np.float32)
    for shard, gradient in zip(plan.layout.shards, parts, strict=True):
        here = out[shard.offset : shard.offset + shard.numel]
        rule.write(shard.index, 1, 0.1, gradient, here, weights=None, shared={})
    return out.astype(np.float64)


def test_two_workers_data_are_as_close_as_the_sensitivity_says_under_equal_noise():
    recipe = preset("dp-sign").with_options(direction={"clip": 0.5, "sigma": 0.25})
    rng = np.random.default_rng(1)
    farthest = 0.0
    for scale in (1e-4, 1.0, 1e6):
        g = (scale * rng.standard_normal(3500)).astype(np.float32)
        for other in (-g, np.zeros_like(g), rng.standard_normal(3500).astype(np.float32)):
            distance = np.linalg.norm(said(recipe, g, 5) - said(recipe, other, 5))
            farthest = max(farthest, distance)
            # the sums are rounded to float32, by at most half a unit of numbers below 2
            assert distance <= recipe_release(recipe, 1).sensitivity + 3500**0.5 * 2.0**-23
    assert farthest > 0.99 * recipe_release(recipe, 1).sensitivity


def test_the_noise_a_worker_adds_is_what_the_accountant_counts():
    recipe = preset("dp-sign").with_options(direction={"clip": 0.5, "sigma": 0.25})
    noise = np.concatenate([said(recipe, np.zeros(3500, np.float32), k) for k in range(20)])
    assert np.std(noise) == pytest.approx(0.25, rel=0.02)
    assert abs(np.mean(noise)) < 5 * 0.25 / math.sqrt(noise.size)
    assert np.mean(noise > 2 * 0.25) == pytest.approx(0.02275, rel=0.1)

import numpy as np
import pytest

from psq.errors import ConfigError, UsageError
from psq.layout import cut
from psq.optim import Adam
from psq.recipe import AdamConfig
from psq.rules.directions import Optimistic

STEPS = 4


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_momentum_is_what_a_few_lines_of_numpy_say(model, nesterov, ema):
    beta = 0.8
    rule = model.rule("momentum", beta=beta, nesterov=nesterov, ema=ema)
    m = np.zeros(model.layout.numel)
    for step in range(STEPS):
        gradients = model.values(step)
        share = (1 - beta) * model.flat(gradients) if ema else model.flat(gradients)
        m = beta * m + share
        expected = beta * m + share if nesterov else m
        np.testing.assert_allclose(model.write(rule, gradients), expected, rtol=1e-4, atol=1e-6)


def test_momentum_adds_the_weights_decay_to_the_gradient(model):
    rule = model.rule("momentum", beta=0.0, weight_decay=0.5)
    gradients, weights = model.values(0), model.values(1)
    said = model.write(rule, gradients, weights=weights)
    np.testing.assert_allclose(said, model.flat(gradients) + 0.5 * model.flat(weights), atol=1e-6)
    with pytest.raises(UsageError, match="needs the current weights"):
        model.write(rule, gradients)


def test_lion_says_one_average_and_keeps_another(model):
    rule = model.rule("lion", beta1=0.9, beta2=0.5)
    m = np.zeros(model.layout.numel)
    for step in range(STEPS):
        gradients = model.values(step)
        g = model.flat(gradients)
        np.testing.assert_allclose(model.write(rule, gradients), 0.9 * m + 0.1 * g, atol=1e-6)
        m = 0.5 * m + 0.5 * g
    np.testing.assert_allclose(rule.state_arrays()["m"], m, atol=1e-6)


def test_an_adam_direction_is_adams_byte_for_byte(model):
    config = AdamConfig(weight_decay=0.1)
    rule, weights = model.rule("adam", adam=config), model.values(9)
    adam = Adam(config, model.layout.numel)
    out = np.empty(model.layout.numel, np.float32)
    for step in range(STEPS):
        gradients = model.values(step)
        adam.direction(model.flat(gradients), 0.1, out, model.flat(weights))
        assert model.write(rule, gradients, weights=weights).tobytes() == out.tobytes()
    assert set(rule.state_arrays()) == {"m", "v"}


def test_an_adam_direction_without_settings_is_refused(model):
    with pytest.raises(ConfigError, match="needs Adam settings"):
        model.rule("adam")


def test_a_gradient_is_what_it_is(model):
    gradients = model.values(0)
    assert model.write(model.rule("gradient"), gradients).tobytes() == (
        model.flat(gradients).tobytes()
    )


def field(point):
    """Min over a, max over b of a * b: the equilibrium is 0."""
    return np.array([point[1], -point[0]], np.float32)


def test_optimistic_descent_arrives_where_descent_circles():
    layout = cut([("players", (2,))], [lambda n: 4 * n])
    rule = Optimistic({}, layout=layout, world_size=1, rank=0, seed=0)
    plain = here = np.ones(2, np.float32)
    step, ahead = np.empty(2, np.float32), np.empty(2, np.float32)
    for t in range(1, 201):
        plain = plain - 0.3 * field(plain)
        rule.look_ahead(0, None, ahead)
        rule.write(0, t, 0.3, [field(here - ahead)], step, weights=None, shared={})
        here = here - step
    assert np.linalg.norm(plain) > 100.0
    assert np.linalg.norm(here) < 1e-2


@pytest.mark.parametrize("has_residual", [False, True])
def test_the_look_ahead_is_the_last_update_and_the_residual(model, has_residual):
    rule = model.rule("omd")
    assert rule.looks_ahead
    gradients, rates = [model.values(0), model.values(1)], [0.1, 0.3]
    residual = np.full(model.layout.numel, 0.25, np.float32) if has_residual else None
    for step in range(2):
        said = model.write(rule, gradients[step], lr=rates[step])
        np.testing.assert_allclose(said, rates[step] * model.flat(gradients[step]), rtol=1e-6)
    for shard in model.layout.shards:
        view = slice(shard.offset, shard.offset + shard.numel)
        out = np.empty(shard.numel, np.float32)
        rule.look_ahead(shard.index, None if residual is None else residual[view], out)
        np.testing.assert_allclose(out, said[view] + (0.25 if has_residual else 0.0), rtol=1e-6)


def test_before_the_first_step_there_is_nothing_to_look_ahead_to(model):
    rule, out = model.rule("omd"), np.ones(model.layout.shards[0].numel, np.float32)
    rule.look_ahead(0, None, out)
    assert not out.any()


@pytest.mark.parametrize("kind", ["gradient", "momentum", "lion", "omd", "ef21", "dithered"])
def test_gradients_are_only_read(model, kind):
    gradients = model.values(0)
    before = model.flat(gradients)
    model.write(model.rule(kind), gradients)
    assert model.flat(gradients).tobytes() == before.tobytes()

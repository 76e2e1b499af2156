import numpy as np
import pytest

from psq.errors import ConfigError, UsageError
from psq.recipe import AdamConfig
from psq.rules.choices import First, Periodic

BETA = 0.75  # exact in float32, as is its rest


def first(model, steps=2):
    return First({"steps": steps}, codecs=("sign", "fp32"), layout=model.layout)


def periodic(model, start=2, period=5):
    codecs = ("sign", "uniform:bits=8")
    return Periodic({"first": start, "period": period}, codecs=codecs, layout=model.layout)


def shared_state(model, names, seed=7):
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(0.5, 2.0, model.layout.numel).astype(np.float32) for name in names}


def test_onebit_says_the_gradient_first_and_then_moves_the_common_momentum(model):
    rule = model.rule("onebit", adam=AdamConfig(beta=BETA), choice=first(model))
    gradients, state = model.values(0), shared_state(model, "m")
    g = model.flat(gradients)
    assert model.write(rule, gradients, t=2, shared=state).tobytes() == g.tobytes()
    said = model.write(rule, gradients, t=3, shared=state)
    assert said.tobytes() == ((1 - BETA) * g + np.float32(BETA) * state["m"]).tobytes()
    assert all(rule.uses_residual(t) for t in range(1, 5))


def test_shared_says_gradients_in_a_refresh_and_else_moves_the_common_direction(model):
    rule = model.rule("shared", adam=AdamConfig(beta=BETA), choice=periodic(model))
    gradients, state = model.values(0), shared_state(model, ("v", "s", "d"))
    g = model.flat(gradients)
    blend = (1 - BETA) * (g / state["s"]) + np.float32(BETA) * state["d"]
    for t in range(1, 12):
        is_refresh = t in {1, 2, 5, 10}
        assert rule.uses_residual(t) == (not is_refresh)
        said = model.write(rule, gradients, t=t, shared=state)
        assert said.tobytes() == (g if is_refresh else blend).tobytes()


def test_what_is_shared_is_only_read(model):
    state = shared_state(model, ("v", "s", "d"))
    before = {name: array.tobytes() for name, array in state.items()}
    rule = model.rule("shared", adam=AdamConfig(), choice=periodic(model))
    model.write(rule, model.values(0), t=3, shared=state)
    assert {name: array.tobytes() for name, array in state.items()} == before


@pytest.mark.parametrize(("kind", "name"), [("onebit", "m"), ("shared", "s")])
def test_a_direction_that_starts_from_a_common_vector_asks_for_it(model, kind, name):
    choice = first(model) if kind == "onebit" else periodic(model)
    rule = model.rule(kind, adam=AdamConfig(), choice=choice)
    with pytest.raises(UsageError, match=f"starts from '{name}'"):
        model.write(rule, model.values(0), t=4)


@pytest.mark.parametrize("kind", ["onebit", "shared"])
def test_rounds_that_cannot_be_told_apart_are_refused(model, kind):
    with pytest.raises(ConfigError, match="an uplink whose codec follows the round"):
        model.rule(kind, adam=AdamConfig())
    with pytest.raises(ConfigError, match="needs Adam settings"):
        model.rule(kind, choice=periodic(model))


def test_shared_refuses_a_start_without_a_unit(model):
    with pytest.raises(ConfigError, match="a refresh in the first round"):
        model.rule("shared", adam=AdamConfig(), choice=periodic(model, start=0))

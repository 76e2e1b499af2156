"""psq.rules.applies, replicas: what x loses, against plain formulas, torch and psq.optim."""

import numpy as np
import pytest
import torch

from psq.errors import ConfigError, UsageError
from psq.layout import cut
from psq.optim import Adam
from psq.recipe import AdamConfig, Power
from psq.rules.applies import AdamStep, Add, Ef21, Return, Sgd
from psq.rules.base import ChoiceRule
from psq.rules.replicas import OneBit, Shared, power

SPECS = [("table", (300, 200)), ("bias", (40,))]
LAYOUT = cut(SPECS, (lambda n: 4 * n,))
NUMEL = LAYOUT.numel
SGD = {
    "momentum": 0.0,
    "nesterov": False,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "decoupled": False,
    "rate": 0.0,
}


class Marks(ChoiceRule):
    """A choice that has some rounds, given by a predicate, in a second codec."""

    def __init__(self, marked):
        super().__init__({}, codecs=("sign", "fp32"), layout=LAYOUT)
        self.marked = marked

    def choose(self, shard, t, norm):  # noqa: ARG002 - the signature of a choice
        return int(self.marked(t))


def made(kind, options=None, **given):
    return kind(options or {}, layout=LAYOUT, world_size=2, **given)


def values(seed, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, NUMEL).astype(np.float32)


def step(rule, x, message, t, lr=0.1):
    """One round of the one shard; returns what x lost."""
    change = message.copy()
    rule.advance(0, t, lr)
    rule.write(0, change, x)
    x -= change
    return change


def test_the_layout_is_one_shard_of_several_blocks():
    assert [shard.numel for shard in LAYOUT.shards] == [NUMEL]


def test_add_takes_the_update_off_and_return_takes_nothing():
    x, update = values(0), values(1)
    assert step(made(Add), x.copy(), update, 1).tobytes() == update.tobytes()
    assert not step(made(Return), x.copy(), update, 1).any()


@pytest.mark.parametrize("config", [AdamConfig(weight_decay=0.1), AdamConfig(amsgrad=True)])
def test_adam_is_the_optimizers_own_adam(config):
    rule, adam = made(AdamStep, adam=config), Adam(config, NUMEL)
    x, out = values(0), np.empty(NUMEL, np.float32)
    for t in range(1, 4):
        adam.direction(values(t), 0.1, out, x=x)
        assert step(rule, x.copy(), values(t), t).tobytes() == out.tobytes()
        x -= out
    assert list(rule.state_arrays()) == list(adam.state_arrays())


def test_an_adam_that_is_given_its_moments_goes_on_at_any_round():
    config = AdamConfig()
    first, x = made(AdamStep, adam=config), values(0)
    for t in (1, 2, 3):
        step(first, x, values(t), t)
    state = {name: array.copy() for name, array in first.state_arrays().items()}
    second = made(AdamStep, adam=config, state=state)
    assert step(second, x.copy(), values(4), 4).tobytes() == step(first, x, values(4), 4).tobytes()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ],
)
def test_sgd_is_torchs_sgd(settings):
    rule, x = made(Sgd, SGD | settings), values(0)
    theirs = torch.nn.Parameter(torch.from_numpy(x.copy()))
    optimizer = torch.optim.SGD([theirs], lr=0.1, **settings)
    for t in range(1, 6):
        theirs.grad = torch.from_numpy(values(t))
        optimizer.step()
        step(rule, x, values(t), t)
    np.testing.assert_allclose(x, theirs.detach().numpy(), rtol=3e-6, atol=1e-6)
    assert bool(rule.state_arrays()) == bool(settings.get("momentum"))


def test_decoupled_decay_of_sgd_stays_out_of_the_velocity():
    settings = {"momentum": 0.9, "weight_decay": 0.5, "decoupled": True}
    rule, x = made(Sgd, SGD | settings), values(0)
    before = x.copy()
    step(rule, x, values(1), 1)
    assert rule.state_arrays()["velocity"].tobytes() == values(1).tobytes()
    np.testing.assert_allclose(x, before - 0.1 * (values(1) + 0.5 * before), rtol=1e-5, atol=1e-6)


def test_an_sgd_with_a_rate_of_its_own_does_not_look_at_the_pushes():
    rule = made(Sgd, SGD | {"rate": 0.7})
    change = step(rule, values(0), values(1), 1, lr=123.0)
    np.testing.assert_array_equal(change, values(1) * np.float32(0.7))
    assert Sgd.is_linear(SGD)
    assert not Sgd.is_linear(SGD | {"rate": 0.7})


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "dampening": 0.1}])
def test_nesterov_needs_momentum_without_dampening(settings):
    with pytest.raises(ConfigError, match="nesterov needs"):
        made(Sgd, SGD | {"nesterov": True} | settings)


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_a_rate_that_cannot_be_is_refused(rate):
    for rule in (made(Sgd, SGD), made(Ef21), onebit(lambda t: t < 3), shared(lambda t: t < 3)):
        with pytest.raises(UsageError, match="learning rate"):
            rule.advance(0, 1, rate)


def test_ef21_steps_along_the_sum_of_the_differences():
    rule, x = made(Ef21), values(0)
    h = np.zeros(NUMEL, np.float32)
    for t in range(1, 4):
        h += values(t)
        change = step(rule, x, values(t), t)
        assert change.tobytes() == (h * np.float32(0.1)).tobytes()


# ---- what everybody has


def onebit(marked, floor=1e-3, **adam):
    given = {"adam": AdamConfig(**adam), "choice": Marks(marked)}
    return made(OneBit, {"floor": floor}, **given)


def shared(marked, floor=1e-3, **adam):
    given = {"adam": AdamConfig(**adam), "choice": Marks(marked)}
    return made(Shared, {"floor": floor}, **given)


def test_powers_are_products():
    assert [power(0.5, n) for n in range(4)] == [1.0, 0.5, 0.25, 0.125]
    assert power(0.999, 64) == pytest.approx(0.999**64, rel=1e-14)


@pytest.mark.parametrize("rule_of", [onebit, shared])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_while_all_rounds_are_marked_both_are_adam(rule_of, weight_decay):
    rule = rule_of(lambda _: True, floor=1e-12, weight_decay=weight_decay)
    adam = Adam(AdamConfig(weight_decay=weight_decay), NUMEL)
    x, out = values(0), np.empty(NUMEL, np.float32)
    y = x.copy()
    for t in range(1, 8):
        step(rule, x, values(t), t, lr=1e-2)
        adam.direction(values(t), 1e-2, out, x=y)
        y -= out
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-6)


def test_after_the_warm_up_onebit_goes_along_the_momentum_over_a_v_that_stays():
    rule, x = onebit(lambda t: t <= 3), values(0)
    for t in (1, 2, 3):
        step(rule, x, values(t), t)
    v = rule.state_arrays()["v"].copy()
    for t in (4, 5):
        change = step(rule, x, values(t), t)
        assert rule.state_arrays()["m"].tobytes() == values(t).tobytes()
        assert rule.state_arrays()["v"].tobytes() == v.tobytes()
        root = np.sqrt(v.astype(np.float64) / (1 - 0.999**3)) + 1e-8
        cuts = np.split(root, [300 * 200])
        root = np.concatenate([np.maximum(c, 1e-3 * np.sqrt(np.mean(c**2))) for c in cuts])
        wanted = 0.1 * values(t) / (1 - 0.9**t) / root
        np.testing.assert_allclose(change, wanted, rtol=1e-4, atol=1e-7)


def test_a_tiny_v_of_onebit_is_lifted_when_it_stays():
    rule, x = onebit(lambda t: t <= 2, floor=0.1), values(0)
    gradient = np.ones(NUMEL, np.float32)
    gradient[7] = 0.0
    for t in (1, 2):
        step(rule, x, gradient, t)
    change = step(rule, x, np.ones(NUMEL, np.float32), 3)
    assert change[7] == pytest.approx(10 * change[8], rel=1e-3)


def test_a_direction_of_shared_is_the_step_and_between_marks_nothing_else_changes():
    rule, x = shared(lambda t: t <= 2 or t % 4 == 0), values(0)
    for t in (1, 2):
        step(rule, x, values(t), t)
        assert rule.rescale(0) is not None
    state = {name: array.copy() for name, array in rule.state_arrays().items()}
    change = step(rule, x, values(3), 3)
    np.testing.assert_allclose(change, 0.1 / (1 - 0.9**3) * values(3), rtol=1e-6)
    assert rule.rescale(0) is None
    assert rule.state_arrays()["d"].tobytes() == values(3).tobytes()
    for name in ("v", "s"):
        assert rule.state_arrays()[name].tobytes() == state[name].tobytes()


def test_a_mark_of_shared_takes_all_rounds_since_the_last_and_says_how_units_change():
    rule, x = shared(lambda t: t <= 2 or t % 4 == 0), values(0)
    for t in (1, 2, 3):
        step(rule, x, values(t), t)
        rule.rescale(0)
    before = {name: array.astype(np.float64) for name, array in rule.state_arrays().items()}
    gradient = values(4)
    change = step(rule, x, gradient, 4)
    factor, after = rule.rescale(0), rule.state_arrays()
    v = 0.999**2 * before["v"] + (1 - 0.999**2) * gradient.astype(np.float64) ** 2
    s = np.sqrt(v / (1 - 0.999**4))
    np.testing.assert_allclose(after["v"], v, rtol=1e-4)
    np.testing.assert_allclose(after["s"], s, rtol=1e-4, atol=2e-3)
    np.testing.assert_allclose(factor, before["s"] / after["s"], rtol=1e-6)
    d = 0.9 * before["d"] * factor + 0.1 * gradient / after["s"]
    np.testing.assert_allclose(after["d"], d, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(change, 0.1 / (1 - 0.9**4) * d, rtol=1e-4, atol=1e-6)
    assert rule.rescale(0) is None, "it is told once"


def test_units_of_shared_have_a_floor_in_each_tensor_and_are_one_where_nothing_came():
    rule, x = shared(lambda _: True, floor=0.1), values(0)
    gradient = np.ones(NUMEL, np.float32)
    gradient[7], gradient[60_000:] = 0.0, 0.0
    step(rule, x, gradient, 1)
    s = rule.state_arrays()["s"]
    assert s[7] == pytest.approx(0.1, rel=1e-3)
    assert s[8] == pytest.approx(1.0, rel=1e-3)
    assert (s[60_000:] == 1.0).all()


def test_the_residuals_of_shared_wait_while_gradients_are_said():
    rule = shared(lambda t: t == 1)
    assert [rule.uses_residual(0, t) for t in (1, 2)] == [False, True]
    assert onebit(lambda t: t == 1).uses_residual(0, 1)


@pytest.mark.parametrize(
    ("adam", "words"),
    [
        (None, "needs Adam's settings"),
        (AdamConfig(beta=Power(0.9, 0.5)), "has no beta that changes"),
        (AdamConfig(amsgrad=True), "has no amsgrad"),
        (AdamConfig(eps_placement="inside"), "has no eps_placement"),
        (AdamConfig(bias_correction=False), "has no bias_correction=false"),
        (AdamConfig(weight_decay=0.1, decoupled=False), "has no L2 weight_decay"),
    ],
)
@pytest.mark.parametrize("kind", [OneBit, Shared])
def test_settings_that_they_do_not_have_are_refused(kind, adam, words):
    with pytest.raises(ConfigError, match=words):
        made(kind, {"floor": 1e-3}, adam=adam, choice=Marks(lambda _: True))


@pytest.mark.parametrize("choice", [None, Marks(lambda _: False)])
def test_a_choice_without_first_rounds_of_their_own_is_refused(choice):
    with pytest.raises(ConfigError, match="choice has the first rounds"):
        made(Shared, {"floor": 1e-3}, adam=AdamConfig(), choice=choice)


@pytest.mark.parametrize("rule_of", [onebit, shared])
def test_a_node_that_is_given_the_state_goes_on_like_the_others(rule_of):
    def marked(t):
        return t <= 4 or t % 8 == 0

    first, x = rule_of(marked), values(0)
    for t in range(1, 7):
        step(first, x, values(t), t)
    second, y = rule_of(marked), x.copy()
    for name, array in second.state_arrays().items():
        array[:] = first.state_arrays()[name]
    for t in range(7, 10):
        assert step(second, y, values(t), t).tobytes() == step(first, x, values(t), t).tobytes()
        factors = [rule.rescale(0) for rule in (first, second)]
        assert (factors[0] is None) == (factors[1] is None) == (not marked(t) or rule_of is onebit)

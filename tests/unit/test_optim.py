"""Adam against torch.optim (bounds in ulp), against the equations in float64, and its own laws.

Bounds against torch: it fuses multiply-adds and has a square root that is not exactly rounded, so
neither side is the truth to the last bit. In ulp of the largest of |x| and |u| that a value saw:
    one step from the same state     4      (8 with an L2 term, which can cancel the gradient)
    after 300 steps on its own      16      (roundings of both sides add up like a random walk;
                                     64      decoupled decay rounds x once more a step in torch)
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from psq.errors import ConfigError, UsageError
from psq.layout import cut
from psq.optim import CORRECTION_START, Adam, per_shard, state_names
from psq.recipe import AdamConfig, OneMinusPower, Power, schedule_value

LR = 1e-3
NUMEL = 4099  # no multiple of any vector width
ONE_STEP_ULP = 4
ONE_STEP_L2_ULP = 8
LONG_RUN_ULP = 16
LONG_RUN_DECAY_ULP = 64


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """Vectors of a few thousand values: a second thread of torch only waits, and slowly."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ulps(a, b, size):
    """Largest distance in units of the last place of `size`."""
    return float(np.max(np.abs(a.astype(np.float64) - b) / np.spacing(size)))


def largest(*arrays):
    return np.max(np.abs(arrays), axis=0)


def make_gradients(seed=0, numel=NUMEL):
    """An endless stream of gradients whose sizes span many decades, some of them always zero."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.uniform(-12, 2, numel))
    scale[::97] = 0.0
    mean = rng.normal(0, 0.3, numel)
    while True:
        yield ((rng.standard_normal(numel) + mean) * scale).astype(np.float32)


def make_weights(seed=1, numel=NUMEL):
    return np.random.default_rng(seed).normal(0, 0.1, numel).astype(np.float32)


def torch_optimizer(config, x):
    parameter = torch.nn.Parameter(torch.from_numpy(x.copy()))
    decoupled = config.weight_decay > 0 and config.decoupled
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind(
        [parameter],
        lr=LR,
        betas=(config.beta, config.theta),
        eps=config.eps,
        weight_decay=config.weight_decay,
        amsgrad=config.amsgrad,
    )
    return parameter, optimizer


def copy_torch_state(adam, state):
    names = {"m": "exp_avg", "v": "exp_avg_sq", "vmax": "max_exp_avg_sq"}
    for name, array in adam.state_arrays().items():
        array[:] = state[names[name]].numpy()
    adam.resume(int(state["step"]))


TORCH_SETTINGS = {
    "adam": AdamConfig(),
    "amsgrad": AdamConfig(amsgrad=True),
    "adamw": AdamConfig(weight_decay=0.01),
    "adamw-amsgrad": AdamConfig(weight_decay=0.1, amsgrad=True),
    "adam-with-l2": AdamConfig(weight_decay=0.01, decoupled=False),
    "other-betas": AdamConfig(beta=0.95, theta=0.98, eps=1e-6),
    "no-momentum": AdamConfig(beta=0.0),
}


@pytest.mark.parametrize("name", TORCH_SETTINGS)
def test_one_step_from_torchs_state_is_torchs_step(name):
    config = TORCH_SETTINGS[name]
    parameter, optimizer = torch_optimizer(config, make_weights())
    bound = ONE_STEP_ULP if config.decoupled else ONE_STEP_L2_ULP
    out = np.empty(NUMEL, np.float32)
    for t, g in enumerate(itertools.islice(make_gradients(), 60)):
        adam = Adam(config, NUMEL)
        if t > 0:
            copy_torch_state(adam, optimizer.state[parameter])
        before = parameter.detach().numpy().copy()
        adam.direction(g, LR, out, x=before)
        parameter.grad = torch.from_numpy(g)
        optimizer.step()
        after = parameter.detach().numpy()
        assert ulps(before - out, after, largest(before, after, out)) <= bound


@pytest.mark.parametrize("name", TORCH_SETTINGS)
def test_three_hundred_steps_stay_beside_torchs(name):
    config = TORCH_SETTINGS[name]
    x = make_weights()
    parameter, optimizer = torch_optimizer(config, x)
    adam, out = Adam(config, NUMEL), np.empty(NUMEL, np.float32)
    size = np.abs(x)
    for g in itertools.islice(make_gradients(), 300):
        parameter.grad = torch.from_numpy(g.copy())
        optimizer.step()
        adam.direction(g, LR, out, x=x)
        x -= out
        size = largest(size, x, out)
    decays = config.weight_decay > 0 and config.decoupled
    bound = LONG_RUN_DECAY_ULP if decays else LONG_RUN_ULP
    assert ulps(x, parameter.detach().numpy(), size) <= bound


class PlainAdam:
    """The equations of generic Adam, one by one, in float64."""

    def __init__(self, config, numel):
        self.config, self.t = config, 0
        self.m = np.zeros(numel)
        self.v = np.full(numel, config.eps if config.eps_placement == "initial" else 0.0)
        self.vmax = np.zeros(numel)
        self.beta_product = self.theta_product = 1.0

    def direction(self, g, lr):
        config, self.t = self.config, self.t + 1
        beta, theta = (schedule_value(s, self.t) for s in (config.beta, config.theta))
        self.beta_product *= beta
        self.theta_product *= theta
        self.m = beta * self.m + (1 - beta) * g
        self.v = theta * self.v + (1 - theta) * np.square(g.astype(np.float64))
        self.vmax = np.maximum(self.vmax, self.v)
        m, v = self.m, self.vmax if config.amsgrad else self.v
        if config.bias_correction:
            m, v = m / (1 - self.beta_product), v / (1 - self.theta_product)
        if config.eps_placement == "inside":
            return lr * m / np.sqrt(v + config.eps)
        root = np.sqrt(v) + (config.eps if config.eps_placement == "outside" else 0.0)
        return lr * np.divide(m, root, out=np.zeros_like(m), where=root > 0)


SCHEDULES = {"theta": OneMinusPower(0.9, 0.7), "beta": Power(0.9, 0.1)}
EQUATION_SETTINGS = {
    "paper-form": AdamConfig(bias_correction=False, eps_placement="inside", eps=1e-6),
    "paper-schedules": AdamConfig(
        bias_correction=False, eps_placement="inside", eps=1e-6, **SCHEDULES
    ),
    "corrected-schedules": AdamConfig(**SCHEDULES),
    "eps-inside-corrected": AdamConfig(eps_placement="inside", eps=1e-6),
    "eps-inside-amsgrad": AdamConfig(eps_placement="inside", eps=1e-6, amsgrad=True),
    "eps-initial": AdamConfig(eps_placement="initial", eps=1e-6, bias_correction=False),
    "eps-initial-forgotten": AdamConfig(
        eps_placement="initial", theta=OneMinusPower(1.0, 0.5), bias_correction=False
    ),
    "no-correction": AdamConfig(bias_correction=False),
}


@pytest.mark.parametrize("name", EQUATION_SETTINGS)
def test_every_option_follows_its_equation(name):
    config = EQUATION_SETTINGS[name]
    adam, plain, out = Adam(config, NUMEL), PlainAdam(config, NUMEL), np.empty(NUMEL, np.float32)
    for t, g in enumerate(itertools.islice(make_gradients(), 80)):
        lr = LR / (1 + t)
        adam.direction(g, lr, out)
        np.testing.assert_allclose(out, plain.direction(g, lr), rtol=2e-5, atol=2e-5 * lr)


def test_a_value_without_gradient_does_not_move_even_without_eps():
    config = EQUATION_SETTINGS["eps-initial-forgotten"]  # theta_1 = 0: v_0 is gone at once, v = 0
    out = np.full(20, 7.0, np.float32)
    Adam(config, 20).direction(np.zeros(20, np.float32), LR, out)
    assert not out.any()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_gradient_whose_square_overflows_stops_the_value_without_nan(amsgrad):
    adam, out = Adam(AdamConfig(amsgrad=amsgrad), 20), np.empty(20, np.float32)
    g = np.full(20, 1e30, np.float32)
    for _ in range(3):
        adam.direction(g, LR, out)
    assert not out.any()


def test_no_learning_rate_moves_nothing_but_the_moments_learn():
    adam, out = Adam(AdamConfig(weight_decay=0.1), NUMEL), np.empty(NUMEL, np.float32)
    adam.direction(next(make_gradients()), 0.0, out, x=make_weights())
    assert not out.any()
    assert adam.state_arrays()["m"].any()
    assert adam.count == 1


@pytest.mark.parametrize(
    "config",
    [
        AdamConfig(),
        AdamConfig(amsgrad=True, weight_decay=0.1),
        AdamConfig(variance_correction=True, weight_decay=0.1, decoupled=False),
    ],
    ids=["plain", "amsgrad-decay", "corrected-l2"],
)
def test_a_step_written_in_pieces_and_in_place_is_the_whole_step(config):
    whole, pieces = (Adam(config, NUMEL, workers=4) for _ in range(2))
    x, out = make_weights(), np.empty(NUMEL, np.float32)
    for g in itertools.islice(make_gradients(), 8):
        whole.direction(g, LR, out, x=x)
        pieces.advance(LR)
        for start in range(0, NUMEL, 1000):
            piece = g[start : start + 1000]
            pieces.write(piece, piece, start=start, x=x[start : start + 1000])
        assert g.tobytes() == out.tobytes()
    for name, array in whole.state_arrays().items():
        assert array.tobytes() == pieces.state_arrays()[name].tobytes()


@pytest.mark.parametrize(
    "config",
    [AdamConfig(**SCHEDULES), AdamConfig(variance_correction=True)],
    ids=["schedules", "corrected"],
)
def test_a_resumed_state_continues_to_the_last_bit(config):
    first, gradients = Adam(config, NUMEL, workers=4), make_gradients()
    out, resumed_out = np.empty(NUMEL, np.float32), np.empty(NUMEL, np.float32)
    for _ in range(9):
        first.direction(next(gradients), LR, out)
    state = {name: array.copy() for name, array in first.state_arrays().items()}
    resumed = Adam(config, NUMEL, workers=4, state=state)
    resumed.resume(first.count)
    for g in itertools.islice(gradients, 3):
        first.direction(g, LR, out)
        resumed.direction(g, LR, resumed_out)
        assert out.tobytes() == resumed_out.tobytes()


@pytest.mark.parametrize("lr", [-1e-3, float("nan"), float("inf")])
def test_an_impossible_learning_rate_is_refused_before_anything_changes(lr):
    adam = Adam(AdamConfig(), 4)
    with pytest.raises(UsageError, match="learning rate"):
        adam.direction(np.ones(4, np.float32), lr, np.empty(4, np.float32))
    assert adam.count == 0
    assert not adam.state_arrays()["m"].any()


def test_weight_decay_asks_for_the_weights():
    adam = Adam(AdamConfig(weight_decay=0.1), 4)
    with pytest.raises(UsageError, match="current weights"):
        adam.direction(np.ones(4, np.float32), LR, np.empty(4, np.float32))


def test_weights_are_ignored_where_nothing_decays():
    g, x = np.ones(4, np.float32), np.full(4, np.nan, np.float32)
    out = np.empty(4, np.float32)
    Adam(AdamConfig(), 4).direction(g, LR, out, x=x)
    np.testing.assert_allclose(out, LR, rtol=1e-5)


def test_only_the_state_that_is_needed_exists():
    assert state_names(AdamConfig()) == ("m", "v")
    assert state_names(AdamConfig(amsgrad=True)) == ("m", "v", "vmax")
    assert state_names(AdamConfig(variance_correction=True), workers=2) == ("m", "v", "s")
    assert state_names(AdamConfig(variance_correction=True), workers=1) == ("m", "v")


def test_the_shards_adams_work_on_views_of_common_vectors():
    layout = cut([("a", (300_000,)), ("b", (40, 10))], [lambda numel: 4 * numel])
    adams, state = per_shard(AdamConfig(eps_placement="initial", eps=1e-3), layout)
    assert len(adams) == len(layout.shards) > 1
    assert np.all(state["v"] == np.float32(1e-3))
    last = layout.shards[-1]
    adams[-1].direction(np.ones(last.numel, np.float32), LR, np.empty(last.numel, np.float32))
    assert state["m"][last.offset :].all()
    assert not state["m"][: last.offset].any()


# ---- variance correction


THETA = 0.998


def estimated_v(workers, *, corrected, steps=3000, numel=400, seed=0):
    """The v in a worker's denominator over that of the mean gradient, in the second half of a run.

    Returns (for values whose gradient is noise alone, for values whose mean is as large).
    """
    rng = np.random.default_rng(seed)
    mean = (np.arange(numel) % 2).astype(np.float32)
    config = AdamConfig(theta=THETA, eps=1e-30, variance_correction=corrected)
    worker = Adam(config, numel, workers=workers)
    cluster = Adam(AdamConfig(theta=THETA), numel)
    u, unused = np.empty((2, numel), np.float32)
    mine, wanted = np.zeros((2, numel))
    for t in range(1, steps + 1):
        gradients = mean + rng.standard_normal((workers, numel), dtype=np.float32)
        worker.direction(gradients[0], LR, u)
        cluster.direction(gradients.mean(0), LR, unused)
        if t > steps // 2:  # u = LR mhat / sqrt(v)
            mhat = worker.state_arrays()["m"].astype(np.float64) / (1 - 0.9**t)
            mine += np.square(LR * mhat / u)
            wanted += cluster.state_arrays()["v"] / (1 - THETA**t)
    ratios = mine.reshape(-1, 2).sum(0) / wanted.reshape(-1, 2).sum(0)
    return ratios.tolist()


@pytest.mark.parametrize(
    ("eps_placement", "weight_decay"), [("outside", 0.0), ("inside", 0.0), ("outside", 0.01)]
)
def test_the_correction_follows_its_equations(eps_placement, weight_decay):
    """Step by step in float64; the estimate of the squared mean begins at t = 5."""
    eps, b1, b2, workers, x = 1e-6, 0.8, 0.95, 4, make_weights()
    decay = {"weight_decay": weight_decay, "decoupled": False}
    config = AdamConfig(b1, b2, eps, eps_placement, variance_correction=True, **decay)
    adam, out = Adam(config, NUMEL, workers=workers), np.empty(NUMEL, np.float32)
    m, v, s = np.zeros((3, NUMEL))
    for t, g in enumerate(itertools.islice(make_gradients(), 40), 1):
        adam.direction(g, LR, out, x=x)
        regular = (g + np.float32(weight_decay) * x).astype(np.float64)
        m, v = b1 * m + (1 - b1) * regular, b2 * v + (1 - b2) * np.square(regular)
        mhat, vhat = m / (1 - b1**t), v / (1 - b2**t)
        squared_mean = vhat
        if t >= 5:
            r = (1 - b1) ** 2 * (1 - b1 ** (2 * t)) / ((1 - b1**2) * (1 - b1**t) ** 2)
            s = b2 * s + (1 - b2) * (mhat**2 - r * vhat) / (1 - r)
            squared_mean = np.clip(s / (1 - b2 ** (t - 4)), 0, vhat)
        second = vhat / workers + (1 - 1 / workers) * squared_mean
        root = np.sqrt(second + eps) if eps_placement == "inside" else np.sqrt(second) + eps
        np.testing.assert_allclose(out, LR * mhat / root, rtol=5e-5, atol=5e-5 * LR)


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_the_correction_gives_the_v_of_the_mean_gradient(workers):
    """Of noise alone it gives a little more: the estimate of mean^2 is clamped at 0."""
    noise, both = estimated_v(workers, corrected=True)
    assert noise == pytest.approx(1.01, abs=0.03)
    assert both == pytest.approx(1.0, abs=0.015)


def test_without_the_correction_v_is_that_of_one_share():
    """sigma^2 over sigma^2 / 8; mean^2 + sigma^2 over mean^2 + sigma^2 / 8 with mean = sigma."""
    noise, both = estimated_v(8, corrected=False)
    assert noise == pytest.approx(8.0, rel=0.03)
    assert both == pytest.approx(2 / (1 + 1 / 8), rel=0.03)


def test_one_worker_corrects_nothing():
    plain, corrected = Adam(AdamConfig(), 100), Adam(AdamConfig(variance_correction=True), 100)
    a, b = np.empty(100, np.float32), np.empty(100, np.float32)
    for g in itertools.islice(make_gradients(numel=100), 10):
        plain.direction(g, LR, a)
        corrected.direction(g, LR, b)
        assert a.tobytes() == b.tobytes()


def test_before_the_correction_starts_the_step_is_plain_adams():
    corrected = Adam(AdamConfig(variance_correction=True), 100, workers=8)
    plain = Adam(AdamConfig(), 100)
    a, b = np.empty(100, np.float32), np.empty(100, np.float32)
    for t, g in enumerate(itertools.islice(make_gradients(numel=100), CORRECTION_START), 1):
        corrected.direction(g, LR, a)
        plain.direction(g, LR, b)
        assert np.allclose(a, b, rtol=1e-5) == (t < CORRECTION_START)


def test_the_correction_can_only_lengthen_steps_and_by_no_more_than_the_root_of_the_workers():
    corrected = Adam(AdamConfig(variance_correction=True), NUMEL, workers=4)
    plain = Adam(AdamConfig(), NUMEL)
    a, b = np.empty(NUMEL, np.float32), np.empty(NUMEL, np.float32)
    for g in itertools.islice(make_gradients(), 40):
        corrected.direction(g, LR, a)
        plain.direction(g, LR, b)
        assert np.all(np.abs(a) >= np.abs(b) * (1 - 1e-5))
        assert np.all(np.abs(a) <= np.abs(b) * (2 + 1e-5))


def test_the_correction_needs_momentum():
    with pytest.raises(ConfigError, match="beta > 0"):
        Adam(AdamConfig(variance_correction=True, beta=0.0), 4, workers=2)

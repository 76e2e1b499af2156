"""What the examples compute: scores of samples, both players' gradients, the teacher's step."""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from psq.errors import ConfigError
from psq.parts import options
from psq.plan import Plan
from psq.presets import preset

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def load(monkeypatch):
    """Import an example's module, and forget it and what it brought."""
    for folder in ("gan", "fedgen"):
        monkeypatch.syspath_prepend(str(EXAMPLES / folder))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(EXAMPLES)):
            del sys.modules[name]


# ---- games


def test_a_ring_is_covered_where_every_mode_has_its_share(load):
    ring = load("ring")
    draws = torch.Generator().manual_seed(0)
    real = ring.centres().repeat(500, 1)
    real = real + ring.DEVIATION * torch.randn(real.shape, generator=draws)
    found = ring.score(real)
    assert found["modes"] == 8
    assert found["close"] == pytest.approx(1.0 - math.exp(-4.5), abs=0.01)
    assert ring.score(ring.centres()[2].repeat(1000, 1)) == {"modes": 1, "close": 1.0}
    assert ring.score(torch.zeros(1000, 2)) == {"modes": 0, "close": 0.0}


def test_the_frechet_distance_of_normal_samples_is_that_of_their_moments(load):
    images = load("images")
    draws = torch.Generator().manual_seed(0)
    mixing = torch.randn(4, 4, generator=draws).double()
    first = torch.randn(50_000, 4, generator=draws).double() @ mixing
    second = torch.randn(40_000, 4, generator=draws).double() + 1.0
    assert images.frechet(first, first) == pytest.approx(0.0, abs=1e-9)
    # With one covariance the unit, the root of the product is the root of the other.
    values = torch.linalg.eigvalsh(mixing.T @ mixing)
    expected = 4.0 + float(values.sum() + 4.0 - 2.0 * values.sqrt().sum())
    assert images.frechet(first, second) == pytest.approx(expected, rel=0.02)


def test_each_player_gets_the_gradient_of_its_own_loss_at_the_same_weights(load):
    game = load("game")
    torch.manual_seed(0)
    players = game.Players(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 5), nn.Tanh()))
    real, noise, share = torch.randn(6, 3), torch.randn(6, 2), torch.rand(6)
    gap = game.backward(players, real, noise, share, penalty=0.0)
    fake = players.generator(noise)
    gain = players.critic(real).mean() - players.critic(fake).mean()
    assert gap == pytest.approx(float(gain.detach()))
    wanted = torch.autograd.grad(gain, [*players.parameters()])
    for parameter, slope in zip(players.parameters(), wanted, strict=True):
        sign = 1.0 if parameter.shape in {(3, 2), (3,)} else -1.0  # the generator's, the critic's
        torch.testing.assert_close(parameter.grad, sign * slope)


def test_a_critic_of_slope_one_is_not_punished_and_a_steeper_one_is(load):
    game = load("game")
    players = game.Players(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    slopes = []
    for weight in (1.0, 3.0):
        with torch.no_grad():
            players.critic.weight.fill_(weight)
        players.zero_grad()
        game.backward(players, torch.zeros(4, 1), torch.zeros(4, 1), torch.rand(4), penalty=2.0)
        slopes.append(float(players.critic.weight.grad))
    assert slopes == pytest.approx([0.0, 2.0 * 2.0 * (3.0 - 1.0)])


# ---- a recipe of one's own


def teacher(load, **given):
    fedgen = load("fedgen")
    plan = Plan.of([("w", (4,))], preset("fp32"), 1)
    asked = dict(options(fedgen.TEACHER, given))
    return fedgen.Teacher(asked, layout=plan.layout, world_size=1)


def test_the_teachers_step_is_the_gradient_of_the_cross_entropy_of_its_features(load):
    rng = np.random.default_rng(3)
    head, bias = rng.standard_normal((3, 5), np.float32), rng.standard_normal(3, np.float32)
    mu = rng.random((3, 5), np.float32)
    moved, rate, noise = mu.copy(), 0.25, 0.5
    teacher(load, steps=1, rate=rate, noise=noise).teach(head, bias, moved, t=7)
    free = torch.from_numpy(mu.copy()).requires_grad_()
    drawn = np.random.default_rng(7).standard_normal(mu.shape, np.float32)
    scores = torch.relu(free + noise * torch.from_numpy(drawn)) @ torch.from_numpy(head).T
    loss = functional.cross_entropy(
        scores + torch.from_numpy(bias), torch.arange(3), reduction="sum"
    )
    loss.backward()
    np.testing.assert_allclose(moved, mu - rate * free.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_a_model_without_what_the_teacher_moves_is_refused_with_what_it_has(load):
    weights = {"head.weight": np.ones((2, 2), np.float32), "head.bias": np.ones(2, np.float32)}
    with pytest.raises(ConfigError, match=r"no parameter 'means' .*; there are head.weight, head"):
        teacher(load).step_whole({}, weights, 1, 0.0, None)


def test_clients_share_all_samples_and_half_of_them_take_part(load):
    train = load("train")
    labels = np.repeat(np.arange(10), 100)
    owned = train.share_out(labels, 4, 0.1, seed=0)
    assert sorted(np.concatenate(owned)) == list(range(1000))
    assert min(len(set(labels[each])) for each in owned) < 8
    for number in range(20):
        assert sum(train.takes_part(rank, number, 4, seed=0) for rank in range(4)) == 2

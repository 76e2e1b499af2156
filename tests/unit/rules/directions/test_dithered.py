import math

import numpy as np
import pytest

from psq.codec import DEFAULT_BLOCK
from psq.layout import cut
from psq.rules.dithered import Dithered

DRAWS = 4000
NUMEL = 64


def rule_of(numel, b=0.0, *, seed=3, rank=1):
    layout = cut([("a", (numel,))], [lambda n: 4 * n])
    return Dithered({"b": b}, layout=layout, world_size=2, rank=rank, seed=seed)


def draw(rule, values):
    out = np.empty(values.size, np.float32)
    rule.write(0, 1, 0.1, [values], out, weights=None, shared={})
    rule.advance(0)
    return out


@pytest.mark.parametrize("b", [0.0, 4.0])
def test_the_sign_is_right_on_average(b):
    """Over independent draws the mean of +-1 is within five standard errors of g / b."""
    rng = np.random.default_rng(0)
    g = rng.uniform(-1.0, 1.0, NUMEL).astype(np.float32)
    bound = b or np.abs(g).max()
    rule = rule_of(NUMEL, b)
    mean = sum(np.sign(draw(rule, g)).astype(np.float64) for _ in range(DRAWS)) / DRAWS
    error = np.sqrt(1.0 - (g / bound) ** 2) / math.sqrt(DRAWS)
    assert (np.abs(mean - g / bound) <= 5.0 * error + 1e-6).all()


def test_the_statistic_would_notice_a_width_that_is_off_by_a_fifth():
    g, rule = np.full(NUMEL, 0.5, np.float32), rule_of(NUMEL, 1.0)
    mean = sum(np.sign(draw(rule, g)).astype(np.float64) for _ in range(DRAWS)) / DRAWS
    error = math.sqrt(1.0 / DRAWS)
    assert (np.abs(mean - 0.5 / 1.2) > 4.0 * error).sum() > NUMEL // 2


def test_a_value_at_the_bound_keeps_its_sign():
    g = np.linspace(-1.0, 1.0, NUMEL, dtype=np.float32)
    rule = rule_of(NUMEL)
    for _ in range(200):
        said = draw(rule, g)
        assert said[0] < 0.0 < said[-1]
        assert np.abs(said - g).max() < 1.0


def test_a_fixed_width_clips_what_is_larger():
    g = np.array([-9.0, 0.0, 9.0], np.float32)
    said = draw(rule_of(3, 0.5), g)
    assert (np.abs(said) < 1.0).all()
    assert said[0] < 0.0 < said[2]


def test_each_block_has_a_width_of_its_own():
    g = np.full(2 * DEFAULT_BLOCK, 1e-3, np.float32)
    g[0] = 1.0
    noise = draw(rule_of(g.size), g) - g
    assert np.abs(noise[:DEFAULT_BLOCK]).max() > 0.9
    assert np.abs(noise[DEFAULT_BLOCK:]).max() < 1.001e-3


def test_zeros_toss_a_fair_coin():
    g = np.zeros(DRAWS, np.float32)
    said = draw(rule_of(DRAWS), g)
    assert np.count_nonzero(said) == DRAWS
    assert abs((said > 0.0).mean() - 0.5) < 5.0 * 0.5 / math.sqrt(DRAWS)


def test_a_step_that_is_taken_again_draws_the_same_noise():
    g = np.zeros(NUMEL, np.float32)
    first = rule_of(NUMEL, 1.0)
    stream = [draw(first, g).tobytes() for _ in range(4)]
    assert len(set(stream)) == len(stream)
    again = rule_of(NUMEL, 1.0)
    again.resume(2)
    assert [draw(again, g).tobytes() for _ in range(2)] == stream[2:]
    assert draw(rule_of(NUMEL, 1.0, rank=2), g).tobytes() != stream[0]
    assert draw(rule_of(NUMEL, 1.0, seed=4), g).tobytes() != stream[0]


def test_the_noise_is_fixed_for_ever():
    """Golden values: a replay of an old job must find its noise again."""
    said = draw(rule_of(4, 1.0), np.zeros(4, np.float32)) * 2.0**24
    assert said.tolist() == [-10812715.0, -1802017.0, 2140383.0, 12364203.0]

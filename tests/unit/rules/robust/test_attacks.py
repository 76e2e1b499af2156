"""What hostile workers say."""

from __future__ import annotations

import numpy as np
import pytest

from psq.errors import UsageError
from psq.rules.attacks import ATTACKS, attack, little_quantile

SEEN = np.random.default_rng(0).standard_normal((8, 200)).astype(np.float32)


def say(kind, *, seen=SEEN, hostile=3, strength=None, seed=0):
    rng = np.random.default_rng(seed)
    return attack(
        kind,
        SEEN[0],
        seen=seen,
        world_size=11,
        hostile=hostile,
        rng=rng,
        strength=strength,
    )


@pytest.mark.parametrize("kind", sorted(set(ATTACKS) - {"silent"}))
def test_an_attack_has_the_gradients_shape_and_leaves_it_alone(kind):
    before = SEEN.copy()
    said = say(kind)
    assert said.shape == (200,)
    assert said.dtype == np.float32
    np.testing.assert_array_equal(SEEN, before)


def test_flipped_and_scaled_gradients_point_uphill():
    np.testing.assert_array_equal(say("sign-flip"), -SEEN[0])
    np.testing.assert_array_equal(say("scaled"), -100 * SEEN[0])
    np.testing.assert_array_equal(say("sign-flip", strength=3), -3 * SEEN[0])


def test_noise_has_the_gradients_size_times_the_strength_and_follows_the_seed():
    size = np.sqrt((SEEN[0] ** 2).mean())
    assert say("random", strength=5).std() == pytest.approx(5 * size, rel=0.2)
    np.testing.assert_array_equal(say("random"), say("random"))
    assert (say("random") != say("random", seed=1)).any()


def test_nan_and_silence():
    assert np.isnan(say("nan")).all()
    assert say("silent") is None


@pytest.mark.parametrize(
    ("workers", "hostile", "z"),
    [(50, 24, 1.4), (11, 5, 0.9674), (11, 3, 0.3186), (3, 1, 0.0), (4, 3, 0.0)],
)
def test_z_is_the_normal_quantile_of_those_who_need_not_look_worse(workers, hostile, z):
    # of 50 with 24 hostile: s = 26 - 24 = 2 must look worse, of 26 honest: the quantile of 24 / 26
    assert little_quantile(workers, hostile) == pytest.approx(z, abs=0.03)


def test_colluders_stay_within_the_honest_spread():
    said = say("little", hostile=5)
    z = little_quantile(11, 5)
    np.testing.assert_allclose(said, SEEN.mean(axis=0) - z * SEEN.std(axis=0), rtol=1e-5, atol=1e-6)
    inside = (said >= SEEN.min(axis=0)) & (said <= SEEN.max(axis=0))
    assert inside.mean() > 0.95


def test_a_strength_replaces_z():
    said = say("little", strength=1.5)
    np.testing.assert_allclose(said, SEEN.mean(axis=0) - 1.5 * SEEN.std(axis=0), atol=1e-5)


def test_what_cannot_be_attacked_is_refused_in_words():
    with pytest.raises(UsageError, match="no attack is called 'bite'; there are sign-flip, scaled"):
        say("bite")
    with pytest.raises(UsageError, match="need the gradients of 2 or more workers, got 1"):
        say("little", seen=SEEN[:1])
    for workers, hostile in ((3, 0), (3, 3)):
        with pytest.raises(UsageError, match="at least one of each kind"):
            little_quantile(workers, hostile)

"""How little the noisy messages of one worker reveal: an (epsilon, delta) accountant.

    one step    c = g min(1, clip / |g|) + sigma N(0, 1)        what leaves the worker is made of c
    unit        the whole contribution of one worker to a step, replaced by any other (replace-one):
                two clipped gradients are at most 2 clip apart, the sensitivity D
    T steps     the unit may be replaced in all of T steps

    RDP         order a of one step:  a D^2 / (2 sigma^2);  of T steps: the sum (Mironov 2017)
    to (e, d)   e = T a D^2 / (2 sigma^2) + log((a - 1) / a) - (log d + log a) / (a - 1), at the
                a > 1 where it is least (Canonne, Kamath, Steinke 2020)
    exact       T steps of Gaussian noise are one, of mu = sqrt(T) D / sigma:
                d = Phi(mu / 2 - e / mu) - exp(e) Phi(-mu / 2 - e / mu)  (Balle, Wang 2018)
    classic     sigma = (D / e) sqrt(2 log(1.25 / d)), one step, e < 1 (Dwork, Roth 2014)

All after the papers named, from memory; the tests hold RDP and classic to the exact curve, which is
checked by integration. Not claimed: amplification by sampling, anything about several workers
together, or floating point, of which the theory knows nothing. docs/privacy.md has the assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from psq.errors import ConfigError, UsageError
from psq.recipe import Recipe

__all__ = [
    "DELTA",
    "Release",
    "Spent",
    "classic_sigma",
    "gaussian_delta",
    "gaussian_epsilon",
    "privacy_words",
    "rdp",
    "rdp_epsilon",
    "recipe_release",
    "sigma_for",
    "spent",
]

DELTA: Final = 1e-5
"""What jobs state their epsilon at; psq privacy takes any."""
_ORDERS: Final = 1.0 + np.logspace(-3.0, 5.0, 4001)
_HALVINGS: Final = 200
_FAR: Final = 25.0  # where erfc has few digits left, and its expansion many


@dataclass(frozen=True, slots=True)
class Release:
    """What a worker says in a job: `steps` gradients, clipped and noisy.

    Args:
        clip: largest L2 norm of a whole gradient, > 0.
        sigma: standard deviation of the noise, >= 0, in the gradient's unit.
        steps: in how many steps the protected data may take part, >= 0.
    """

    clip: float
    sigma: float
    steps: int

    def __post_init__(self) -> None:
        """Refuse what is no mechanism."""
        if not (math.isfinite(self.clip) and self.clip > 0.0):
            msg = f"clip must be a number > 0, got {self.clip!r}"
            raise ConfigError(msg)
        if not (math.isfinite(self.sigma) and self.sigma >= 0.0):
            msg = f"sigma must be a number >= 0, got {self.sigma!r}"
            raise ConfigError(msg)
        if self.steps < 0:
            msg = f"steps must be >= 0, got {self.steps}"
            raise ConfigError(msg)

    @property
    def sensitivity(self) -> float:
        """How far apart two contributions of one worker may be: 2 clip."""
        return 2.0 * self.clip

    @property
    def mu(self) -> float:
        """The one Gaussian that all steps together are, in units of its noise."""
        if not self.steps:
            return 0.0
        return math.sqrt(self.steps) * self.sensitivity / self.sigma if self.sigma else math.inf


@dataclass(frozen=True, slots=True)
class Spent:
    """What a release amounts to; infinite where nothing is promised.

    Attributes:
        delta: the probability that the promise does not hold.
        epsilon: by RDP: what psq states.
        order: the RDP order it was least at.
        exact: the least epsilon there is for Gaussian noise.
        one_step: the exact epsilon of one step alone, for data that is in one step only.
    """

    delta: float
    epsilon: float
    order: float
    exact: float
    one_step: float


def spent(release: Release, delta: float) -> Spent:
    """The (epsilon, delta) of a release.

    Raises:
        UsageError: delta is not between 0 and 1.
    """
    epsilon, order = rdp_epsilon(release, delta)
    one = Release(release.clip, release.sigma, min(release.steps, 1))
    return Spent(
        delta=delta,
        epsilon=epsilon,
        order=order,
        exact=gaussian_epsilon(release.mu, delta),
        one_step=gaussian_epsilon(one.mu, delta),
    )


def rdp(release: Release, order: float) -> float:
    """The Renyi divergence of this order, > 1, that all steps together stay below."""
    return order * release.mu**2 / 2.0


def rdp_epsilon(release: Release, delta: float) -> tuple[float, float]:
    """The epsilon that follows from RDP at this delta, and the order it follows at.

    Any order gives a valid epsilon; the least over a grid of 4001 from 1.001 to 100,001 is taken.
    """
    _check_delta(delta)
    if release.mu == 0.0:
        return 0.0, math.inf
    if math.isinf(release.mu):
        return math.inf, 1.0
    divergence = _ORDERS * (release.mu**2 / 2.0)
    loss = (math.log(delta) + np.log(_ORDERS)) / (_ORDERS - 1.0)
    epsilons = divergence + np.log1p(-1.0 / _ORDERS) - loss
    best = int(np.argmin(epsilons))
    return max(0.0, float(epsilons[best])), float(_ORDERS[best])


def gaussian_delta(mu: float, epsilon: float) -> float:
    """The least delta of a Gaussian whose sensitivity is mu of its standard deviation."""
    if mu == 0.0:
        return 0.0
    if math.isinf(mu):
        return 1.0
    above, below = mu / 2.0 - epsilon / mu, -mu / 2.0 - epsilon / mu
    return max(0.0, math.exp(_log_phi(above)) - math.exp(epsilon + _log_phi(below)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The least epsilon of such a Gaussian at this delta: by bisection, from above."""
    _check_delta(delta)
    if math.isinf(mu):
        return math.inf
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(mu, high) > delta:
        low, high = high, 2.0 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if gaussian_delta(mu, middle) > delta else (low, middle)
    return high


def classic_sigma(sensitivity: float, epsilon: float, delta: float) -> float:
    """The noise of the classic Gaussian mechanism for one step.

    Raises:
        UsageError: its proof needs 0 < epsilon < 1 and a delta between 0 and 1.
    """
    _check_delta(delta)
    if not 0.0 < epsilon < 1.0:
        msg = f"the classic formula holds for an epsilon between 0 and 1, got {epsilon!r}"
        raise UsageError(msg)
    return sensitivity / epsilon * math.sqrt(2.0 * math.log(1.25 / delta))


def sigma_for(epsilon: float, delta: float, *, clip: float, steps: int) -> float:
    """The least noise with which all steps together stay below epsilon by RDP, to 1e-9 of itself.

    Raises:
        UsageError: epsilon is not a number > 0, or delta not between 0 and 1.
        ConfigError: clip or steps make no release.
    """
    if not (math.isfinite(epsilon) and epsilon > 0.0):
        msg = f"epsilon must be a number > 0, got {epsilon!r}"
        raise UsageError(msg)

    def is_enough(sigma: float) -> bool:
        return rdp_epsilon(Release(clip, sigma, steps), delta)[0] <= epsilon

    if is_enough(0.0):
        return 0.0
    low, high = 0.0, clip
    while not is_enough(high):
        low, high = high, 2.0 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2.0
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def recipe_release(recipe: Recipe, steps: int) -> Release | None:
    """What a worker of this recipe releases in so many steps; None where no noise is added."""
    if recipe.direction.kind != "gaussian":
        return None
    options = dict(recipe.direction.options)
    return Release(float(options["clip"]), float(options["sigma"]), steps)


def privacy_words(release: Release, delta: float = DELTA) -> str:
    """A release in a line, for a log."""
    found = spent(release, delta)
    return (
        f"privacy of one worker's whole contribution over {release.steps:,} steps: "
        f"epsilon {_shown(found.epsilon)} at delta {delta:g} (in one step only: "
        f"{_shown(found.one_step)}); clip {release.clip:g}, sigma {release.sigma:g}; "
        "assumptions in docs/privacy.md"
    )


def _shown(epsilon: float) -> str:
    return "infinite: there is no noise" if math.isinf(epsilon) else f"{epsilon:.4g}"


def _check_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        msg = f"delta must lie between 0 and 1, got {delta!r}"
        raise UsageError(msg)


def _log_phi(x: float) -> float:
    """The logarithm of the standard normal distribution function."""
    if x > -_FAR:
        return math.log(math.erfc(-x / math.sqrt(2.0)) / 2.0)
    square = 1.0 / (x * x)  # the asymptotic series: what is left out is below 105 / x^8
    series = 1.0 - square * (1.0 - square * (3.0 - 15.0 * square))
    return -x * x / 2.0 - math.log(-x * math.sqrt(2.0 * math.pi)) + math.log(series)

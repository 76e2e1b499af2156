"""The sufficient condition of generic Adam, evaluated over the steps that a job has.

    v <- theta_t v + (1 - theta_t) g^2;  m <- beta_t m + (1 - beta_t) g;  x -= alpha_t m / sqrt(v)

It converges to stationary points if (after 1811.09358 and 2101.05471, recalled)

    momentum     0 <= beta_t <= beta < 1
    memory       0 < theta_t < 1, never falling
    step size    chi_t = alpha_t / sqrt(1 - theta_t) is almost non-increasing: at most C times some
                 sequence that never rises, and at least that sequence
    sum          S(T) = sum_{t <= T} alpha_t sqrt(1 - theta_t) / (T alpha_T)  tends to 0

and S(T) is then the rate, up to constants: with alpha_t ~ t^-s and 1 - theta_t ~ t^-r it is
T^(-r/2) where r/2 + s < 1, log T / T^(1-s) where it is 1, T^-(1-s) where it is more.

The condition speaks of all t, a job has T steps. Of constants and powers, where the exponents say
what happens in the end, the exponents decide. Of anything else it is decided by what is seen up to
T: C must not have grown in the last half of the steps, and S must have fallen. S(T) bounds the best
of the first T iterates, which is no worse than the best of fewer, so the least S in the last half
counts [derived]: that is what matters where alpha_T ends at 0.

Three verdicts: "holds", "fails", and "stalls" for a sum that ends at a floor, as it does with any
constant theta: then the theorem promises a neighbourhood, whose size goes with the floor. With
torch's 0.999 the floor is 0.03, and practice is content; a floor near 1 promises nothing, and
docs/theory.md shows one that diverges. Steps of size 0 move nothing and are left out. Nothing here
is a necessary condition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from psq.errors import UsageError
from psq.recipe import AdamConfig, Recipe
from psq.schedules import OneMinusPower, Power, Schedule, schedule_value

__all__ = [
    "MAX_STEPS",
    "QUIET_FLOOR",
    "Condition",
    "ScheduleReport",
    "check_recipe",
    "check_schedule",
    "schedule_warning",
]

MAX_STEPS: Final = 10_000_000
QUIET_FLOOR: Final = 0.1
"""A sum that stalls below it is nobody's worry: torch's constants stall at 0.03."""
_STILL_GROWS: Final = 1.01  # of C, from half of the steps to all
_STILL_FALLS: Final = 0.99  # of S, from the second quarter of the steps to the last half
_ROUNDING: Final = 1e-12

Verdict: TypeAlias = Literal["holds", "stalls", "fails"]
AnySchedule: TypeAlias = Schedule | Callable[[int], float]
_Series: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Condition:
    """One of the four, and what was seen of it."""

    name: str
    verdict: Verdict
    words: str


@dataclass(frozen=True, slots=True)
class ScheduleReport:
    """What `check_schedule` found.

    Attributes:
        steps: T.
        conditions: momentum, memory, step size, sum.
        chi_factor: the least C up to T.
        sum_value: S(T); infinite where alpha_T is 0.
        least_sum: the least S in the last half of the steps.
        least_at: the step it was at.
        rate: the sum's rate in words, for constants and powers; else empty.
    """

    steps: int
    conditions: tuple[Condition, ...]
    chi_factor: float
    sum_value: float
    least_sum: float
    least_at: int
    rate: str

    @property
    def verdict(self) -> Verdict:
        """The worst of the four."""
        found = {condition.verdict for condition in self.conditions}
        return "fails" if "fails" in found else "stalls" if "stalls" in found else "holds"

    @property
    def words(self) -> str:
        """What is wrong, or that nothing is, in a line."""
        wrong = [c for c in self.conditions if c.verdict != "holds"]
        if not wrong:
            return f"the sufficient condition of generic Adam holds; rate {self.rate or 'unknown'}"
        return "; ".join(f"{each.name} {each.verdict}: {each.words}" for each in wrong)


def check_schedule(
    alpha: AnySchedule,
    theta: AnySchedule,
    T: int,  # noqa: N803 - the paper's letter
    *,
    beta: AnySchedule = 0.9,
) -> ScheduleReport:
    """Evaluate the sufficient condition of generic Adam over steps 1..T.

    Args:
        alpha: step sizes, a schedule or any function of t = 1, 2, ...
        theta: weights of the old second moment, likewise.
        T: how many steps, 2..MAX_STEPS.
        beta: weights of the old first moment, likewise.

    Raises:
        UsageError: T is out of range, or a step size is negative or no number.

    Cost: three calls a step for functions; some passes over arrays of T numbers.
    """
    if not 2 <= T <= MAX_STEPS:  # noqa: PLR2004 - half of the steps are some
        msg = f"a schedule is checked over 2 to {MAX_STEPS:,} steps, got {T}"
        raise UsageError(msg)
    return _report(_values(alpha, T), alpha, theta, beta, T)


def check_recipe(recipe: Recipe, alpha: AnySchedule, steps: int) -> ScheduleReport | None:
    """`check_schedule` of a recipe's Adam settings; None where there is nothing to check.

    Adam with bias correction is generic Adam with step sizes alpha_t sqrt(1 - prod theta) /
    (1 - prod beta), which is how it is looked at here [derived]. AMSGrad has another condition (the
    largest v so far never falls), and without Adam there is none.

    Args:
        recipe: the recipe.
        alpha: the learning rate by t = 1, 2, ...
        steps: T.

    Raises:
        UsageError: as `check_schedule`.
    """
    adam = recipe.adam
    if adam is None or adam.amsgrad:
        return None
    if not adam.bias_correction:
        return check_schedule(alpha, adam.theta, steps, beta=adam.beta)
    if not 2 <= steps <= MAX_STEPS:  # noqa: PLR2004 - as above
        return check_schedule(alpha, adam.theta, steps)  # refuses
    rates = _values(alpha, steps) * _correction(adam, steps)
    return _report(rates, alpha, adam.theta, adam.beta, steps)


def schedule_warning(recipe: Recipe, alpha: AnySchedule, steps: int) -> str:
    """What to warn of before a job starts; empty if nothing.

    A sum that stalls below QUIET_FLOOR is not warned of, and jobs of a step or none are not looked
    at; arguments are those of `check_recipe`.
    """
    if not 2 <= steps <= MAX_STEPS:  # noqa: PLR2004 - as above
        return ""
    report = check_recipe(recipe, alpha, steps)
    if report is None or report.verdict == "holds":
        return ""
    if report.verdict == "stalls" and report.least_sum <= QUIET_FLOOR:
        return ""
    return (
        f"Adam's schedule over {steps:,} steps: {report.words}. So the sufficient condition for "
        "convergence is not met; it may converge all the same (psq schedule shows all of it)"
    )


def _report(
    rates: _Series, alpha: AnySchedule, theta: AnySchedule, beta: AnySchedule, steps: int
) -> ScheduleReport:
    """The report, of step sizes that may be other than alpha's own but go the same way."""
    if not (np.all(np.isfinite(rates)) and np.all(rates >= 0.0)):
        t = int(np.argmin(np.isfinite(rates) & (rates >= 0.0))) + 1
        msg = f"a step size must be a finite number >= 0, got {rates[t - 1]!r} at t={t}"
        raise UsageError(msg)
    thetas, betas = _values(theta, steps), _values(beta, steps)
    rests = np.clip(1.0 - thetas, 0.0, None)
    factor = _chi_factors(rates, rests)
    sums = _sums(rates, rests)
    exponents = _exponents(alpha, theta)
    least = steps // 2 + int(np.argmin(sums[steps // 2 :]))
    return ScheduleReport(
        steps=steps,
        conditions=(
            _momentum(betas),
            _memory(thetas),
            _step_size(factor, exponents),
            _sum(sums, float(sums[least]), exponents),
        ),
        chi_factor=float(factor[-1]),
        sum_value=float(sums[-1]),
        least_sum=float(sums[least]),
        least_at=least + 1,
        rate=_rate_words(exponents),
    )


def _momentum(betas: _Series) -> Condition:
    most = float(np.max(betas))
    fits = bool(np.min(betas) >= 0.0) and most < 1.0
    return Condition("momentum", "holds" if fits else "fails", f"beta_t up to {most:.6g}")


def _memory(thetas: _Series) -> Condition:
    """Theta_1 = 0 is let pass: v then starts as g^2 [derived]."""
    inside = bool(np.min(thetas) >= 0.0) and bool(np.all(thetas[1:] > 0.0))
    falls = np.flatnonzero(np.diff(thetas) < -_ROUNDING)
    if not inside or np.max(thetas) >= 1.0:
        where = f"theta_t from {np.min(thetas):.6g} to {np.max(thetas):.6g} leaves (0, 1)"
        return Condition("memory", "fails", where)
    if falls.size:
        return Condition("memory", "fails", f"theta_t falls at t={falls[0] + 2}")
    return Condition("memory", "holds", f"theta_t from {thetas[0]:.6g} to {thetas[-1]:.6g}")


def _step_size(factors: _Series, exponents: tuple[float, float] | None) -> Condition:
    now, before = float(factors[-1]), float(factors[(factors.size - 1) // 2])
    if exponents is not None:
        s, r = exponents
        grows = r / 2.0 > s + _ROUNDING
        why = f"alpha_t / sqrt(1 - theta_t) goes as t^{r / 2.0 - s:.4g}"
    else:
        grows = not now <= before * _STILL_GROWS
        why = f"alpha_t / sqrt(1 - theta_t) has risen by {now:.4g} over its least value"
        why += f", {before:.4g} by half of the steps" if grows else ""
    return Condition("step size", "fails" if grows else "holds", f"{why}, C = {now:.4g}")


def _sum(sums: _Series, least: float, exponents: tuple[float, float] | None) -> Condition:
    value = f"S = {least:.4g}"
    if exponents is None:
        before = float(np.min(sums[sums.size // 4 : sums.size // 2 + 1]))
        if least <= before * _STILL_FALLS:
            return Condition("sum", "holds", f"{value}, and falls")
        return Condition("sum", "stalls", f"{value} in the last half, {before:.4g} before it")
    s, r = exponents
    if s > 1.0 + _ROUNDING:
        return Condition("sum", "fails", f"{value}, and grows: alpha_t falls faster than 1/t")
    if r <= _ROUNDING or s >= 1.0 - _ROUNDING:
        return Condition("sum", "stalls", f"{value}, and does not tend to 0")
    return Condition("sum", "holds", f"{value}, falls as {_rate_words(exponents)}")


def _chi_factors(rates: _Series, rests: _Series) -> _Series:
    """The least C for each number of steps: the most that chi has risen over an earlier value."""
    with np.errstate(divide="ignore", invalid="ignore"):
        chi = rates / np.sqrt(rests)
    moves = rates > 0.0
    least = np.minimum.accumulate(np.where(moves, chi, np.inf))
    with np.errstate(divide="ignore", invalid="ignore"):
        risen = np.where(moves, chi / least, 1.0)
    return np.maximum.accumulate(np.where(np.isnan(risen), np.inf, risen))


def _sums(rates: _Series, rests: _Series) -> _Series:
    """S for each number of steps; infinite where the last step size is 0."""
    t = np.arange(1, rates.size + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        above = np.cumsum(rates * np.sqrt(rests))
        values: _Series = above / (t * rates)
    values[rates == 0.0] = np.inf
    return values


def _correction(adam: AdamConfig, steps: int) -> _Series:
    """What bias correction makes of a step size."""
    thetas, betas = _values(adam.theta, steps), _values(adam.beta, steps)
    with np.errstate(under="ignore"):
        v_rest, m_rest = 1.0 - np.cumprod(thetas), 1.0 - np.cumprod(betas)
    made: _Series = np.sqrt(np.clip(v_rest, 0.0, None)) / m_rest
    return made


def _exponents(alpha: AnySchedule, theta: AnySchedule) -> tuple[float, float] | None:
    """(s, r) of constants and powers; None of anything else."""
    if isinstance(alpha, Power):
        s = alpha.exponent
    elif isinstance(alpha, int | float):
        s = 0.0
    else:
        return None
    if isinstance(theta, OneMinusPower):
        return s, theta.exponent
    return (s, 0.0) if isinstance(theta, int | float) else None


def _rate_words(exponents: tuple[float, float] | None) -> str:
    """The rate class of the sum."""
    if exponents is None:
        return ""
    s, r = exponents
    reach = r / 2.0 + s
    if r <= _ROUNDING or s >= 1.0 - _ROUNDING:
        return "none"
    if math.isclose(reach, 1.0):
        return f"log T / T^{1.0 - s:.4g}"
    return f"T^-{min(r / 2.0, 1.0 - s):.4g}"


def _values(schedule: AnySchedule, steps: int) -> _Series:
    """The schedule at t = 1..steps."""
    t = np.arange(1, steps + 1, dtype=np.float64)
    if isinstance(schedule, Power):
        return np.asarray(schedule.value / t**schedule.exponent)
    if isinstance(schedule, OneMinusPower):
        return np.asarray(1.0 - schedule.value / t**schedule.exponent)
    if isinstance(schedule, int | float):
        return np.full(steps, float(schedule))
    if callable(schedule):
        return np.array([schedule(n) for n in range(1, steps + 1)], np.float64)
    return np.array([schedule_value(schedule, n) for n in range(1, steps + 1)])

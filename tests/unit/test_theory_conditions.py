"""check_schedule: what holds, what stalls, what fails, and its numbers against plain sums."""

import math

import numpy as np
import pytest

from psq.errors import UsageError
from psq.presets import preset
from psq.recipe import Named, OneMinusPower, Power, register_schedule
from psq.theory import QUIET_FLOOR, check_recipe, check_schedule, schedule_warning

T = 4000


def verdicts(report):
    return {condition.name: condition.verdict for condition in report.conditions}


def plain_sum(alpha, theta, steps):
    total = sum(alpha(t) * math.sqrt(1 - theta(t)) for t in range(1, steps + 1))
    return total / (steps * alpha(steps))


@pytest.mark.parametrize(
    ("s", "r", "rate"),
    [
        (0.5, 0.5, "T^-0.25"),
        (0.5, 0.75, "T^-0.375"),
        (0.5, 1.0, "log T / T^0.5"),
        (0.75, 1.0, "T^-0.25"),
        (0.25, 0.5, "T^-0.25"),
    ],
)
def test_powers_that_fit_hold_and_name_their_rate(s, r, rate):
    report = check_schedule(Power(0.5, s), OneMinusPower(0.9, r), T)
    assert report.verdict == "holds"
    assert report.rate == rate
    assert rate in report.words


@pytest.mark.parametrize(("s", "r"), [(0.5, 0.5), (0.25, 0.5), (0.5, 1.0), (0.75, 1.0)])
def test_the_sum_really_falls_at_the_rate_that_is_named(s, r):
    values = [
        check_schedule(Power(0.5, s), OneMinusPower(0.9, r), steps).sum_value
        for steps in (250_000, 1_000_000)
    ]
    exponent = min(r / 2, 1 - s)
    logarithm = math.log(1_000_000) / math.log(250_000) if r / 2 + s == 1 else 1.0
    assert values[1] / values[0] == pytest.approx(4**-exponent * logarithm, rel=0.03)


def test_the_sum_and_the_factor_are_what_plain_python_makes_of_any_functions():
    def alpha(t):
        return 0.1 / math.sqrt(t + 5) * (1.3 + math.sin(t))

    def theta(t):
        return 1 - 0.5 / (t + 1)

    report = check_schedule(alpha, theta, 300)
    assert report.sum_value == pytest.approx(plain_sum(alpha, theta, 300), rel=1e-12)
    chi = [alpha(t) / math.sqrt(1 - theta(t)) for t in range(1, 301)]
    risen = max(chi[j] / chi[i] for i in range(300) for j in range(i, 300))
    assert report.chi_factor == pytest.approx(risen, rel=1e-12)
    least = min(plain_sum(alpha, theta, t) for t in range(151, 301))
    assert report.least_sum == pytest.approx(least, rel=1e-12)
    assert 151 <= report.least_at <= 300


def test_a_function_is_judged_as_the_power_it_is():
    by_power = check_schedule(Power(0.5, 0.5), OneMinusPower(0.9, 0.75), T)
    by_function = check_schedule(lambda t: 0.5 / t**0.5, lambda t: 1 - 0.9 / t**0.75, T)
    assert verdicts(by_function) == verdicts(by_power)
    assert by_function.rate == ""
    assert by_function.sum_value == pytest.approx(by_power.sum_value)


def test_memory_that_grows_faster_than_steps_shrink_fails_by_its_step_size():
    for report in (
        check_schedule(0.001, OneMinusPower(0.9, 0.5), T),
        check_schedule(lambda _: 0.001, lambda t: 1 - 0.9 / t**0.5, T),
    ):
        assert verdicts(report)["step size"] == "fails"
        assert report.verdict == "fails"
        assert report.chi_factor == pytest.approx(T**0.25, rel=1e-9)


def test_memory_that_falls_or_leaves_its_range_fails():
    falling = check_schedule(0.01, lambda t: 0.9 + 0.05 / t, T)
    assert "falls at t=2" in falling.words
    assert verdicts(check_schedule(0.01, 1.0, T))["memory"] == "fails"
    assert verdicts(check_schedule(0.01, 0.0, T))["memory"] == "fails"
    assert verdicts(check_schedule(0.01, 0.999, T, beta=1.0))["momentum"] == "fails"


def test_memory_may_begin_with_the_first_gradient_alone():
    report = check_schedule(Power(0.5, 0.5), OneMinusPower(1.0, 0.75), T)
    assert verdicts(report)["memory"] == "holds"


def test_steps_that_shrink_faster_than_one_over_t_fail_by_the_sum():
    assert verdicts(check_schedule(Power(1.0, 1.5), OneMinusPower(0.5, 0.5), T))["sum"] == "fails"
    assert verdicts(check_schedule(Power(1.0, 1.0), OneMinusPower(0.5, 0.5), T))["sum"] == "stalls"


def test_constants_stall_at_the_floor_they_have():
    report = check_schedule(0.001, 0.99, T)
    assert report.verdict == "stalls"
    assert report.sum_value == pytest.approx(0.1)
    assert "S = 0.1," in report.words


def test_a_rate_that_ends_at_zero_is_judged_by_its_best_horizon():
    report = check_schedule(lambda t: 0.001 * (1 - (t - 1) / (T - 1)), 0.999, T)
    assert math.isinf(report.sum_value)
    assert report.least_sum == pytest.approx(1.5 * math.sqrt(0.001), rel=0.01)
    assert report.least_at == pytest.approx(T / 2, abs=1)


def test_a_warm_up_from_zero_is_a_constant_factor_and_nothing_worse():
    def warm(t):
        return min(1.0, (t - 1) / 100) / math.sqrt(t)

    report = check_schedule(warm, OneMinusPower(0.9, 0.75), T)
    assert report.verdict == "holds"
    assert report.chi_factor > 10
    growing = check_schedule(lambda t: warm(t) * t**0.25, OneMinusPower(0.9, 0.75), T)
    assert verdicts(growing)["step size"] == "fails"


def test_bias_correction_is_looked_at_as_the_step_sizes_it_makes():
    recipe = preset("server-adam").with_adam(beta=0.9, theta=0.99)

    def corrected(t):
        return 0.001 * math.sqrt(1 - 0.99**t) / (1 - 0.9**t)

    found = check_recipe(recipe, 0.001, 500)
    plain = check_schedule(corrected, 0.99, 500)
    assert found.chi_factor == pytest.approx(plain.chi_factor, rel=1e-9)
    assert found.sum_value == pytest.approx(plain.sum_value, rel=1e-9)
    without = check_recipe(recipe.with_adam(bias_correction=False), 0.001, 500)
    assert without.chi_factor == pytest.approx(1.0)


def test_what_has_no_adam_or_another_condition_is_not_looked_at():
    assert check_recipe(preset("ef-sgd"), 0.1, T) is None
    assert check_recipe(preset("server-amsgrad"), 0.1, T) is None
    assert schedule_warning(preset("ef-sgd"), 0.1, T) == ""


@pytest.mark.parametrize(
    "name", ["server-adam", "qadam", "qadam-1bit", "shared-direction", "diloco"]
)
def test_torchs_settings_are_not_warned_of(name):
    assert schedule_warning(preset(name), 0.001, T) == ""
    assert schedule_warning(preset(name), lambda t: 0.001 * (1 - (t - 1) / T), T) == ""


def test_what_is_warned_of_is_named_with_its_number():
    recipe = preset("server-adam")
    short = schedule_warning(recipe.with_adam(theta=0.9), 0.001, T)
    assert "sum stalls: S = 0.31" in short
    grows = schedule_warning(recipe.with_adam(theta=OneMinusPower(0.9, 0.5)), 0.001, T)
    assert "step size fails" in grows
    assert schedule_warning(recipe.with_adam(theta=0.9), 0.001, 1) == ""
    floor = check_recipe(recipe.with_adam(theta=1 - QUIET_FLOOR**2 / 2), 0.001, T)
    assert floor.least_sum < QUIET_FLOOR


def test_a_registered_schedule_is_evaluated_by_its_name():
    register_schedule("theory-test", lambda t, r: 1 - 0.5 / t**r)
    report = check_schedule(Power(0.5, 0.5), Named("theory-test", (0.75,)), T)
    assert report.verdict == "holds"
    assert report.sum_value == pytest.approx(
        check_schedule(Power(0.5, 0.5), OneMinusPower(0.5, 0.75), T).sum_value
    )


def test_steps_out_of_range_and_step_sizes_that_are_none_are_refused():
    with pytest.raises(UsageError, match="got 1"):
        check_schedule(0.1, 0.9, 1)
    with pytest.raises(UsageError, match="got 1"):
        check_recipe(preset("server-adam"), 0.1, 1)
    with pytest.raises(UsageError, match=r"at t=3"):
        check_schedule(lambda t: -1.0 if t == 3 else 1.0, 0.9, 10)
    with pytest.raises(UsageError, match=r"nan.*at t=2"):
        check_schedule(lambda t: np.nan if t == 2 else 1.0, 0.9, 10)

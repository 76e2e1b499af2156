"""What is known of these algorithms, as numbers: whether schedules converge, what noise hides.

    check_schedule(alpha, theta, T)      the sufficient condition of generic Adam, evaluated
    check_recipe(recipe, alpha, T)       the same for a recipe's Adam, its bias correction included
    spent(Release(...), delta)           the (epsilon, delta) of a worker's noisy messages

Arithmetic only: nothing here trains, draws, or looks at data. What the formulas are after, what was
derived, and what none of this promises is in docs/theory.md and docs/privacy.md.
"""

from psq.theory.conditions import (
    MAX_STEPS,
    QUIET_FLOOR,
    Condition,
    ScheduleReport,
    check_recipe,
    check_schedule,
    schedule_warning,
)
from psq.theory.privacy import (
    Release,
    Spent,
    classic_sigma,
    gaussian_delta,
    gaussian_epsilon,
    privacy_words,
    rdp,
    rdp_epsilon,
    recipe_release,
    sigma_for,
    spent,
)

__all__ = [
    "MAX_STEPS",
    "QUIET_FLOOR",
    "Condition",
    "Release",
    "ScheduleReport",
    "Spent",
    "check_recipe",
    "check_schedule",
    "classic_sigma",
    "gaussian_delta",
    "gaussian_epsilon",
    "privacy_words",
    "rdp",
    "rdp_epsilon",
    "recipe_release",
    "schedule_warning",
    "sigma_for",
    "spent",
]

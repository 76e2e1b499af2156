"""The job that settings add up to, checked before anything is started with it.

Imports numpy with the codecs, never torch.
"""

from __future__ import annotations

from psq.adam_text import missing_in_torch
from psq.clock import parse_consistency
from psq.codec import get_codec
from psq.config import WorkerConfig
from psq.errors import ConfigError
from psq.plan import Plan
from psq.presets import asked_recipe, find_preset
from psq.recipe import Recipe

__all__ = ["check_comparison", "check_job", "rate_warning", "recipe_of", "takes_adams_rate"]


def recipe_of(told: WorkerConfig) -> Recipe:
    """What a worker makes of its settings.

    Raises:
        ConfigError: no such recipe, codec or consistency, or no such Adam settings for it; the
            message lists what there is.
    """
    recipe = asked_recipe(told)
    get_codec(recipe.uplink.codec)
    get_codec(recipe.downlink.codec)
    parse_consistency(told.consistency)
    return recipe


def check_job(told: WorkerConfig) -> None:
    """Refuse what no model could be trained with.

    Raises:
        ConfigError: `recipe_of` refuses the recipe, or the consistency is none, or it or a part
            needs more workers than there are.
    """
    any_model = [("value", (1,))]
    Plan.of(any_model, recipe_of(told), told.world_size, consistency=told.consistency)


def check_comparison(recipe: Recipe) -> None:
    """Refuse Adam settings that the plain Adam of a comparison does not have.

    Raises:
        ConfigError: it names the setting.
    """
    missing = "" if recipe.adam is None else missing_in_torch(recipe.adam)
    if missing:
        msg = (
            f"adam: torch.optim.Adam has no {missing}, so there is nothing to compare with: "
            "psq launch trains without a comparison"
        )
        raise ConfigError(msg)


def takes_adams_rate(recipe: Recipe) -> bool:
    """Whether a learning rate that suits Adam suits this recipe: it has Adam, or a task brings it.

    The rates of others, from votes to SGD, differ by orders of magnitude.
    """
    return recipe.adam is not None or recipe.apply.kind == "return"


def rate_warning(told: WorkerConfig, recipe: Recipe, rate: float) -> str:
    """That a task's own learning rate is Adam's, where the recipe is none of Adam's; else empty."""
    if told.lr is not None or takes_adams_rate(recipe):
        return ""
    wants = find_preset(told.recipe).suggested
    return f"lr: {rate:g} is the task's, for Adam; what recipe {recipe.name} wants: {wants}"

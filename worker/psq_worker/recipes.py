"""The recipe that settings add up to, checked before anything is started with it.

Imports numpy with the codecs, never torch.
"""

from __future__ import annotations

from psq.adam_text import missing_in_torch, with_adam_text
from psq.codec import get_codec
from psq.config import WorkerConfig
from psq.errors import ConfigError
from psq.recipe import Recipe, preset

__all__ = ["check_available", "check_comparison", "recipe_of"]


def recipe_of(told: WorkerConfig) -> Recipe:
    """What a worker makes of its settings.

    Raises:
        ConfigError: no such recipe or codec, or no such Adam settings for it; the message lists
            what there is.
    """
    recipe = preset(told.recipe).with_codecs(uplink=told.uplink, downlink=told.downlink)
    get_codec(recipe.uplink.codec)
    get_codec(recipe.downlink.codec)
    return with_adam_text(recipe, told.adam)


def check_comparison(recipe: Recipe) -> None:
    """Refuse Adam settings that the plain Adam of a comparison does not have.

    Raises:
        ConfigError: it names the setting.
    """
    missing = missing_in_torch(recipe.adam)
    if missing:
        msg = (
            f"adam: torch.optim.Adam has no {missing}, so there is nothing to compare with: "
            "psq launch trains without a comparison"
        )
        raise ConfigError(msg)


def check_available(told: WorkerConfig, servers: int = 1) -> None:
    """Refuse settings that this version knows and does not act upon yet.

    Raises:
        ConfigError: it names the setting.
    """
    wanted = {
        "connect": len(told.endpoints) > 1,
        "consistency": told.consistency != "bsp",
        "overlap": told.overlap,
        "residual": told.residual != "f32",
    }
    for name in (name for name, is_wanted in wanted.items() if is_wanted):
        msg = f"{name}: {getattr(told, name)} is not available in this version: leave it out"
        raise ConfigError(msg)
    if servers > 1:
        msg = f"servers: several servers are not available in this version, got {servers}: one will"
        raise ConfigError(msg)

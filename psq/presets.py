"""The recipes that have names: psq's own, and those that other packages bring.

A package brings one by an entry point in the group psq.recipes, whose name is the recipe's and
whose object is a `Preset`. It is imported when someone first asks for it. Only the value travels:
a server needs the parts of a recipe, not its name.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from psq.adam_presets import ADAM_PRESETS
from psq.adam_text import with_adam_text
from psq.config import AUTO_RECIPE, WorkerConfig
from psq.errors import ConfigError
from psq.parts import entry, entry_names
from psq.preset import Preset
from psq.recipe import AdamConfig, Recipe
from psq.sgd_presets import SGD_PRESETS

__all__ = ["PRESETS", "RECIPES_GROUP", "Preset", "asked_recipe", "find_preset", "names", "preset"]

RECIPES_GROUP: Final = "psq.recipes"
PRESETS: Final[Mapping[str, Preset]] = MappingProxyType(
    {each.name: each for each in (*ADAM_PRESETS, *SGD_PRESETS)}
)


def names() -> tuple[str, ...]:
    """The names of all recipes, psq's own first; nothing is imported for it."""
    return tuple(dict.fromkeys([*PRESETS, *entry_names(RECIPES_GROUP)]))


def find_preset(name: str) -> Preset:
    """A recipe by its name, with what is to be known of it.

    Raises:
        ConfigError: no such recipe; the message lists what exists.
    """
    if name in PRESETS:
        return PRESETS[name]
    found = entry(RECIPES_GROUP, name, Preset)
    if found is None:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        msg = f"no recipe {name!r}; there are: {', '.join(names())}{hint}"
        raise ConfigError(msg)
    made, package = found
    return dataclasses.replace(made, package=package)


def preset(name: str, adam: AdamConfig | None = None) -> Recipe:
    """A recipe by its name.

    Raises:
        ConfigError: no such recipe, which the message lists, or it has no Adam to give settings to.
    """
    made = find_preset(name).make(adam or AdamConfig())
    if adam is not None and made.adam is None:
        msg = f"recipe {name!r} has no Adam: there is nothing to set"
        raise ConfigError(msg)
    return made


def asked_recipe(told: WorkerConfig, adam: AdamConfig | None = None) -> Recipe:
    """What a worker makes of its settings.

    Args:
        told: the settings.
        adam: Adam's, where they are given as a value and not as a text.

    Raises:
        ConfigError: no such recipe, or it cannot be what the settings ask for.
    """
    name = AUTO_RECIPE if told.codec == "auto" else told.recipe
    recipe = preset(name, adam).with_options(*told.changes)
    if adam is None:
        recipe = with_adam_text(recipe, told.adam)
    recipe = recipe.with_codecs(uplink=told.uplink, downlink=told.downlink)
    return recipe.with_rhythm(local_steps=told.local_steps, every=told.every)

"""A recipe with a name, and what to know before it is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from psq.recipe import AdamConfig, Recipe

__all__ = ["Preset"]


@dataclass(frozen=True, slots=True)
class Preset:
    """What `--recipe NAME` means; other packages bring them as entry points in psq.recipes.

    Args:
        name: as people type it; the recipe it makes has the same.
        make: the recipe, with these Adam settings where it has Adam.
        summary: a paragraph: what happens, and where the state is.
        source: whose idea it is.
        trap: when it fails, in a sentence.
        suggested: a setting to begin with.
        package: who brings it; empty for psq itself.
    """

    name: str
    make: Callable[[AdamConfig], Recipe]
    summary: str
    source: str
    trap: str
    suggested: str
    package: str = ""

"""The arithmetic of a recipe's parts: what a worker says, and what becomes of it.

A rule is the class that its part names (`psq.parts`), imported on first use; it works shard by
shard on vectors of its own. `make_*` builds the rules of a recipe, wherever they are to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from psq.kernels import Floats
from psq.layout import Layout
from psq.parts import load_rule
from psq.recipe import Downlink, Recipe, Uplink
from psq.rules.base import (
    AggregateRule,
    ApplyRule,
    ChoiceRule,
    DirectionRule,
    Judgement,
    Move,
    OptionValue,
    RoundView,
    RuleOptions,
    Said,
    Segments,
)

__all__ = [
    "AggregateRule",
    "ApplyRule",
    "ChoiceRule",
    "DirectionRule",
    "Judgement",
    "Move",
    "OptionValue",
    "RoundView",
    "RuleOptions",
    "Said",
    "Segments",
    "is_apart",
    "is_linear",
    "make_aggregate",
    "make_apply",
    "make_choice",
    "make_direction",
]


def make_choice(link: Uplink | Downlink, layout: Layout) -> ChoiceRule:
    """What says in which codec each message of an uplink or a downlink is written."""
    rule = load_rule(link.choice.part)
    options, codecs = dict(link.choice.options), link.choice.codecs(link.codec)
    return cast("ChoiceRule", rule(options, codecs=codecs, layout=layout))


def make_direction(  # noqa: PLR0913 - all that a direction may depend on
    recipe: Recipe,
    *,
    layout: Layout,
    world_size: int,
    rank: int,
    seed: int,
    choice: ChoiceRule | None = None,
    state: Mapping[str, Floats] | None = None,
) -> DirectionRule:
    """What one worker wants to say.

    Args:
        recipe: the job's.
        layout: the cut.
        world_size: of the job.
        rank: this worker's.
        seed: the job's.
        choice: the uplink's; made here when None.
        state: the vectors to work on; made by the rule when None.

    Raises:
        ConfigError: the rule cannot be imported, or cannot run with this recipe.
    """
    rule = load_rule(recipe.direction.part)
    made = rule(
        dict(recipe.direction.options),
        layout=layout,
        world_size=world_size,
        rank=rank,
        seed=seed,
        adam=recipe.adam,
        choice=choice or make_choice(recipe.uplink, layout),
        state=state,
    )
    return cast("DirectionRule", made)


def make_aggregate(
    recipe: Recipe,
    *,
    layout: Layout,
    world_size: int,
    state: Mapping[str, Floats] | None = None,
) -> AggregateRule:
    """How the messages of a server's shards become one; see `make_direction`."""
    rule = load_rule(recipe.aggregate.part)
    made = rule(dict(recipe.aggregate.options), layout=layout, world_size=world_size, state=state)
    return cast("AggregateRule", made)


def make_apply(
    recipe: Recipe,
    *,
    layout: Layout,
    world_size: int,
    choice: ChoiceRule | None = None,
    state: Mapping[str, Floats] | None = None,
) -> ApplyRule:
    """What becomes of the aggregate, on a server or on any node; see `make_direction`."""
    rule = load_rule(recipe.apply.part)
    made = rule(
        dict(recipe.apply.options),
        layout=layout,
        world_size=world_size,
        adam=recipe.adam,
        choice=choice or make_choice(recipe.uplink, layout),
        state=state,
    )
    return cast("ApplyRule", made)


def is_apart(recipe: Recipe) -> bool:
    """Whether workers compute at other weights than the job's between two rounds."""
    looks_ahead = bool(load_rule(recipe.direction.part).looks_ahead)
    return looks_ahead or recipe.direction.local_steps > 1


def is_linear(recipe: Recipe) -> bool:
    """Whether the server's step is the pushes' learning rate times something linear in them."""
    rule = cast("type[ApplyRule]", load_rule(recipe.apply.part))
    return rule.is_linear(dict(recipe.apply.options))

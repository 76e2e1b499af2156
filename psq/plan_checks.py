"""Which jobs a recipe can be run in: what a plan looks at before it defines one.

Each check raises `ConfigError` in words that say what to do; none keeps anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from psq.codec import get_codec
from psq.errors import ConfigError, LocalError
from psq.groups import Group
from psq.kernels import Family
from psq.layout import cut
from psq.recipe import Aggregate, Apply, Direction, Recipe
from psq.rules import make_aggregate, make_apply, make_direction

__all__ = [
    "check_codecs",
    "check_rules",
    "check_stale",
    "check_whole",
    "downlink_codecs",
    "uplink_codecs",
]

_ONE_VALUE: Final = cut([("value", (1,))], [lambda numel: numel])


def uplink_codecs(recipe: Recipe, group: Group) -> tuple[str, ...]:
    """Specs of the codecs that a group's pushes may be written in, the usual one first."""
    return recipe.uplink.choice.codecs(group.uplink or recipe.uplink.codec)


def downlink_codecs(recipe: Recipe, group: Group) -> tuple[str, ...]:
    """Specs of the codecs that a group's answers may be written in, the usual one first."""
    return recipe.downlink.choice.codecs(group.downlink or recipe.downlink.codec)


def check_codecs(recipe: Recipe, group: Group) -> None:
    """That all of a group's messages can be written."""
    family = recipe.aggregate.part.family
    for spec in uplink_codecs(recipe, group):
        if get_codec(spec).name != family and family and group.pushed:
            msg = (
                f"aggregate={recipe.aggregate.kind} reads {family} only, the uplink may be in "
                f"{spec}: choose a codec of the family {family}"
            )
            raise ConfigError(msg)
    for spec in downlink_codecs(recipe, group):
        downlink = get_codec(spec)
        if recipe.downlink.kind == "weights" and downlink.format.family == Family.TOPK:
            msg = (
                f"downlink weights:{downlink.spec} would make all but a few weights zero: "
                f"send changes by it, delta:{downlink.spec}"
            )
            raise ConfigError(msg)


def check_stale(recipe: Recipe, consistency: str) -> None:
    """That nothing in the recipe needs every push to be of the round that counts it."""
    if recipe.uplink.every > 1:
        msg = (
            f"every={recipe.uplink.every} needs bsp, got {consistency}: a late push "
            "would be of shards that its round does not move"
        )
        raise ConfigError(msg)
    if recipe.apply.part.in_step:
        msg = (
            f"apply={recipe.apply.kind} needs bsp, got {consistency}: a late push would be in "
            "another unit than the round it counts in; server-adam takes any rule"
        )
        raise ConfigError(msg)


def check_whole(recipe: Recipe, groups: Sequence[Group], servers: int) -> None:
    """That who needs whole rounds, or moves tensors by itself, sees all of them in each round."""
    parts: dict[str, Aggregate | Apply] = {"aggregate": recipe.aggregate, "apply": recipe.apply}
    who = [f"{slot}={each.kind}" for slot, each in parts.items() if each.part.whole]
    who += [f"group {group.name!r} that is not pushed" for group in groups if not group.pushed]
    if who and servers > 1:
        msg = f"{who[0]} needs the whole model on one server, got {servers} servers"
        raise ConfigError(msg)
    if who and recipe.uplink.every > 1:
        msg = f"{who[0]} needs every shard in every round, got every={recipe.uplink.every}"
        raise ConfigError(msg)


def check_rules(recipe: Recipe, workers: int) -> None:
    """That every part can run in this job: its arithmetic is made once, for a model of one value.

    A server that found out later would have to end the job. What a rule of another package raises
    is its plan's fault, and never ends the server that looks at it.
    """
    job: dict[str, Any] = {"layout": _ONE_VALUE, "world_size": workers}
    makers: tuple[tuple[Direction | Aggregate | Apply, Callable[[], object]], ...] = (
        (recipe.direction, lambda: make_direction(recipe, rank=0, seed=0, **job)),
        (recipe.aggregate, lambda: make_aggregate(recipe, **job)),
        (recipe.apply, lambda: make_apply(recipe, **job)),
    )
    for each, make in makers:
        try:
            make()
        except LocalError:
            raise
        except Exception as error:
            package = each.part.package or "psq"
            msg = (
                f"{each.kind} of the package {package} cannot run in a job of {workers} workers: "
                f"{error!r}: mend that package"
            )
            raise ConfigError(msg) from error

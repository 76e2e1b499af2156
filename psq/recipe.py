"""An algorithm as a value: five parts, composed, never a class tree.

    direction  (worker)  what a worker wants to say this step: its gradient, a step of its own, ...
    uplink               how that is said: a codec (or a choice of several), error feedback or not
    aggregate  (server)  how the workers' messages become one
    apply      (server)  what becomes of it: added to the weights, a step of SGD or Adam, ...
    downlink             how the server answers: weights through a codec, the weights' change, or
                         the aggregate itself, with which every node then does the same

A recipe is plain data. It travels in the plan, so that every process of a job can compare it, and
nothing in it is code: parts and schedules are names with numbers (`psq.parts`, `psq.schedules`).
The math lives in `psq.optim`, `psq.feedback`, `psq.rules` and `psq_server.reduce`; this module only
says what is meant and refuses what makes no sense. `psq.presets` has the recipes with names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from psq import parts
from psq.adam_config import (
    AdamConfig,
    EpsPlacement,
    adam_from_plain,
    adam_plain,
    replace_adam,
)
from psq.errors import ConfigError
from psq.option_text import PLACES, Changes, parse_changes
from psq.parts import Value, part
from psq.recipe_parts import (
    MAX_EVERY,
    MAX_LOCAL_STEPS,
    Aggregate,
    Apply,
    Choice,
    Direction,
    Downlink,
    DownlinkKind,
    Uplink,
    downlink_kind,
    flag_from_plain,
    part_from_plain,
    part_plain,
    text_from_plain,
)
from psq.schedules import (
    Named,
    OneMinusPower,
    Power,
    Schedule,
    rate_of,
    register_schedule,
    schedule_value,
)

__all__ = [
    "MAX_EVERY",
    "MAX_LOCAL_STEPS",
    "AdamConfig",
    "Aggregate",
    "Apply",
    "Choice",
    "Direction",
    "Downlink",
    "DownlinkKind",
    "EpsPlacement",
    "Named",
    "OneMinusPower",
    "Power",
    "Recipe",
    "Schedule",
    "Uplink",
    "rate_of",
    "register_schedule",
    "schedule_value",
]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One algorithm: see the module's docstring."""

    name: str
    direction: Direction
    uplink: Uplink
    apply: Apply
    downlink: Downlink
    aggregate: Aggregate = field(default_factory=Aggregate)

    def __post_init__(self) -> None:
        """Refuse parts that do not fit together."""
        for fault in (
            _meaning_fault(self),
            _partner_fault(self),
            _downlink_fault(self),
            _rhythm_fault(self),
            _feedback_fault(self),
            _adam_fault(self),
        ):
            if fault:
                msg = f"recipe {self.name!r}: {fault}"
                raise ConfigError(msg)

    @property
    def adam(self) -> AdamConfig | None:
        """The Adam settings, wherever the moments live; None where there is no Adam."""
        return self.direction.adam or self.apply.adam

    @property
    def whole(self) -> bool:
        """Whether the server needs a whole round before it can reduce the first shard."""
        return self.aggregate.part.whole or self.apply.part.whole

    def with_adam(self, **changes: Any) -> Recipe:
        """The same recipe with some Adam settings changed, wherever they are.

        Raises:
            ConfigError: it has no Adam, or no such setting.
        """
        if self.adam is None:
            msg = f"recipe {self.name!r} has no Adam: there is nothing to set"
            raise ConfigError(msg)
        adam = replace_adam(self.adam, changes)
        direction, apply = self.direction, self.apply
        if direction.adam is not None:
            direction = dataclasses.replace(direction, adam=adam)
        if apply.adam is not None:
            apply = dataclasses.replace(apply, adam=adam)
        return dataclasses.replace(self, direction=direction, apply=apply)

    def with_options(self, *texts: str, **given: str | Mapping[str, Value]) -> Recipe:
        """The same recipe with other parts, or other options of its parts, all changed at once.

            recipe.with_options("aggregate=krum", "aggregate.f=2", "uplink.choice.bits=4")
            recipe.with_options(aggregate={"f": 2}, apply="sgd", uplink={"error_feedback": False})

        A part of another kind begins with its defaults. See `psq.option_text` for all places.

        Raises:
            ConfigError: no such place, kind or option, a value it does not take, or parts that do
                not fit together; the message lists what there is.
        """
        return _changed(self, parse_changes(texts, given))

    def with_codecs(self, *, uplink: str | None = None, downlink: str | None = None) -> Recipe:
        """The same recipe with other codecs.

        `downlink` may begin with "weights:", "delta:" or "mean:" to change its kind, as in
        "delta:sign" or "weights:uniform:bits=8".
        """
        recipe = self
        if uplink is not None:
            recipe = dataclasses.replace(
                recipe, uplink=dataclasses.replace(self.uplink, codec=uplink)
            )
        if downlink is not None:
            recipe = dataclasses.replace(recipe, downlink=_parse_downlink(downlink, self.downlink))
        return recipe

    def with_rhythm(self, *, local_steps: int | None = None, every: int | None = None) -> Recipe:
        """The same recipe with another rhythm of pushes; None leaves what it has."""
        recipe = self
        if local_steps is not None:
            direction = dataclasses.replace(self.direction, local_steps=local_steps)
            recipe = dataclasses.replace(recipe, direction=direction)
        if every is not None:
            uplink = dataclasses.replace(self.uplink, every=every)
            recipe = dataclasses.replace(recipe, uplink=uplink)
        return recipe

    def to_plain(self) -> dict[str, Any]:
        """Plain data in a fixed order: what the plan's digest covers."""
        return {
            "name": self.name,
            "direction": {
                **part_plain(self.direction),
                "adam": adam_plain(self.direction.adam),
                "local_steps": self.direction.local_steps,
            },
            "uplink": {
                "codec": self.uplink.codec,
                "error_feedback": self.uplink.error_feedback,
                "every": self.uplink.every,
                "choice": part_plain(self.uplink.choice),
            },
            "aggregate": part_plain(self.aggregate),
            "apply": {**part_plain(self.apply), "adam": adam_plain(self.apply.adam)},
            "downlink": {
                "kind": self.downlink.kind,
                "codec": self.downlink.codec,
                "error_feedback": self.downlink.error_feedback,
                "choice": part_plain(self.downlink.choice),
            },
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_plain`. Raises ConfigError on anything a recipe cannot be."""
        try:
            direction, aggregate, apply = plain["direction"], plain["aggregate"], plain["apply"]
            uplink, downlink = plain["uplink"], plain["downlink"]
            return cls(
                name=text_from_plain(plain["name"]),
                direction=Direction(
                    **part_from_plain("direction", direction),
                    adam=adam_from_plain(direction["adam"]),
                    local_steps=direction["local_steps"],
                ),
                uplink=Uplink(
                    text_from_plain(uplink["codec"]),
                    flag_from_plain(uplink["error_feedback"]),
                    uplink["every"],
                    Choice(**part_from_plain("choice", uplink["choice"])),
                ),
                aggregate=Aggregate(**part_from_plain("aggregate", aggregate)),
                apply=Apply(**part_from_plain("apply", apply), adam=adam_from_plain(apply["adam"])),
                downlink=Downlink(
                    downlink["kind"],
                    text_from_plain(downlink["codec"]),
                    flag_from_plain(downlink["error_feedback"]),
                    Choice(**part_from_plain("choice", downlink["choice"])),
                ),
            )
        except (KeyError, TypeError, AttributeError) as error:
            msg = f"not a recipe: {error!r}"
            raise ConfigError(msg) from error


def _meaning_fault(recipe: Recipe) -> str:
    """Why the message does not mean what the server takes it for; empty if it does."""
    aggregate, apply = recipe.aggregate, recipe.apply
    said = recipe.direction.meaning
    for slot, each in (("aggregate", aggregate), ("apply", apply)):
        taken = each.part.takes_with(each.options)
        if said not in taken:
            wanted = " or ".join(f"{meaning}s" for meaning in taken)
            others = [text for text in each.part.takes if text.startswith(f"{said} if ")]
            hint = f" ({others[0]} is set)" if others else ""
            if slot == "apply" and aggregate.part.says:
                return f"apply={each.kind} takes {wanted}, aggregate={aggregate.kind} makes {said}s"
            return (
                f"{slot}={each.kind} needs workers that send {wanted}{hint}, "
                f"direction={recipe.direction.kind} sends {said}s"
            )
        said = each.part.says or said
    return ""


def _partner_fault(recipe: Recipe) -> str:
    """Which part misses another one that it works with only; empty if none does."""
    there: dict[str, Direction | Aggregate | Apply | Choice] = {
        "direction": recipe.direction,
        "aggregate": recipe.aggregate,
        "apply": recipe.apply,
        "choice": recipe.uplink.choice,
    }
    for slot, each in there.items():
        for need in each.part.needs:
            where, _, kind = need.partition("=")
            if there[where].kind != kind:
                return f"{slot}={each.kind} needs {need}, got {where}={there[where].kind}"
    if recipe.aggregate.part.says == "vote" and recipe.uplink.error_feedback:
        return (
            f"aggregate={recipe.aggregate.kind} counts votes, which have no size, so what workers "
            "feed back would not be what it left out: set uplink.error_feedback=false"
        )
    up, down = recipe.uplink.choice, recipe.downlink.choice
    if recipe.apply.part.in_step and up != down:
        return (
            f"apply={recipe.apply.kind} needs the same choice of codecs both ways, "
            f"got {_shown(up)} up and {_shown(down)} down"
        )
    return ""


def _downlink_fault(recipe: Recipe) -> str:
    """Why this answer is none to what the server does; empty if it is."""
    kind, apply = recipe.downlink.kind, recipe.apply
    if kind == "mean" and not apply.part.replicable:
        return (
            f"downlink=mean needs an apply that every node can run, apply={apply.kind} runs on "
            "the server only: send weights or delta"
        )
    if kind != "mean" and apply.part.replicated:
        return (
            f"apply={apply.kind} runs on every node: it needs downlink=mean, got {kind}; a recipe "
            "that answers otherwise is server-adam"
        )
    return ""


def _rhythm_fault(recipe: Recipe) -> str:
    """Why shards cannot take turns as asked; empty if they can, or need not."""
    every = recipe.uplink.every
    if every > 1 and not recipe.uplink.error_feedback:
        return (
            f"uplink every={every} needs error feedback: what a shard does not say waits in the "
            "residual"
        )
    if every > 1 and recipe.apply.part.in_step:
        return (
            f"apply={recipe.apply.kind} moves every shard in every round, got every={every}: take "
            "server-adam, or another recipe that takes turns"
        )
    return ""


def _feedback_fault(recipe: Recipe) -> str:
    """Why what a codec leaves out would be kept twice; empty if it is not."""
    if recipe.uplink.error_feedback and recipe.direction.part.remembers:
        return (
            f"direction={recipe.direction.kind} keeps what a codec leaves out by itself, with "
            "error feedback it would be said twice: set uplink.error_feedback=false"
        )
    return ""


def _adam_fault(recipe: Recipe) -> str:
    """Two parts that need Adam's settings share them."""
    mine, theirs = recipe.direction.adam, recipe.apply.adam
    if mine is not None and theirs is not None and mine != theirs:
        return "direction and apply have one set of Adam settings, got two: use with_adam"
    return ""


def _changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with all changes made before it is looked at again."""
    made = {place: _changed_part(recipe, place, changes) for place in PLACES}
    up, down = recipe.uplink, _downlink_of_kind(recipe.downlink, changes.kinds.get("downlink"))
    choices = [place for place in ("uplink.choice", "downlink.choice") if _is_said(place, changes)]
    if made["apply"].part.in_step and len(choices) == 1:
        made["uplink.choice"] = made["downlink.choice"] = made[choices[0]]
    feedback = changes.switches
    return dataclasses.replace(
        recipe,
        direction=made["direction"],
        aggregate=made["aggregate"],
        apply=made["apply"],
        uplink=dataclasses.replace(
            up,
            choice=made["uplink.choice"],
            error_feedback=feedback.get("uplink.error_feedback", up.error_feedback),
        ),
        downlink=dataclasses.replace(
            down,
            choice=made["downlink.choice"],
            error_feedback=feedback.get("downlink.error_feedback", down.error_feedback),
        ),
    )


def _changed_part(recipe: Recipe, place: str, changes: Changes) -> Any:
    """One part with its changes; of another kind, with Adam's settings if it needs any."""
    old: Any = recipe
    for name in place.split("."):
        old = getattr(old, name)
    if not _is_said(place, changes):
        return old
    new = part(PLACES[place], changes.kinds.get(place, old.kind))
    said: dict[str, Value] = dict(old.options) if new.kind == old.kind else {}
    for name, value in changes.options.get(place, {}).items():
        option = new.option(name)
        said[name] = option.parse(value) if isinstance(value, str) else option.check(value)
    settings: dict[str, Any] = {"kind": new.kind, "options": parts.options(new, said)}
    if new.kind != old.kind and not isinstance(old, Choice | Aggregate):
        adam = recipe.adam or AdamConfig()
        if adam.variance_correction and not new.local:
            adam = dataclasses.replace(adam, variance_correction=False)
        settings["adam"] = adam if new.adam else None
        if isinstance(old, Direction) and not new.local:
            settings["local_steps"] = 1
    return dataclasses.replace(old, **settings)


def _is_said(place: str, changes: Changes) -> bool:
    return place in changes.kinds or place in changes.options


def _downlink_of_kind(old: Downlink, kind: str | None) -> Downlink:
    if kind is None or kind == old.kind:
        return old
    if kind == "weights":
        return Downlink("weights", old.codec, error_feedback=False)
    feedback = old.error_feedback or old.kind == "weights"
    return dataclasses.replace(old, kind=downlink_kind(kind), error_feedback=feedback)


def _parse_downlink(text: str, old: Downlink) -> Downlink:
    kind, _, codec = text.partition(":")
    if kind not in get_args(DownlinkKind):
        return dataclasses.replace(old, codec=text)
    if not codec:
        msg = f"downlink {text!r} names no codec: write for example {kind}:uniform:bits=8"
        raise ConfigError(msg)
    return dataclasses.replace(_downlink_of_kind(old, kind), codec=codec)


def _shown(choice: Choice) -> str:
    listed = ",".join(f"{name}={value}" for name, value in choice.options)
    return f"{choice.kind}:{listed}" if listed else choice.kind

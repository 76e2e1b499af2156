"""Adam's settings as a text: what `--adam`, PSQ_ADAM and a TOML file's `adam` say.

    beta=0.95,weight_decay=0.01,variance_correction=true
    beta=power:0.9:0.5,theta=one-minus-power:0.5:1           schedules, see `psq.recipe`

The names are those of `psq.recipe.AdamConfig`; what is not named stays as the recipe has it.
"""

from __future__ import annotations

import difflib
import typing
from typing import Any, Final, get_args

from psq.errors import ConfigError
from psq.recipe import AdamConfig, EpsPlacement, Recipe
from psq.schedules import Schedule, parse_schedule, schedule_text

__all__ = ["missing_in_torch", "parse_adam", "with_adam_text"]

_SWITCHES: Final = {"true": True, "false": False}
_SCHEDULE: Final = (
    "a number, power:VALUE:EXPONENT, one-minus-power:VALUE:EXPONENT or the NAME:NUMBER:... of a "
    "schedule that is registered"
)


def with_adam_text(recipe: Recipe, text: str | None) -> Recipe:
    """The same recipe with the settings a text names; None names none.

    Raises:
        ConfigError: the text is not of this form, or the recipe cannot have such settings.
    """
    if text is None:
        return recipe
    changes = parse_adam(text)
    try:
        return recipe.with_adam(**changes)
    except ConfigError as error:
        msg = f"adam: {error}"
        raise ConfigError(msg) from None


def parse_adam(text: str) -> dict[str, Any]:
    """Field names of `AdamConfig` and the values a text gives them.

    Raises:
        ConfigError: a part is not NAME=VALUE, a name is unknown or comes twice, or a value is of
            another kind; the message says what was expected and what came.
    """
    kinds = typing.get_type_hints(AdamConfig)
    changes: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            msg = f"adam: expected NAME=VALUE,NAME=VALUE, got {part!r} in {text!r}"
            raise ConfigError(msg)
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(kinds)}"
            msg = f"adam: no setting {name!r}; {hint}"
            raise ConfigError(msg)
        if name in changes:
            msg = f"adam: {name} is said twice in {text!r}"
            raise ConfigError(msg)
        changes[name] = _value(name, kinds[name], value)
    return changes


def missing_in_torch(adam: AdamConfig) -> str:
    """The first setting that `torch.optim.Adam` cannot have, as NAME=VALUE; empty if it has all.

    The variance correction is none: with one worker there is nothing to correct.
    """
    for name, schedule in (("beta", adam.beta), ("theta", adam.theta)):
        if not isinstance(schedule, float | int):
            return f"{name}={schedule_text(schedule)}"
    if adam.eps_placement != "outside":
        return f"eps_placement={adam.eps_placement}"
    return "" if adam.bias_correction else "bias_correction=false"


def _value(name: str, kind: Any, text: str) -> Any:
    value: Any
    if kind is bool:
        expected, value = "true or false", _SWITCHES.get(text.lower())
    elif kind == EpsPlacement:
        choices = get_args(EpsPlacement)
        expected, value = f"one of {', '.join(choices)}", text if text in choices else None
    elif kind is float:
        expected, value = "a number", _number(text)
    else:
        expected, value = _SCHEDULE, _schedule(name, text)
    if value is None:
        msg = f"adam: {name}: expected {expected}, got {text!r}"
        raise ConfigError(msg)
    return value


def _schedule(name: str, text: str) -> Schedule | None:
    try:
        return parse_schedule(text)
    except ConfigError as error:
        msg = f"adam: {name}: got {text!r}: {error}"
        raise ConfigError(msg) from None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

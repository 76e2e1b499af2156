"""What a part of a recipe is: its options, and what may stand beside it. Pure data, no arithmetic.

    Part("krum", options=(Option("f", 1, low=0, high=64, help="..."),), rule="module:Class", ...)

A recipe names its parts by kind and holds their options as `Options`: all of them, sorted, so that
equal recipes are equal bytes. `psq.catalogue` lists the parts of psq, `psq.parts` finds those and
the ones that other packages bring. Nothing here imports a rule.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from psq.errors import ConfigError

__all__ = [
    "MAX_OPTIONS",
    "MAX_TEXT_CHARS",
    "SLOTS",
    "Option",
    "Options",
    "Part",
    "Value",
    "options",
]

SLOTS: Final = ("direction", "aggregate", "apply", "choice")
MAX_TEXT_CHARS: Final = 200
MAX_OPTIONS: Final = 16
_TRUE: Final = {"true": True, "false": False}
_IF: Final = " if "

Value: TypeAlias = bool | int | float | str
Options: TypeAlias = tuple[tuple[str, Value], ...]


@dataclass(frozen=True, slots=True)
class Option:
    """One setting of a part; its kind is that of its default: bool, int, float or str.

    Args:
        name: as people write it.
        default: its value where nobody says one.
        help: what it does, in a line, with its unit.
        low: the smallest number allowed; None is no limit.
        high: the largest.
        choices: the texts allowed; empty for any.
    """

    name: str
    default: Value
    help: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """A default that its own option refuses is a mistake of the part's author."""
        self.check(self.default)

    def expects(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        kind = type(self.default)
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        limits = [
            f"{sign} {_limit(limit)}"
            for sign, limit in ((">=", self.low), ("<=", self.high))
            if limit is not None
        ]
        return " ".join((words[kind], " and ".join(limits))).strip()

    def check(self, value: object) -> Value:
        """The value, a whole number widened where a number is meant.

        Raises:
            ConfigError: it is of another kind, or out of range.
        """
        kind = type(self.default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is kind and isinstance(value, bool | int | float | str):
            if isinstance(value, str):
                fits = value in self.choices if self.choices else 0 < len(value) <= MAX_TEXT_CHARS
            else:
                fits = self._in_range(value)
            if fits:
                return value
        msg = f"{self.name}: expected {self.expects()}, got {value!r:.200}"
        raise ConfigError(msg)

    def parse(self, text: str) -> Value:
        """The value that a text stands for.

        Raises:
            ConfigError: as for `check`.
        """
        kind = type(self.default)
        value: object = text
        if kind is bool:
            value = _TRUE.get(text.lower(), text)
        elif kind is not str:
            try:
                value = int(text) if kind is int else float(text)
            except ValueError:
                value = text
        return self.check(value)

    def _in_range(self, value: float) -> bool:
        low_ok = self.low is None or value >= self.low
        return math.isfinite(value) and low_ok and (self.high is None or value <= self.high)


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of a slot.

    Where a text below may end in " if OPTION", it counts only where that option is not 0 or false.

    Args:
        kind: its name, in recipes and plans.
        options: what can be set.
        rule: the class of its arithmetic, or "module:Class", imported on first use.
        summary: what it does, in a line.
        says: directions: what the message means: "gradient", "update" (learning rate inside) or
            "vote" (only its sign means something). Aggregates: what comes of it; "" for the same.
        takes: aggregates and applies: the meanings it can work with, each with or without an if.
        whole: aggregates and applies: it needs the whole round before the first shard is reduced.
        adam: it needs Adam's settings.
        local: directions: it moves weights, so that a worker can take local steps.
        remembers: directions: it keeps by itself what a codec leaves out; with error feedback that
            would be said twice.
        replicable: applies: every node can run it on the same bytes, with a downlink of means.
        replicated: applies: it runs only so.
        keeps_weights: applies: the server's weights are those of the workers.
        counts_heads: aggregates: every worker counts once, whatever weight it asks for.
        family: aggregates: the only family of codecs that it can read; empty for all.
        needs: other parts it works with only, as "apply=ef21" or "choice=first" (the uplink's).
        in_step: applies: which round it is follows from the choice of codecs, so that both ways
            have the same choice, nobody is late, and every shard moves in every round.
        codecs: choices: the codecs besides the default: "@OPTION" is the one an option names,
            "*" the default with all bits from option "least" to "most".
        clocked: choices: the step's number alone decides, so that everyone knows.
        package: who brings it; empty for psq itself.
    """

    kind: str
    options: tuple[Option, ...] = ()
    rule: str | type = ""
    summary: str = ""
    says: str = ""
    takes: tuple[str, ...] = ()
    whole: bool = False
    adam: bool = False
    local: bool = False
    remembers: bool = False
    replicable: bool = False
    replicated: bool = False
    keeps_weights: bool = True
    counts_heads: bool = False
    family: str = ""
    needs: tuple[str, ...] = ()
    in_step: bool = False
    codecs: tuple[str, ...] = ()
    clocked: bool = True
    package: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Refuse what no plan could carry."""
        names = [option.name for option in self.options]
        if not self.kind or len(self.kind) > MAX_TEXT_CHARS:
            msg = f"a part's kind is a text of 1..{MAX_TEXT_CHARS} characters, got {self.kind!r}"
            raise ConfigError(msg)
        if len(set(names)) != len(names) or len(names) > MAX_OPTIONS:
            msg = f"part {self.kind!r}: up to {MAX_OPTIONS} options of different names, got {names}"
            raise ConfigError(msg)

    def option(self, name: str) -> Option:
        """One of its options.

        Raises:
            ConfigError: there is none of that name; the message lists those there are.
        """
        for option in self.options:
            if option.name == name:
                return option
        near = difflib.get_close_matches(name, [option.name for option in self.options], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        msg = f"{self.kind} has no option {name!r}; {hint}{self.listed()}"
        raise ConfigError(msg)

    def listed(self) -> str:
        """Its options with their ranges and defaults, in words."""
        if not self.options:
            return "it has none"
        each = (
            f"{option.name} ({option.expects()}; {_shown(option.default)})"
            for option in self.options
        )
        return "there are: " + ", ".join(each)

    def takes_with(self, given: Options) -> tuple[str, ...]:
        """The meanings it can work with, with these options."""
        return tuple(_those(self.takes, given))


def options(part: Part, given: Mapping[str, object] | Iterable[tuple[str, object]]) -> Options:
    """All options of a part, those not given at their defaults: sorted, complete, hashable.

    Raises:
        ConfigError: an option it does not have, or a value it does not take.
    """
    said = dict(given)
    for name in said:
        part.option(name)
    found = {
        option.name: option.check(said[option.name]) if option.name in said else option.default
        for option in part.options
    }
    return tuple(sorted(found.items()))


def _those(texts: Iterable[str], given: Options) -> Iterable[str]:
    values = dict(given)
    for text in texts:
        name, _, condition = text.partition(_IF)
        if not condition or values[condition]:
            yield name


def _limit(limit: float) -> str:
    return f"{limit:,.0f}" if float(limit).is_integer() else f"{limit:g}"


def _shown(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"

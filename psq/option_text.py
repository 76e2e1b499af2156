"""What `--with` says: a part's kind or option by its place, as a text or as values in code.

    aggregate=trimmed-mean  aggregate.f=2           a part's kind, an option of it
    uplink.choice=dq  uplink.choice.bits=4          the same of how a codec is chosen
    downlink=mean  uplink.error_feedback=false      what else can be switched

This module splits such texts and knows the places; which options a part has is for the recipe to
say, when it applies them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from psq.errors import ConfigError
from psq.parts import Value

__all__ = ["PLACES", "SWITCHES", "Changes", "parse_changes"]

PLACES: Final[Mapping[str, str]] = {
    "direction": "direction",
    "aggregate": "aggregate",
    "apply": "apply",
    "uplink.choice": "choice",
    "downlink.choice": "choice",
}
"""Where a part stands in a recipe, and the slot it is of."""
SWITCHES: Final = ("uplink.error_feedback", "downlink.error_feedback")
_DOWNLINK: Final = "downlink"
_FORM: Final = "expected SLOT.OPTION=VALUE or SLOT=KIND"
_BOOLEANS: Final = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Changes:
    """What is to be different.

    Attributes:
        kinds: place -> kind; "downlink" too.
        options: place -> option -> value; a text is still to be parsed.
        switches: of SWITCHES.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    options: dict[str, dict[str, Value]] = field(default_factory=dict)
    switches: dict[str, bool] = field(default_factory=dict)


def parse_changes(texts: Iterable[str], given: Mapping[str, str | Mapping[str, Value]]) -> Changes:
    """Texts as people type them, and values by slot as code says them, as one set of changes.

    Raises:
        ConfigError: a text of another form, an unknown place, or one thing said twice.
    """
    changes = Changes()
    seen: set[str] = set()
    for path, value in (*map(_split, texts), *_flattened(given)):
        if path in seen:
            msg = f"with: {path} is said twice"
            raise ConfigError(msg)
        seen.add(path)
        _note(changes, path, value)
    return changes


def _split(text: str) -> tuple[str, Value]:
    path, equals, value = (word.strip() for word in text.partition("="))
    if not (path and equals and value):
        msg = f"with: {_FORM}, got {text!r:.200}"
        raise ConfigError(msg)
    return path, value


def _flattened(given: Mapping[str, str | Mapping[str, Value]]) -> Iterable[tuple[str, Value]]:
    for slot, value in given.items():
        if isinstance(value, str):
            yield slot, value
        else:
            yield from ((f"{slot}.{name}", each) for name, each in value.items())


def _note(changes: Changes, path: str, value: Value) -> None:
    place, _, name = path.rpartition(".")
    if path in PLACES or path == _DOWNLINK:
        if not isinstance(value, str):
            msg = f"with: {path} is named by a text, got {value!r}"
            raise ConfigError(msg)
        changes.kinds[path] = value
    elif path in SWITCHES:
        switch = _BOOLEANS.get(value.lower()) if isinstance(value, str) else value
        if not isinstance(switch, bool):
            msg = f"with: {path}: expected true or false, got {value!r:.200}"
            raise ConfigError(msg)
        changes.switches[path] = switch
    elif place in PLACES:
        changes.options.setdefault(place, {})[name] = value
    else:
        raise ConfigError(_unknown(path))


def _unknown(path: str) -> str:
    known = (*PLACES, *SWITCHES, _DOWNLINK)
    near = difflib.get_close_matches(path, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    options = ", ".join(f"{place}.OPTION" for place in PLACES)
    return f"with: no place {path!r:.200}; {hint}there are: {', '.join(known)}, and {options}"

"""What parts there are: psq's own, and those that other packages bring.

A package brings a part by an entry point whose name is the part's kind and whose object is a
`Part`, in one of the groups psq.directions, psq.aggregates, psq.applies, psq.choices:

    [project.entry-points."psq.applies"]
    teacher = "fedgen.parts:TEACHER"

It is imported when a recipe first names it, never because of another. A script may call `register`
instead, in every process of its job. psq's own kinds cannot be replaced.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

from psq.catalogue import CATALOGUE
from psq.errors import ConfigError
from psq.slots import MAX_OPTIONS, MAX_TEXT_CHARS, SLOTS, Option, Options, Part, Value, options

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

__all__ = [
    "GROUPS",
    "MAX_OPTIONS",
    "MAX_TEXT_CHARS",
    "SLOTS",
    "Option",
    "Options",
    "Part",
    "Value",
    "entry",
    "entry_names",
    "kinds",
    "load_rule",
    "options",
    "part",
    "parts",
    "register",
]

EntryT = TypeVar("EntryT")

GROUPS: Final[Mapping[str, str]] = {
    "direction": "psq.directions",
    "aggregate": "psq.aggregates",
    "apply": "psq.applies",
    "choice": "psq.choices",
}
_ADDED: Final[dict[tuple[str, str], Part]] = {}
_OWN: Final = {(slot, each.kind): each for slot, listed in CATALOGUE.items() for each in listed}


def part(slot: str, kind: str, *, package: str = "") -> Part:
    """The part of a slot by its kind.

    Args:
        slot: one of SLOTS.
        kind: its name.
        package: who is said to bring it, for the message where it is not here.

    Raises:
        ConfigError: there is none; the message lists those there are, and says what to install.
    """
    assert slot in SLOTS, slot  # noqa: S101 - a mistake of ours
    found = _OWN.get((slot, kind)) or _ADDED.get((slot, kind))
    if found is None:
        found = _loaded(slot, kind)
    if found is None:
        brings = f"the package {package}" if package else "the package that brings it"
        advice = f"; install {brings} on every machine of the job" if package else ""
        msg = f"{slot} must be one of {', '.join(kinds(slot))}, got {kind!r:.200}{advice}"
        raise ConfigError(msg)
    return found


def parts(slot: str) -> tuple[Part, ...]:
    """All parts of a slot, psq's own first.

    Raises:
        ConfigError: another package says that it brings one, and does not.
    """
    return tuple(part(slot, kind) for kind in kinds(slot))


def kinds(slot: str) -> tuple[str, ...]:
    """The names of all parts of a slot; nothing is imported for it."""
    own = [each.kind for each in CATALOGUE[slot]]
    added = [kind for where, kind in _ADDED if where == slot]
    return tuple(dict.fromkeys([*own, *added, *entry_names(GROUPS[slot])]))


def register(slot: str, made: Part) -> Part:
    """Add a part by hand; every process of the job has to.

    Raises:
        ConfigError: the slot does not exist, or has another part of that kind.
    """
    if slot not in SLOTS:
        msg = f"slot must be one of {', '.join(SLOTS)}, got {slot!r}"
        raise ConfigError(msg)
    there = _OWN.get((slot, made.kind)) or _ADDED.get((slot, made.kind))
    if there is not None and there != made:
        msg = f"there is a {slot} called {made.kind!r} already: choose another name"
        raise ConfigError(msg)
    return _ADDED.setdefault((slot, made.kind), made)


def load_rule(made: Part) -> Any:
    """The class of a part's arithmetic.

    Raises:
        ConfigError: it cannot be imported.
    """
    if not isinstance(made.rule, str):
        return made.rule
    module, _, name = made.rule.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever another package's module raises
        msg = f"{made.kind}: its rule {made.rule!r} cannot be imported: {error}"
        raise ConfigError(msg) from error


def entry_names(group: str) -> tuple[str, ...]:
    """The names of a group's entry points, sorted."""
    return tuple(sorted({point.name for point in _entry_points(group)}))


def entry(group: str, name: str, expected: type[EntryT]) -> tuple[EntryT, str] | None:
    """What an entry point stands for, and the package that brings it; None where there is none.

    Raises:
        ConfigError: it cannot be imported, or is something else than expected.
    """
    points = _entry_points(group).select(name=name)
    if not points:
        return None
    point = next(iter(points))
    package = point.dist.name if point.dist is not None else ""
    made = _import(point, package)
    if not isinstance(made, expected):
        msg = (
            f"{name!r} of the package {package} is no {expected.__name__}: entry points in {group} "
            f"name one, {point.value} is {made!r:.80}"
        )
        raise ConfigError(msg)
    return made, package


def _entry_points(group: str) -> EntryPoints:
    from importlib.metadata import entry_points  # noqa: PLC0415 - 15 ms; psq's own need none

    return entry_points(group=group)


def _import(point: EntryPoint, package: str) -> Any:
    try:
        return point.load()
    except Exception as error:  # a plan from a peer may name it: nothing of it may end a server
        msg = (
            f"{point.name!r} of the package {package} cannot be imported: {error}: "
            "mend that package or uninstall it"
        )
        raise ConfigError(msg) from error


def _loaded(slot: str, kind: str) -> Part | None:
    """The part that another package brings; it is remembered with that package's name."""
    found = entry(GROUPS[slot], kind, Part) if isinstance(kind, str) else None
    if found is None:
        return None
    made, package = found
    if made.kind != kind:
        msg = f"the package {package} calls a {slot} {kind!r} that calls itself {made.kind!r}"
        raise ConfigError(msg)
    values = {name: getattr(made, name) for name in Part.__slots__}
    return _ADDED.setdefault((slot, kind), Part(**{**values, "package": package}))

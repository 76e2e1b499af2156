"""What `psq recipes` prints: every recipe in a few lines, or one with all its options.

Everything comes from the recipes, their parts and `psq.costs`; nothing is written twice here. Needs
no torch.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Final

import click

from psq.costs import LISTED_STEPS, LISTED_WORKERS, Costs, costs_of
from psq.errors import ConfigError
from psq.parts import Options, Part, kinds
from psq.parts import part as find_part
from psq.presets import Preset, find_preset, names
from psq.recipe import AdamConfig, Choice, Recipe

__all__ = ["print_recipe", "print_recipes", "recipe_plain", "recipes_plain"]

MAX_WIDTH: Final = 100
INDENT: Final = "    "
HEADING: Final = f"{'recipe':<18}{'bits up':>9}{'down':>7}{'bytes on worker':>17}{'server':>8}"
NOTE: Final = (
    f"Bits: per parameter and step, scales counted, over the first {LISTED_STEPS:,} steps. Bytes: "
    f"state per parameter beside model and gradients, with {LISTED_WORKERS} workers. "
    "psq recipes NAME shows one with all its options."
)


def recipes_plain() -> list[dict[str, Any]]:
    """All recipes as plain data; of one that cannot be made here, why."""
    return [recipe_plain(name) for name in names()]


def recipe_plain(name: str, changes: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe as plain data, "fault" in place of what cannot be had here.

    Raises:
        ConfigError: there are changes that it cannot have.
    """
    try:
        known = find_preset(name)
        recipe = known.make(AdamConfig())
    except ConfigError as error:
        if changes:
            raise
        return {"name": name, "fault": str(error)}
    recipe = recipe.with_options(*changes)
    costs, fault = _costs(recipe)
    return {
        "name": name,
        "summary": known.summary,
        "source": known.source,
        "trap": known.trap,
        "suggested": known.suggested,
        "package": known.package,
        "parts": recipe.to_plain(),
        "bits": None if costs is None else {"up": costs.up_bits, "down": costs.down_bits},
        "bytes": (
            None if costs is None else {"worker": costs.worker_bytes, "server": costs.server_bytes}
        ),
        "fault": fault,
    }


def print_recipes() -> None:
    """All recipes, a few lines each."""
    click.secho(HEADING, bold=True)
    for name in names():
        try:
            known = find_preset(name)
            recipe = known.make(AdamConfig())
        except ConfigError as error:
            click.secho(f"{name:<18} {error}", fg="red")
            continue
        costs, fault = _costs(recipe)
        click.echo(click.style(f"{name:<18}", bold=True) + _numbers(costs))
        _echo(" > ".join(_steps(recipe)))
        _echo(_source(known), dim=True)
        _echo(f"Trap: {known.trap}.", dim=True)
        if fault:
            _echo(fault, fg="red")
    click.echo()
    _echo(NOTE, indent="", dim=True)


def print_recipe(name: str, changes: Sequence[str] = ()) -> None:
    """One recipe with the options of all its parts.

    Raises:
        ConfigError: there is none of that name, or it cannot have these changes.
    """
    known = find_preset(name)
    recipe = known.make(AdamConfig()).with_options(*changes)
    costs, fault = _costs(recipe)
    click.secho(name, bold=True)
    for text in (f"{known.summary}", _source(known), f"Trap: {known.trap}."):
        _echo(text)
    _echo(f"Begin with: {known.suggested}.")
    if costs is None:
        _echo(fault, fg="red")
    else:
        _echo(
            f"Bits per parameter and step: {costs.up_bits:.4g} up, {costs.down_bits:.4g} down. "
            f"Bytes of state per parameter: {costs.worker_bytes:g} on a worker, "
            f"{costs.server_bytes:g} on the server."
        )
    click.echo()
    _print_parts(recipe)


def _print_parts(recipe: Recipe) -> None:
    up, down = recipe.uplink, recipe.downlink
    _print_part("direction", "direction", recipe.direction.part, recipe.direction.options)
    _print_line("uplink", f"{up.codec}{_feedback(fed_back=up.error_feedback)}")
    _print_choice("uplink.choice", up.choice)
    _print_part("aggregate", "aggregate", recipe.aggregate.part, recipe.aggregate.options)
    _print_part("apply", "apply", recipe.apply.part, recipe.apply.options)
    _print_line("downlink", f"{down.kind}:{down.codec}{_feedback(fed_back=down.error_feedback)}")
    _print_choice("downlink.choice", down.choice)
    if recipe.adam is not None:
        _print_line("adam", "its settings: --adam NAME=VALUE,..., see psq.recipe.AdamConfig")


def _print_choice(place: str, choice: Choice) -> None:
    _print_part(place, "choice", choice.part, choice.options)


def _print_part(place: str, slot: str, part: Part, given: Options) -> None:
    others = ", ".join(kind for kind in _kinds(place, slot) if kind != part.kind)
    _print_line(place, f"{part.kind}: {part.summary}")
    for name, value in given:
        option = part.option(name)
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        _echo(f"--with {place}.{name}={shown}", fg="cyan")
        _echo(f"{option.help} ({option.expects()})", indent=2 * INDENT)
    _echo(f"instead --with {place}=KIND: {others}", dim=True)


def _kinds(place: str, slot: str) -> Iterator[str]:
    """What may stand in a place: answers have no choice that is the workers'."""
    for kind in kinds(slot):
        if place != "downlink.choice" or find_part(slot, kind).clocked:
            yield kind


def _print_line(place: str, text: str) -> None:
    click.echo(click.style(f"{place:<16}", bold=True) + text)


def _costs(recipe: Recipe) -> tuple[Costs | None, str]:
    """What it costs, or why that cannot be said here."""
    try:
        return costs_of(recipe), ""
    except ConfigError as error:
        return None, str(error)


def _numbers(costs: Costs | None) -> str:
    if costs is None:
        return ""
    bits = "".join(
        f"{value:>{width}.3g}" if value < 1 else f"{value:>{width}.2f}"
        for value, width in ((costs.up_bits, 9), (costs.down_bits, 7))
    )
    return f"{bits}{costs.worker_bytes:>17g}{costs.server_bytes:>8g}"


def _steps(recipe: Recipe) -> Iterator[str]:
    """The five parts in words."""
    direction, up, down = recipe.direction, recipe.uplink, recipe.downlink
    steps = f" x {direction.local_steps}" if direction.local_steps > 1 else ""
    yield f"{direction.kind}{_said(direction.part, direction.options)}{steps}"
    yield f"{up.codec}{_chosen(up.choice)}{_feedback(fed_back=up.error_feedback)}"
    yield f"{recipe.aggregate.kind}{_said(recipe.aggregate.part, recipe.aggregate.options)}"
    yield f"{recipe.apply.kind}{_said(recipe.apply.part, recipe.apply.options)}"
    answer = f"{down.kind} {down.codec}"
    yield f"{answer}{_chosen(down.choice)}{_feedback(fed_back=down.error_feedback)}"


def _chosen(choice: Choice) -> str:
    return "" if choice.kind == "fixed" else f" / {choice.kind}{_said(choice.part, choice.options)}"


def _said(part: Part, given: Options) -> str:
    """The options that are not at their defaults."""
    listed = [
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in given
        if value != part.option(name).default
    ]
    return f"({', '.join(listed)})" if listed else ""


def _feedback(*, fed_back: bool) -> str:
    return " + feedback" if fed_back else ""


def _source(known: Preset) -> str:
    brought = f" [{known.package}]" if known.package else ""
    return f"{known.source[0].upper()}{known.source[1:]}.{brought}"


def _echo(text: str, *, indent: str = INDENT, **style: Any) -> None:
    width = min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns)
    wrapped = textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    click.secho(wrapped, **style)

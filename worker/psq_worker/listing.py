"""What `psq doctor` and `psq config show` print: plain columns on stdout.

Needs nothing but click, so that both commands work where only the server is installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import click

from psq.config import TABLES, Resolved, Setting, settings_of
from psq_worker.doctor import Check

__all__ = ["print_checks", "print_settings"]

VERDICT_COLOURS: Final = {"ok": "green", "note": "yellow", "fail": "red"}
GAP: Final = "  "
HEADINGS: Final = ("setting", "value", "from", "variable")


def print_checks(checks: Sequence[Check]) -> None:
    """What `psq doctor` found, a line each, and the advice below."""
    names = max((len(check.name) for check in checks), default=0)
    words = max(map(len, VERDICT_COLOURS))
    for check in checks:
        verdict = click.style(f"{check.verdict:<{words}}", fg=VERDICT_COLOURS[check.verdict])
        click.echo(GAP.join((verdict, f"{check.name:<{names}}", check.found)))
        if check.advice:
            indent = GAP.join((" " * words, " " * names, ""))
            click.echo(indent + click.style(check.advice, fg="yellow"))


def print_settings(tables: Mapping[str, Resolved[Any]]) -> None:
    """Every setting with its value and who said it, table by table."""
    rows = {
        name: [_row(item, resolved) for item in settings_of(TABLES[name])]
        for name, resolved in tables.items()
    }
    everything = [HEADINGS, *(row for listed in rows.values() for row in listed)]
    widths = [max(map(len, column)) for column in zip(*everything, strict=True)]
    click.secho(_line(HEADINGS, widths), bold=True)
    for name, listed in rows.items():
        click.secho(f"\n[{name}]", bold=True)
        for row in listed:
            click.secho(_line(row, widths), dim=row[2] == "default")


def _row(item: Setting, resolved: Resolved[Any]) -> tuple[str, ...]:
    value = getattr(resolved.config, item.field)
    shown = "-" if value is None else str(value).lower() if item.kind is bool else str(value)
    return (item.key, shown, resolved.origins[item.field], item.env)


def _line(cells: Iterable[str], widths: Iterable[int]) -> str:
    padded = (f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
    return GAP.join(padded).rstrip()

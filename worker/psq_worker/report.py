"""The numbers of a finished job as a table: what `psq launch` and `psq demo` print at the end.

Reads only the summaries that `Board.summary` makes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import click
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from psq.config import TABLES, Resolved, settings_of
from psq_worker.board import metric_words
from psq_worker.display import format_bytes, format_loss, format_score, format_seconds
from psq_worker.doctor import Check
from psq_worker.events import PHASES

__all__ = [
    "PHASE_WORDS",
    "check_lines",
    "comparison_table",
    "print_summary",
    "settings_tables",
    "summary_table",
]

VERDICT_STYLES: Final = {"ok": "green", "note": "yellow", "fail": "bold red"}
Summary = Mapping[str, Any]
Cell = Callable[[Summary], str]

PHASE_WORDS: Final = {
    "compute": "forward and backward",
    "encode": "quantize and pack",
    "wire": "send, wait for others, receive",
    "server": "decode, average, Adam, encode",
    "decode": "unpack and apply",
}


def print_summary(summary: Summary, *, as_json: bool) -> None:
    """A job's numbers on stdout."""
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    elif summary:
        Console().print(summary_table(summary))


def check_lines(checks: Sequence[Check]) -> None:
    """What `psq doctor` found, a line each, on stdout."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for check in checks:
        style = VERDICT_STYLES[check.verdict]
        words = Text(check.found)
        if check.advice:
            words.append(f"\n{check.advice}", style="yellow")
        table.add_row(Text(check.verdict, style=style), check.name, words)
    Console().print(table)


def settings_tables(tables: Mapping[str, Resolved[Any]]) -> None:
    """Every setting with its value and who said it, a table for each TOML table, on stdout."""
    console = Console()
    for name, resolved in tables.items():
        table = Table(title=f"[{name}]", title_justify="left", title_style="bold")
        for column in ("setting", "value", "from", "variable"):
            table.add_column(column)
        table.title = Text(f"[{name}]", style="bold")
        for item in settings_of(TABLES[name]):
            value, origin = getattr(resolved.config, item.field), resolved.origins[item.field]
            style = "dim" if origin == "default" else "bold"
            shown = (
                "-" if value is None else str(value).lower() if item.kind is bool else str(value)
            )
            table.add_row(*(Text(t, style=style) for t in (item.key, shown, origin, item.env)))
        console.print(table)


def summary_table(summary: Summary) -> RenderableType:
    """One job alone."""
    title = Text(f"{summary['task']}: {_who(summary)}", style="bold")
    return Group(title, _table(["psq"], [summary]))


def comparison_table(psq: Summary, baseline: Summary) -> RenderableType:
    """A psq job beside the same job in plain single-process Adam."""
    title = Text(f"{psq['task']}: {_who(psq)}", style="bold")
    note = Text(
        "Plain Adam is one process and sends nothing: its bytes are what dense fp32 gradients and "
        "weights would take.",
        style="dim",
    )
    return Group(title, _table(["psq", "plain Adam, fp32"], [psq, baseline]), note)


def _who(summary: Summary) -> str:
    workers = summary["workers"]
    return f"{workers} worker{'s' if workers != 1 else ''}, {summary['recipe']}"


def _table(names: Sequence[str], jobs: Sequence[Summary]) -> Table:
    table = Table(header_style="bold")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for section in _sections(jobs[0]):
        for label, cell in section:
            style = "bold" if label.startswith("test ") else ""
            shown = [Text(cell(job), style=style) for job in jobs]
            table.add_row(label, *shown)
        table.add_section()
    return table


def _sections(first: Summary) -> list[list[tuple[str, Cell]]]:
    scores: list[tuple[str, Cell]] = [("last training loss", lambda s: format_loss(s["loss"]))]
    if first["metric"]:
        scores.insert(0, (metric_words(first["metric"]), _score))
    wire: list[tuple[str, Cell]] = [
        ("bits per parameter, up", lambda s: _bits(s, "up")),
        ("bits per parameter, down", lambda s: _bits(s, "down")),
        ("compression, up and down", _ratios),
        ("compression, overall", lambda s: f"{s['wire']['compression_ratio']:.1f}x"),
        ("sent per worker", lambda s: format_bytes(s["wire"]["sent_bytes"])),
        ("received per worker", lambda s: format_bytes(s["wire"]["received_bytes"])),
    ]
    phases: list[tuple[str, Cell]] = [
        ("milliseconds per step", lambda s: _ms(s, "total")),
        *((f"  {phase}: {PHASE_WORDS[phase]}", _phase_cell(phase)) for phase in PHASES),
    ]
    size: list[tuple[str, Cell]] = [
        ("steps", lambda s: f"{s['steps']:,}"),
        ("samples/s", lambda s: f"{s['samples_per_s']:,.0f}"),
        ("time", lambda s: format_seconds(s["elapsed_s"])),
    ]
    return [scores, wire, phases, size]


def _score(summary: Summary) -> str:
    score = summary["score"]
    return "-" if score is None else format_score(summary["metric"], score)


def _bits(summary: Summary, direction: str) -> str:
    return f"{summary['wire'][f'bits_per_parameter_{direction}']:.2f}"


def _ratios(summary: Summary) -> str:
    wire = summary["wire"]
    return f"{wire['compression_ratio_up']:.1f}x, {wire['compression_ratio_down']:.1f}x"


def _ms(summary: Summary, phase: str) -> str:
    seconds = summary["step_s"][phase]
    return f"{1000 * seconds:.1f}" if seconds else "-"


def _phase_cell(phase: str) -> Cell:
    return lambda summary: _ms(summary, phase)

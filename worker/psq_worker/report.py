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

from psq_worker.board import metric_words
from psq_worker.display import (
    format_bytes,
    format_loss,
    format_rate,
    format_score,
    format_seconds,
)
from psq_worker.events import PHASES

__all__ = [
    "PHASE_WORDS",
    "comparison_table",
    "print_summary",
    "summary_table",
]

Summary = Mapping[str, Any]
Cell = Callable[[Summary], str]

PHASE_WORDS: Final = {
    "compute": "forward and backward",
    "encode": "quantize and pack",
    "wire": "send, wait for others, receive",
    "server": "decode, aggregate, apply, encode",
    "decode": "unpack and apply",
}


def print_summary(summary: Summary, *, as_json: bool) -> None:
    """A job's numbers on stdout."""
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    elif summary:
        Console().print(summary_table(summary))


def summary_table(summary: Summary) -> RenderableType:
    """One job alone."""
    title = Text(f"{summary['task']}: {_who(summary)}", style="bold")
    return Group(title, _table(["psq"], [summary]))


def comparison_table(psq: Summary, baseline: Summary, more: str = "") -> RenderableType:
    """A psq job beside the same job in plain single-process Adam; `more` is said below it."""
    title = Text(f"{psq['task']}: {_who(psq)}", style="bold")
    note = Text(
        "Plain Adam is one process and sends nothing: its bytes are what dense fp32 gradients and "
        f"weights would take. {more}".rstrip(),
        style="dim",
    )
    return Group(title, _table(["psq", "plain Adam, fp32"], [psq, baseline]), note)


def _who(summary: Summary) -> str:
    workers, servers, rule = summary["workers"], summary["servers"], summary["consistency"]
    words = [f"{workers} worker{'s' if workers != 1 else ''}"]
    words += [f"{len(summary['lost'])} lost on the way"] if summary["lost"] else []
    words += [f"{servers} servers"] if servers > 1 else []
    words += [rule] if rule != "bsp" else []
    return ", ".join([*words, summary["recipe"]])


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
    scores: list[tuple[str, Cell]] = [
        ("training loss, last tenth", lambda s: format_loss(s["loss"]))
    ]
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
    if first["payload_bits"] is not None:
        wire.insert(1, ("  of a value that was said, payload alone", _payload_bits))
    phases: list[tuple[str, Cell]] = [
        ("milliseconds per step", lambda s: _ms(s, "total")),
        *((f"  {phase}: {PHASE_WORDS[phase]}", _phase_cell(phase)) for phase in PHASES),
        ("exposed: waiting that no computing hid", _exposed),
    ]
    size: list[tuple[str, Cell]] = [
        ("steps", lambda s: f"{s['steps']:,}"),
        ("samples/s", lambda s: format_rate(s["samples_per_s"])),
        ("time", lambda s: format_seconds(s["elapsed_s"])),
    ]
    if first["consistency"] != "bsp":
        size.insert(1, ("rounds stale, mean and most", _staleness))
    if first["lost"]:
        size.insert(1, ("lost on the way, code", _lost))
    if first["skipped"]:
        size.insert(1, ("pushes skipped, not finite", lambda s: f"{s['skipped']:,}"))
    if first["rejected"]:
        size.insert(1, ("pushes rejected by the server", lambda s: f"{s['rejected']:,}"))
    return [scores, wire, phases, size]


def _score(summary: Summary) -> str:
    score = summary["score"]
    return "-" if score is None else format_score(summary["metric"], score)


def _bits(summary: Summary, direction: str) -> str:
    return f"{summary['wire'][f'bits_per_parameter_{direction}']:.2f}"


def _payload_bits(summary: Summary) -> str:
    bits = summary["payload_bits"]
    return "-" if bits is None else f"{bits:.2f}"


def _ratios(summary: Summary) -> str:
    wire = summary["wire"]
    return f"{wire['compression_ratio_up']:.1f}x, {wire['compression_ratio_down']:.1f}x"


def _exposed(summary: Summary) -> str:
    return f"{1000 * summary['exposed_s']:.1f}" if summary["servers"] else "-"


def _staleness(summary: Summary) -> str:
    staleness = summary["staleness"]
    return f"{staleness['mean']:.2f}, {staleness['max']}" if summary["servers"] else "-"


def _lost(summary: Summary) -> str:
    """Each rank and its code, which one that was started again and came too late has not."""
    ended = ((one["rank"], one["exit_code"]) for one in summary["lost"])
    return ", ".join(f"rank {rank}" + ("" if code is None else f" {code}") for rank, code in ended)


def _ms(summary: Summary, phase: str) -> str:
    seconds = summary["step_s"][phase]
    return f"{1000 * seconds:.1f}" if seconds else "-"


def _phase_cell(phase: str) -> Cell:
    return lambda summary: _ms(summary, phase)

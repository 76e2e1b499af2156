"""docs/performance.md: sections, commands, tables, pictures. It is written as a whole each time."""

from __future__ import annotations

from pathlib import Path

from reporting import pictures, tables
from reporting.judge import bars
from reporting.runs import Kept, facts_line
from reporting.sections import RATES, SECTIONS, Section

NAME = "performance"
HEADER = """# Performance

Made by `make bench` ([`bench/report.py`](../bench/report.py)); do not edit. Rates are ratios of
what was measured in turns in one run: the best, and the median. Times hold for the machine they
were measured on. The commands stand by their tables; the raw JSON is kept under `bench/out/`.
"""
QUICK = "**Tried out at small sizes: these figures mean nothing.**\n"
BARS_TEXT = """What was asked of each part, judged by the figures of this page; `make bars` measures
a shorter form. A bar that does not hold stands here with its figure."""


def write_page(results: dict[str, Kept], folder: Path, *, quick: bool = False) -> Path:
    """Write the page and its pictures; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = pictures.draw_all(results, folder, NAME)
    parts = [HEADER, *([QUICK] if quick else []), *summary(results), bars_part(results)]
    parts += [section_part(section, results, drawn) for section in SECTIONS]
    parts.append(times_part(results))
    page = folder / f"{NAME}.md"
    page.write_text("\n".join(part.rstrip() + "\n" for part in parts))
    return page


def summary(results: dict[str, Kept]) -> list[str]:
    facts = {facts_line(kept["facts"]) for kept in results.values()}
    lines = [f"Measured on: {fact}." for fact in sorted(facts)]
    return ["\n\n".join(lines), tables.summary(results, RATES)]


def bars_part(results: dict[str, Kept]) -> str:
    head = ("bar", "measured", "target", "holds", "")
    body = [[cell.replace("|", "/") for cell in bar.cells()] for bar in bars(results)]
    return f"## Bars\n\n{BARS_TEXT}\n\n{tables.markdown(head, body)}"


def section_part(section: Section, results: dict[str, Kept], drawn: dict[str, str]) -> str:
    """Heading, text, picture, and for each command what it came to."""
    parts = [f"## {section.title}", section.text]
    if section.name in drawn:
        parts.append(f"![{section.title}]({drawn[section.name]})")
    for index, run in enumerate(section.runs):
        kept = results.get(run.name)
        if kept is None:
            parts.append(f"`{run.command(quick=False)}`: not run.")
        elif kept["error"]:
            parts.append(f"`{kept['command']}`: not measured: {kept['error']}")
        else:
            parts.append(f"`{kept['command']}`")
            parts.append(section.table_of(index)(kept["result"]))
    return "\n\n".join(part.strip() for part in parts)


def times_part(results: dict[str, Kept]) -> str:
    """How long each section took, so that one can plan."""
    rows, total = [], 0.0
    for section in SECTIONS:
        taken = [results[run.name]["wall_s"] for run in section.runs if run.name in results]
        total += sum(taken)
        rows.append((section.name, f"{section.expected_s:.0f}", f"{sum(taken):.0f}"))
    rows.append(("all", f"{sum(s.expected_s for s in SECTIONS):.0f}", f"{total:.0f}"))
    return "## How long it takes\n\n" + tables.markdown(("section", "expected s", "took s"), rows)

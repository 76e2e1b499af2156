"""Shows what theory says of these algorithms, on problems small enough to see it, and draws it.

    python bench/theory.py                     `make theory`: two minutes, docs/theory-*.png
    python bench/theory.py --only weights      one of counterexample, speedup, weights
    python bench/theory.py --draw              from what is kept, nothing is measured

The steps are those of psq: optim.Adam, Compressor, the server's Reducer, real codecs. What was
measured is kept under bench/out/theory.json; the numbers in docs/theory.md are between two marks
and replaced by each run. tests/unit/test_theory_claims.py holds the same code to bounds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from claims import counterexample, floor, pictures, speedup

from psq.recipe import Schedule

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "bench" / "out" / "theory.json"
PAGE = ROOT / "docs" / "theory.md"

RUNS = 256
LONG = 300_000
ARRIVED = 1e-3
MEMORIES = {
    f"theta = {counterexample.FORGETFUL:g}": counterexample.FORGETFUL,
    **{f"r = {r:g}": counterexample.theta_of(r) for r in (0.0, 0.5, 0.75, 1.0)},
}
BETAS = (0.0, 0.9)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
WORKERS = (1, 2, 4, 8, 16)
RECIPES = ("server-adam", "qadam-1bit")
SEEDS = (0, 1, 2)
GRIDS = range(4, 15)
NOISE = 0.02

Row = dict[str, Any]


def walk() -> Iterator[Row]:
    """The counterexample by memory and beta; last one that is only in the table, for longer."""
    for beta in BETAS:
        for memory, theta in MEMORIES.items():
            yield _walk_row(memory, theta, beta, counterexample.STEPS) | {"drawn": True}
    slow = counterexample.theta_of(0.0)
    yield _walk_row(f"r = 0, {LONG:,} steps", slow, 0.0, LONG) | {"drawn": False}


def _walk_row(memory: str, theta: Schedule, beta: float, steps: int) -> Row:
    at = counterexample.spaced(steps)
    paths = counterexample.walk(theta, beta, runs=RUNS, seed=0, at=at)
    last = paths.distances[-1]
    return {
        "beta": beta,
        "memory": memory,
        "runs": RUNS,
        "verdict": counterexample.verdict_of(theta, beta).verdict,
        "steps": paths.steps,
        "quartiles": np.quantile(paths.distances, (0.25, 0.5, 0.75), axis=1).T.tolist(),
        "beyond_start": float(np.mean(last > counterexample.START)),
        "arrived": float(np.mean(last < ARRIVED)),
        "largest": float(np.max(last)),
    }


def speed() -> Iterator[Row]:
    """Steps to the goal: plain Adam by batch, recipes by workers."""
    for seed in SEEDS:
        for batch in BATCHES:
            steps = speedup.steps_of_batches(batch, seed)
            yield {"system": "adam", "samples": batch, "seed": seed, "steps": steps}
        for name in RECIPES:
            for workers in WORKERS:
                steps = speedup.steps_of_workers(name, workers, seed)
                yield {"system": name, "samples": workers, "seed": seed, "steps": steps}


def floors() -> Iterator[Row]:
    """What grids of weights leave, by the number of their levels."""
    for k in GRIDS:
        grid = floor.fixed_range(k)
        yield _floor_row("fixed", k, floor.floor_of(grid))
        yield _floor_row("noisy", k, floor.floor_of(grid, noise=NOISE))
        yield _floor_row("block", k, floor.floor_of(floor.per_block(2**k)))
    for bits in floor.CODEC_BITS:
        yield _floor_row(
            "codec", math.log2(floor.codec_steps(bits)), floor.floor_of_codec(bits)
        ) | {"bits": bits}
    yield _floor_row("exact", 0, floor.floor_of(floor.exact))


def _floor_row(kind: str, k: float, found: floor.Floor) -> Row:
    return {"kind": kind, "k": k, "gradient": found.gradient, "excess": found.excess}


MEASURES: dict[str, Callable[[], Iterator[Row]]] = {
    "counterexample": walk,
    "speedup": speed,
    "weights": floors,
}
DRAWN: dict[str, Callable[[list[Row], Path], None]] = {
    "counterexample": pictures.counterexample,
    "speedup": pictures.speedup,
    "weights": pictures.weights,
}


def measured(name: str) -> list[Row]:
    rows = []
    for row in MEASURES[name]():
        brief = {key: value for key, value in row.items() if not isinstance(value, list | tuple)}
        print(name, json.dumps(brief), file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def table(name: str, rows: list[Row]) -> list[str]:
    """The numbers of a section, as a table of the page."""
    return {"counterexample": _walk_table, "speedup": _speed_table, "weights": _floor_table}[name](
        rows
    )


def _walk_table(rows: list[Row]) -> list[str]:
    head = (
        "| beta | memory | the condition | median of the last \\|x\\| | farther than the start "
        "| within 0.001 | farthest |"
    )
    lines = [head, "|--:|---|---|--:|--:|--:|--:|"]
    for row in rows:
        median = row["quartiles"][-1][1]
        shown = f"{median:.2g}" if median > pictures.LOWEST else "below 1e-9"
        lines.append(
            f"| {row['beta']:g} | {row['memory']} | {row['verdict']} | {shown} "
            f"| {row['beyond_start']:.0%} | {row['arrived']:.0%} | {row['largest']:.2g} |"
        )
    return lines


def _speed_table(rows: list[Row]) -> list[str]:
    samples = sorted({row["samples"] for row in rows})
    lines = ["| samples a step | " + " | ".join(map(str, samples)) + " |"]
    lines.append("|---|" + "--:|" * len(samples))
    means: dict[str, dict[int, float]] = {}
    for row in rows:
        mine = [r["steps"] for r in rows if _cell(r) == _cell(row)]
        means.setdefault(row["system"], {})[row["samples"]] = float(np.mean(mine))
    one = means["adam"][1]
    for system, found in means.items():
        steps = [f"{found[n]:,.0f}" if n in found else "" for n in samples]
        ratios = [f"{one / found[n]:.1f}" if n in found else "" for n in samples]
        lines.append(f"| `{system}`, steps | " + " | ".join(steps) + " |")
        lines.append(f"| `{system}`, times faster than one | " + " | ".join(ratios) + " |")
    return lines


def _cell(row: Row) -> tuple[str, int]:
    return row["system"], row["samples"]


def _floor_table(rows: list[Row]) -> list[str]:
    words = {
        "fixed": "fixed range",
        "block": f"scale of each {floor.BLOCK}",
        "codec": "psq's codec, 5 to 8 bits",
        "noisy": f"fixed range, noise of {NOISE:g}",
    }
    head = (
        "| grid | k_x | gradient norm at the first | at the last | falls as levels to the "
        "| f - min f falls as levels to the |"
    )
    lines = [head, "|---|--:|--:|--:|--:|--:|"]
    for kind, said in words.items():
        mine = [row for row in rows if row["kind"] == kind]
        levels = [2.0 ** row["k"] for row in mine]
        powers = [floor.slope(levels, [r[key] for r in mine]) for key in ("gradient", "excess")]
        first, last = mine[0], mine[-1]
        lines.append(
            f"| {said} | {first['k']:.3g} to {last['k']:.3g} | {first['gradient']:.2e} "
            f"| {last['gradient']:.2e} | {powers[0]:.3f} | {powers[1]:.3f} |"
        )
    (free,) = [row for row in rows if row["kind"] == "exact"]
    lines.append(f"| none | | {free['gradient']:.1e} | {free['gradient']:.1e} | | |")
    return lines


def write_tables(kept: dict[str, list[Row]], page: Path) -> None:
    """Replace what stands between the marks of each section.

    Raises:
        ValueError: the page has no such marks.
    """
    text = page.read_text(encoding="utf-8")
    for name, rows in kept.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            msg = f"{page} has no {begin.strip()} ... {end} to write numbers between"
            raise ValueError(msg)
        text = "".join((before, begin, "\n".join(table(name, rows)), "\n", end, after))
    page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=tuple(MEASURES), help="measure this section")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    options = parser.parse_args()
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    for name in MEASURES:
        if not options.draw and options.only in (None, name):
            kept[name] = measured(name)
            KEPT.parent.mkdir(parents=True, exist_ok=True)
            KEPT.write_text(json.dumps(kept), encoding="utf-8")
    for name, rows in kept.items():
        DRAWN[name](rows, ROOT / "docs" / f"theory-{name}.png")
    write_tables(kept, PAGE)
    print(f"{PAGE} and its pictures written", file=sys.stderr)


if __name__ == "__main__":
    main()

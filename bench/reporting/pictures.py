"""Pictures of the page; what was not measured is left out of them, and so are empty pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reporting.runs import Kept
from reporting.tables import rows_of

OURS, PEER, LEVELS = "#0072B2", "#9a9a9a", ("#0072B2", "#56B4E9", "#B8D8EE", "#dddddd")
SERVERS = {1: "#0072B2", 2: "#009E73", 4: "#D55E00", 0: "#9a9a9a"}
RATES = ("loopback", "10gbit", "1gbit", "100mbit")
SHOWN = ("loopback", "10 Gbit/s", "1 Gbit/s", "100 Mbit/s")
SIZE = "25M"
DPI = 130

Draw = Callable[[dict[str, Kept], Path], bool]


def draw_all(results: dict[str, Kept], folder: Path, name: str) -> dict[str, str]:
    """Section -> file name of its picture."""
    made: dict[str, Draw] = {
        "step": steps,
        "codecs": codecs,
        "scaling": scaling,
        "accuracy": accuracy,
    }
    drawn = {}
    for section, draw in made.items():
        path = folder / f"{name}-{section}.png"
        if draw(results, path):
            drawn[section] = path.name
    return drawn


def result_of(results: dict[str, Kept], name: str) -> Any:
    kept = results.get(name)
    return None if kept is None or kept["error"] else kept["result"]


def new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # noqa: PLC0415 - only pictures need it

    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: Any, *, across: str = "x") -> None:
    axes.grid(axis=across, color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def steps(results: dict[str, Kept], path: Path) -> bool:
    """A panel for each rate: best step of each system, and the floor of its bytes."""
    found = [
        (shown, rows)
        for rate, shown in zip(RATES, SHOWN, strict=True)
        if (rows := all_rows(results, rate))
    ]
    if not found:
        return False
    most = max(len(rows) for _, rows in found)
    figure = new_figure(11.5, 1.3 + 0.32 * most * ((len(found) + 1) // 2))
    panels = figure.subplots((len(found) + 1) // 2, min(2, len(found)), squeeze=False).flat
    for panel, (shown, rows) in zip(panels, found, strict=False):
        step_panel(panel, shown, sorted(rows.values(), key=lambda row: -row["best_s"]))
    for panel in list(panels)[len(found) :]:
        panel.set_visible(False)
    figure.suptitle(
        f"One step of {SIZE} values, 2 workers: best of the run, line to the median; "
        "black mark: the floor of its bytes on the wire",
        fontsize=10,
    )
    figure.savefig(path, dpi=DPI)
    return True


def all_rows(results: dict[str, Kept], rate: str) -> dict[str, Any]:
    """Of a rate's run, and of that of the others that did not fit into it."""
    others = result_of(results, f"step-{rate}-{SIZE}-others") or []
    return rows_of(others) | rows_of(result_of(results, f"step-{rate}-{SIZE}") or [])


def step_panel(axes: Any, title: str, rows: list[dict[str, Any]]) -> None:
    names = [row["system"] for row in rows]
    best = [1e3 * row["best_s"] for row in rows]
    median = [1e3 * row["median_s"] for row in rows]
    colours = [OURS if name.startswith("psq") else PEER for name in names]
    axes.barh(names, best, color=colours, height=0.66)
    axes.hlines(range(len(rows)), best, median, color="#333333", linewidth=1)
    for place, row in enumerate(rows):
        if row["floor_s"]:
            floor = 1e3 * row["floor_s"]
            axes.vlines(floor, place - 0.4, place + 0.4, color="black", linewidth=1.6)
        text = f" {milliseconds(best[place])} ({milliseconds(median[place])})"
        axes.text(max(median[place], best[place]), place, text, va="center", fontsize=8)
    axes.set_xlim(0, 1.18 * max(*median, *best))
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("milliseconds", fontsize=8)
    axes.tick_params(labelsize=8)
    tidy(axes)


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"  # noqa: PLR2004 - no exponents


def codecs(results: dict[str, Kept], path: Path) -> bool:
    """Encode with error feedback by the in-place stream, for each codec and level."""
    result = result_of(results, "codecs")
    if not result:
        return False
    rows = [row for row in result["rows"] if row["verb"] == "encode_ef"]
    names = list(dict.fromkeys(row["codec"] for row in rows))[::-1]
    levels = list(dict.fromkeys(row["level"] for row in rows))
    figure = new_figure(9, 1.2 + 0.3 * len(names))
    axes = figure.subplots()
    height = 0.8 / len(levels)
    for index, level in enumerate(levels):
        ratios = {row["codec"]: row["ratio"] for row in rows if row["level"] == level}
        places = [i + 0.4 - (index + 0.5) * height for i in range(len(names))]
        widths = [ratios.get(name, 0.0) for name in names]
        axes.barh(places, widths, height=height, color=LEVELS[index % len(LEVELS)], label=level)
    axes.axvline(1.0, color="#333333", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel(
        "encode with error feedback, by the in-place memory stream (1 = memory's speed)"
    )
    axes.legend(frameon=False, title="level", loc="center right", bbox_to_anchor=(0.97, 0.5))
    tidy(axes)
    figure.savefig(path, dpi=DPI)
    return True


def scaling(results: dict[str, Kept], path: Path) -> bool:
    """A panel for each network: median step by the number of workers, a line for each S."""
    tables = result_of(results, "scaling") or []
    tables = [t for t in tables if any("median_s" in row for row in t["rows"])]
    if not tables:
        return False
    figure = new_figure(5.2 * len(tables), 3.8)
    for axes, table in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
        rows = [row for row in table["rows"] if "median_s" in row]
        for servers, colour in SERVERS.items():
            line = [(r["workers"], 1e3 * r["median_s"]) for r in rows if r["servers"] == servers]
            if line:
                style = {"color": colour, "marker": "o", "linewidth": 1.8}
                label = (
                    f"psq, {servers} server{'s' if servers > 1 else ''}" if servers else "DDP fp32"
                )
                axes.plot(*zip(*line, strict=True), label=label, **style)
        axes.set_title(
            f"{table['rate']}, {table['size']} values, {table['cores']} cores", loc="left"
        )
        axes.set_xlabel("workers")
        axes.set_ylabel("median step, ms")
        axes.set_xticks(sorted({row["workers"] for row in rows}))
        axes.set_ylim(0)
        axes.legend(frameon=False)
        tidy(axes, across="both")
    figure.savefig(path, dpi=DPI)
    return True


def accuracy(results: dict[str, Kept], path: Path) -> bool:
    """As the bench draws it."""
    runs = result_of(results, "accuracy")
    if not runs or not any(row["points"] for row in runs[0]["rows"]):
        return False
    import accuracy as bench  # noqa: PLC0415 - only this picture needs it
    from reporting.judge import ACCURACY  # noqa: PLC0415

    bench.draw(runs, ACCURACY, path)
    return True

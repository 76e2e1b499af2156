"""The three pictures of docs/theory.md, drawn from what `bench/theory.py` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from reporting.pictures import DPI, new_figure

BLUE, SKY, GREEN, ORANGE, GREY = "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#666666"
BY_MEMORY = (ORANGE, "#E69F00", SKY, BLUE, GREEN)
BY_SYSTEM = {
    "adam": (GREY, "s", "plain Adam, batches of B"),
    "server-adam": (BLUE, "o", "server-adam, W workers"),
    "qadam-1bit": (GREEN, "^", "qadam-1bit, W workers"),
}
LOWEST = 1e-9


def tidy(axes: Any) -> None:
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(11)


def counterexample(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each beta: median distance from the minimum, with quartiles, by memory."""
    rows = [row for row in rows if row["drawn"]]
    betas = sorted({row["beta"] for row in rows})
    figure = new_figure(11, 4.4)
    panels = figure.subplots(1, len(betas), sharey=True)
    for panel, beta in zip(panels, betas, strict=True):
        mine = [row for row in rows if row["beta"] == beta]
        for colour, row in zip(BY_MEMORY, mine, strict=True):
            quartiles = np.maximum(np.array(row["quartiles"]), LOWEST).T
            panel.plot(row["steps"], quartiles[1], color=colour, linewidth=2)
            band = {"color": colour, "alpha": 0.1, "linewidth": 0}
            panel.fill_between(row["steps"], quartiles[0], quartiles[2], **band)
            label = f"{row['memory']}: the condition {row['verdict']}"
            panel.plot([], [], color=colour, linewidth=2, label=label)
        panel.axhline(1.0, color=GREY, linewidth=1, linestyle=(0, (2, 3)))
        panel.set(xscale="log", yscale="log", xlabel="step", ylim=(LOWEST, 200))
        panel.set_title(f"beta = {beta:g}", loc="left", fontweight="bold")
        tidy(panel)
    panels[0].set_ylabel("|x|, the minimum is at 0")
    panels[0].legend(frameon=False, loc="lower left", title="memory constant, or growing as t^r")
    panels[0].text(1.0, 0.6, "where all began", color=GREY, va="top", fontsize=9)
    runs = rows[0]["runs"]
    _note(figure, f"Lines: median of {runs} runs; bands: half of the runs. 1e-9 stands for less.")
    figure.savefig(path, dpi=DPI)


def speedup(rows: list[dict[str, Any]], path: Path) -> None:
    """Steps to the goal by samples a step, and how that compares with 1 / W."""
    figure = new_figure(11, 4.4)
    left, right = figure.subplots(1, 2)
    first = [row for row in rows if row["system"] == "adam" and row["samples"] == 1]
    one = float(np.mean([row["steps"] for row in first]))
    across = np.array(sorted({row["samples"] for row in rows}), float)
    line = {"color": ORANGE, "linestyle": (0, (4, 2)), "linewidth": 1.8}
    left.plot(across, one / across, **line, label="1 / W of the steps of one")
    right.axhline(1.0, **line)
    for system, (colour, marker, label) in BY_SYSTEM.items():
        mine = [row for row in rows if row["system"] == system]
        samples = sorted({row["samples"] for row in mine})
        found = [[r["steps"] for r in mine if r["samples"] == n] for n in samples]
        style = {"color": colour, "marker": marker, "markersize": 6, "linewidth": 1.8}
        left.plot(samples, [np.mean(steps) for steps in found], **style, label=label)
        shares = [[one / n / s for s in steps] for n, steps in zip(samples, found, strict=True)]
        right.plot(samples, [np.mean(each) for each in shares], **style)
        low, high = [min(each) for each in shares], [max(each) for each in shares]
        right.fill_between(samples, low, high, color=colour, alpha=0.15, linewidth=0)
    left.set_yscale("log")
    left.set_title("Steps to the goal", loc="left", fontweight="bold")
    left.legend(frameon=False)
    right.set_title("Speed-up, as a share of W", loc="left", fontweight="bold")
    right.set_ylim(0, 1.25)
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_xticks(across, [f"{n:g}" for n in across])
        panel.set_xlabel("samples in a step: B, or W workers with one each")
        tidy(panel)
    seeds = len(first)
    _note(figure, f"Means of {seeds} seeds; bands: least and most. alpha = alpha_1 sqrt(samples).")
    figure.savefig(path, dpi=DPI)


def weights(rows: list[dict[str, Any]], path: Path) -> None:
    """The floor of gradient norm and of f by the levels of the grid."""
    figure = new_figure(11, 4.6)
    styles = {
        "fixed": (BLUE, "o", "fixed range [-0.5, 0.5]"),
        "block": (GREEN, "^", "scale of each 256 weights"),
        "codec": (ORANGE, "D", "psq's codec, 5 to 8 bits"),
        "noisy": (SKY, "s", "fixed range, noisy gradients"),
    }
    for panel, key, power, title in zip(
        figure.subplots(1, 2),
        ("gradient", "excess"),
        (1, 2),
        ("Gradient norm, root mean square", "f above its minimum, per weight"),
        strict=True,
    ):
        for kind, (colour, marker, label) in styles.items():
            mine = [row for row in rows if row["kind"] == kind]
            k, floors = [row["k"] for row in mine], [row[key] for row in mine]
            dash = "none" if kind == "codec" else "-"
            size = 8 if kind == "codec" else 5
            style = {"color": colour, "marker": marker, "linestyle": dash, "markersize": size}
            panel.plot(k, floors, **style, linewidth=1.8, label=label, zorder=3)
        guide = [row for row in rows if row["kind"] == "fixed"]
        ends = np.array([guide[0]["k"], guide[-1]["k"]])
        theirs = 2.2 * guide[0][key] * 2.0 ** (-power * (ends - ends[0]))
        words = f"slope of levels^-{power}"
        panel.plot(ends, theirs, color=GREY, linestyle=(0, (4, 2)), linewidth=1.4, label=words)
        panel.set_yscale("log")
        panel.set_xticks(range(4, 15))
        panel.set_xlabel("k_x: the grid has 2^k_x steps on each side of 0")
        panel.set_title(title, loc="left", fontweight="bold")
        tidy(panel)
        panel.legend(frameon=False, fontsize=9, loc="lower left")
    figure.savefig(path, dpi=DPI)


def _note(figure: Any, text: str) -> None:
    figure.supxlabel(text, fontsize=9, color=GREY, x=0.012, ha="left")

"""A picture for each task: training loss by step and by bytes, the mean over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from evidence import order
from evidence.cells import Cell, Store
from evidence.methods import method_of
from evidence.subjects import SUBJECTS, Subject
from reporting.pictures import DPI, new_figure, tidy

# Colours, but for one, from Okabe and Ito's palette, which colour-blind readers can tell apart.
LINES: Final = (
    ("adam", "#000000", "--", "plain Adam"),
    ("server-adam", "#0072B2", "-", "server-adam"),
    ("shared-adam", "#7B3294", "-", "shared-adam"),
    ("qadam-1bit", "#D55E00", "-", "qadam-1bit"),
    ("shared-direction", "#009E73", "-", "shared-direction"),
    ("powersgd-1", "#CC79A7", "-.", "PowerSGD, rank 1"),
    ("powersgd-4", "#E69F00", "-.", "PowerSGD, rank 4"),
    ("fp32-sgd", "#999999", "--", "plain SGD"),
    ("ef-sgd", "#56B4E9", "-", "ef-sgd"),
)
Curve = list[tuple[float, float, float]]


def draw_all(store: Store, folder: Path) -> dict[str, str]:
    """Task -> file name of its picture; tasks of which nothing is there have none."""
    drawn = {}
    for subject in SUBJECTS:
        found = [(line, curve_of(_cells(line[0], subject, store), store)) for line in LINES]
        curves = [(line, curve) for line, curve in found if curve]
        if curves:
            path = folder / f"results-{subject.task}.png"
            _draw(subject, curves, path)
            drawn[subject.task] = path.name
    return drawn


def _cells(name: str, subject: Subject, store: Store) -> list[Cell]:
    return order.cells_of(method_of(name), subject, order.MIDDLE, store)


def curve_of(cells: Sequence[Cell], store: Store) -> Curve:
    """(step, megabytes both ways, loss): the mean over those seeds that are there."""
    curves = []
    for cell in cells:
        result = store.get(cell)
        if result is not None and "failure" not in result and result["curve"]:
            curves.append(result["curve"])
    rows: Curve = []
    for at in zip(*curves, strict=False):
        losses = [row[1] for row in at]
        if None in losses:
            break  # it diverged
        step, up, down = at[0][0], at[0][2], at[0][3]
        rows.append((step, (up + down) / 1e6, statistics.mean(losses)))
    return rows


def _draw(subject: Subject, curves: Sequence[tuple[Any, Curve]], path: Path) -> None:
    figure = new_figure(11, 4.2)
    axes = figure.subplots(1, 2, sharey=True)
    for (_, colour, dash, words), curve in curves:
        steps, megabytes, losses = zip(*curve, strict=True)
        for axis, across in zip(axes, (steps, megabytes), strict=True):
            axis.plot(across, losses, dash, color=colour, label=words, linewidth=1.7)
    axes[0].set_ylabel("training loss")
    axes[0].set_xlabel("step")
    axes[1].set_xlabel("sent and received by each worker, MB (logarithmic)")
    axes[1].set_xscale("log")
    start = statistics.median(curve[0][2] for _, curve in curves)
    axes[0].set_ylim(None, 1.1 * start)
    figure.suptitle(f"{subject.title}, {order.MIDDLE} workers", x=0.01, ha="left", fontsize=11)
    for axis in axes:
        tidy(axis, across="both")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=DPI)

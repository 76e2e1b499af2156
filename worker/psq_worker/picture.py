"""The picture of a demo: loss and score, against steps and against bytes, psq beside fp32.

Four panels. The left column shows that psq needs no more steps than plain Adam; the right one, that
it needs far fewer bytes. Where a recipe changes how many bits it says a value in, a strip below
shows these by step. The two colours are from Okabe and Ito's palette, which colour-blind
readers can tell apart, and the lines differ in dash as well. matplotlib is imported only to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from psq_worker.board import Board, Point, metric_words

__all__ = ["Curve", "curve_of", "draw"]

BINS: Final = 60
BYTES_PER_MB: Final = 1e6
BLUE: Final = "#0072B2"
ORANGE: Final = "#D55E00"
GREY: Final = "#666666"
STRIP: Final = 0.16  # of a panel's height, kept free below the lines for the arrow
LEAST_CHANGE: Final = 0.05  # bits: below it there is nothing to see
ACCURACY: Final = "Test accuracy"


@dataclass(frozen=True, slots=True)
class Curve:
    """A job as lines: parallel lists of equal length for losses and for scores.

    Attributes:
        loss_steps, loss_bytes, losses: binned means, and the bytes one worker had sent by then.
        score_steps, score_bytes, scores: the evaluations.
        bits_steps, bits: what a value that was said took, binned means; none where nothing was.
    """

    label: str
    metric: str
    loss_steps: tuple[float, ...]
    loss_bytes: tuple[float, ...]
    losses: tuple[float, ...]
    score_steps: tuple[float, ...]
    score_bytes: tuple[float, ...]
    scores: tuple[float, ...]
    bits_steps: tuple[float, ...] = ()
    bits: tuple[float, ...] = ()


def curve_of(label: str, board: Board) -> Curve:
    """The lines of a finished job."""
    binned = _bin(board.points, max(1, board.step))
    said = [replace(p, loss=p.bits) for p in board.points if p.bits is not None]
    bits = _bin(said, max(1, board.step))
    scored = [e for e in board.evaluations if e.metric in e.scores]
    return Curve(
        label=label,
        metric=scored[-1].metric if scored else "",
        loss_steps=tuple(step for step, _, _ in binned),
        loss_bytes=tuple(sent for _, sent, _ in binned),
        losses=tuple(loss for _, _, loss in binned),
        score_steps=tuple(float(e.step) for e in scored),
        score_bytes=tuple(float(e.sent_bytes) for e in scored),
        scores=tuple(e.scores[e.metric] for e in scored),
        bits_steps=tuple(step for step, _, _ in bits),
        bits=tuple(mean for _, _, mean in bits),
    )


def _bin(points: Sequence[Point], steps: int) -> list[tuple[float, float, float]]:
    """(step, bytes, loss) means over equal ranges of steps, weighted by a point's steps."""
    sums: dict[int, list[float]] = {}
    for point in points:
        index = min(BINS - 1, (point.step - 1) * BINS // steps)
        row = sums.setdefault(index, [0.0, 0.0, 0.0, 0.0])
        values = (1.0, point.step, point.sent_bytes, point.loss)
        for column, value in enumerate(values):
            row[column] += value * point.steps
    return [(s / n, b / n, loss / n) for _, (n, s, b, loss) in sorted(sums.items())]


def draw(path: Path, title: str, subtitle: str, psq: Curve, baseline: Curve) -> None:
    """Write the picture as PNG.

    Raises:
        ImportError: matplotlib is not installed (the extra "plot" brings it).
        OSError: the file cannot be written.
    """
    from matplotlib import rc_context  # noqa: PLC0415 - half a second that only a picture needs
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    with rc_context(STYLE):
        strip = _changes(psq.bits)
        figure = Figure(figsize=(11, 7.4 + 1.8 * strip), layout="constrained")
        heights = (7.4, 1.8)[: 1 + strip]
        parts = figure.subfigures(1 + strip, 1, height_ratios=heights, squeeze=False)
        panels, *below = parts[:, 0]
        axes = panels.subplots(2, 2, sharey="row")
        figure.suptitle(title, fontsize=15, fontweight="bold", x=0.012, ha="left")
        for curve, colour, dash in ((baseline, ORANGE, (0, (4, 2))), (psq, BLUE, "-")):
            style = {"color": colour, "linestyle": dash, "label": curve.label}
            _draw_curve(axes, curve, style)
        _label(axes, _metric_words(psq.metric))
        for row in axes:
            low, high = row[0].get_ylim()
            row[0].set_ylim(low - STRIP * (high - low), high)
        _mark_ratio(axes[0, 1], psq.loss_bytes, baseline.loss_bytes)
        _mark_ratio(axes[1, 1], psq.score_bytes, baseline.score_bytes)
        if below:
            _draw_bits(below[0].subplots(), psq)
        figure.supxlabel(subtitle, fontsize=9, color=GREY, x=0.012, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140)


def _changes(bits: Sequence[float]) -> bool:
    return max(bits, default=0.0) - min(bits, default=0.0) > LEAST_CHANGE


def _draw_bits(axis: Any, curve: Curve) -> None:
    axis.plot(curve.bits_steps, curve.bits, color=BLUE, drawstyle="steps-mid", label=curve.label)
    axis.set_title("Bits of a value that was said, by step")
    axis.set_ylabel("bits")
    axis.set_xlabel("step")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)


STYLE: Final[Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.edgecolor": GREY,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "font.size": 10.5,
}


def _draw_curve(axes: Any, curve: Curve, style: dict[str, Any]) -> None:
    percent = 100 if curve.metric == "accuracy" else 1
    scores = [percent * score for score in curve.scores]
    axes[0, 0].plot(curve.loss_steps, curve.losses, **style)
    axes[0, 1].plot(_megabytes(curve.loss_bytes), curve.losses, **style)
    axes[1, 0].plot(curve.score_steps, scores, marker="o", markersize=4, **style)
    axes[1, 1].plot(_megabytes(curve.score_bytes), scores, marker="o", markersize=4, **style)


def _label(axes: Any, metric: str) -> None:
    from matplotlib.ticker import LogLocator  # noqa: PLC0415 - an extra, absent from some installs

    axes[0, 0].set_title("Training loss by step")
    axes[0, 1].set_title("Training loss by bytes sent")
    axes[1, 0].set_title(f"{metric} by step")
    axes[1, 1].set_title(f"{metric} by bytes sent")
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("percent" if metric == ACCURACY else metric.lower())
    for axis in axes[:, 0]:
        axis.set_xlabel("step")
        axis.set_xlim(left=0)
    for axis in axes[:, 1]:
        axis.set_xlabel("sent by each worker, MB")
        if any(max(line.get_xdata(), default=0) > 0 for line in axis.lines):
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")
            axis.set_xlabel("sent by each worker, MB (logarithmic)")
    axes[0, 0].legend(loc="upper right")


def _mark_ratio(axis: Any, ours: Sequence[float], theirs: Sequence[float]) -> None:
    """An arrow from where fp32's line ends to where ours does, with how many times it spans."""
    if not ours or not theirs or min(ours[-1], theirs[-1]) <= 0:
        return
    ends = _megabytes((theirs[-1], ours[-1]))
    arrow = {"arrowstyle": "->", "color": GREY, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
    heights = {"xycoords": ("data", "axes fraction"), "textcoords": ("data", "axes fraction")}
    axis.annotate("", xy=(ends[1], 0.05), xytext=(ends[0], 0.05), arrowprops=arrow, **heights)
    words = f"{ends[0] / ends[1]:.1f} times fewer"
    middle = (ends[0] * ends[1]) ** 0.5  # the middle of a logarithmic axis
    axis.text(middle, 0.06, words, transform=axis.get_xaxis_transform(), ha="center", va="bottom")


def _megabytes(counts: Sequence[float]) -> list[float]:
    return [count / BYTES_PER_MB for count in counts]


def _metric_words(metric: str) -> str:
    return metric_words(metric).capitalize() if metric else "Score"

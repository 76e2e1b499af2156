"""A simulated job for people and programs: JSON lines, a table, a picture.

    {"psq": "simulation", ...settings...}         first
    {"psq": "step", "step": 1, "loss": ...}       each step of all workers
    {"psq": "score", "step": 100, ...}            each evaluation
    {"psq": "result", ...}                        last

Seconds are virtual unless they are called wall_s; bytes are of one worker, on the wire.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from psq import __version__
from psq_worker.board import bits_curve, metric_words
from psq_worker.display import format_bytes, format_ms, format_score
from psq_worker.picture import BLUE, ORANGE, STYLE
from psq_worker.simulate.cluster import SimResult
from psq_worker.simulate.config import SimConfig
from psq_worker.simulate.trace import Point, Score, Usage

__all__ = [
    "draw",
    "dump",
    "late_loss",
    "opening",
    "point_line",
    "result_plain",
    "score_line",
    "summary_table",
]

NEAR: Final = 1.5  # times as late: a line farther right would squeeze what is to be seen
SMOOTH: Final = 60  # a loss is drawn as the mean of so many equal parts of the run


def opening(config: SimConfig, task: str) -> dict[str, Any]:
    """The settings, as plain data."""
    plain = dataclasses.asdict(dataclasses.replace(config, task=task, recipe="-"))
    plain["recipe"] = config.recipe if isinstance(config.recipe, str) else config.recipe.to_plain()
    return _line({"psq": "simulation", "version": __version__, **plain})


def point_line(point: Point) -> dict[str, Any]:
    """A step, as plain data."""
    return _line(
        {
            "psq": "step",
            "step": point.step,
            "loss": point.loss,
            **point.usage._asdict(),
            "staleness": point.staleness,
            "bits": point.bits,
        }
    )


def score_line(score: Score) -> dict[str, Any]:
    """An evaluation, as plain data."""
    return _line(
        {
            "psq": "score",
            "step": score.step,
            **score.usage._asdict(),
            "scores": dict(score.scores),
        }
    )


def result_plain(result: SimResult, dense: Usage | None) -> dict[str, Any]:
    """The end of a job in numbers; of dense fp32 beside it, what the network alone makes of it."""
    steps = result.points[-1].step if result.points else 0
    plain = {
        "psq": "result",
        "task": result.task,
        "recipe": result.recipe.name,
        "workers": result.workers,
        "numel": result.numel,
        "steps": steps,
        "rounds": result.rounds,
        "loss": late_loss(result.points),
        "metric": result.metric,
        "score": result.score,
        **result.usage._asdict(),
        "virtual_s_per_step": result.usage.virtual_s / max(1, steps),
        "bits_up": result.bits_up,
        "bits_down": result.bits_down,
        "bits_curve": bits_curve([(p.step, 1, p.bits) for p in result.points], steps),
        "rejected": result.rejected,
        "skipped": result.skipped,
        "resent_frames": result.resent_frames,
        "lost_frames": result.lost_frames,
        "resets": result.resets,
        "wall_s": result.wall_s,
        "dense_per_step": None if dense is None else dense._asdict(),
    }
    return _line(plain)


def late_loss(points: Sequence[Point]) -> float:
    """The mean of the last tenth of the steps: one batch says little."""
    late = points[-max(1, len(points) // 10) :]
    losses = [point.loss for point in late if math.isfinite(point.loss)]
    return sum(losses) / len(losses) if losses else math.nan


def summary_table(plain: dict[str, Any]) -> RenderableType:
    """The end of a job beside dense fp32 on the same network."""
    steps, dense = plain["steps"], plain["dense_per_step"]
    rows = [
        (metric_words(plain["metric"]), _score(plain), "-"),
        ("training loss, last tenth", _digits(plain["loss"]), "-"),
        ("virtual time", *_both(_seconds, plain, "virtual_s", steps)),
        ("virtual time of a step", *_both(format_ms, plain, "virtual_s", 1, 1 / max(1, steps))),
        ("bits per parameter, up", f"{plain['bits_up']:.2f}", "-"),
        ("bits per parameter, down", f"{plain['bits_down']:.2f}", "-"),
        ("sent per worker", *_both(format_bytes, plain, "up_bytes", steps)),
        ("received per worker", *_both(format_bytes, plain, "down_bytes", steps)),
    ]
    counted = ("rejected", "skipped", "lost_frames", "resent_frames", "resets")
    rows += [(name.replace("_", " "), f"{plain[name]:,}", "-") for name in counted if plain[name]]
    rows.append(("computed in", f"{plain['wall_s']:.1f} s", "-"))
    table = Table(header_style="bold")
    table.add_column("")
    table.add_column("simulated", justify="right")
    if dense is not None:
        table.add_column("dense fp32, not trained", justify="right")
    for row in rows:
        table.add_row(*(row if dense is not None else row[:2]))
    words = f"{plain['task']}: {plain['workers']} virtual workers, {plain['recipe']}"
    return Group(Text(f"{words}, {plain['steps']:,} steps", style="bold"), table)


def _both(
    show: Callable[[float], str], plain: dict[str, Any], key: str, times: int, factor: float = 1.0
) -> tuple[str, str]:
    """A number of the job, and the same of dense fp32, of which one step is known."""
    dense = plain["dense_per_step"]
    return show(factor * plain[key]), "-" if dense is None else show(times * dense[key])


def draw(path: Path, result: SimResult, dense: Usage | None) -> None:
    """Write loss and score as PNG: against steps, virtual time and bytes.

    Raises:
        ImportError: matplotlib is not installed (the extra "plot" brings it).
        OSError: the file cannot be written.
    """
    from matplotlib import rc_context  # noqa: PLC0415 - half a second that only a picture needs
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    smooth = _smooth(result.points)
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 7.2), layout="constrained")
        axes = figure.subplots(2, 3, sharey="row", sharex="col")
        words = f"{result.task}: {result.recipe.name} with {result.workers} virtual workers"
        figure.suptitle(words, fontsize=15, fontweight="bold", x=0.012, ha="left")
        for column, name in enumerate(("step", "virtual time, s", "sent by each worker, MB")):
            losses = [(_place(p.step, p.usage, column), p.loss) for p in smooth]
            scored = [(_place(s.step, s.usage, column), _shown(result, s)) for s in result.scores]
            axes[0, column].plot(*zip(*losses, strict=True), color=BLUE)
            if scored:
                axes[1, column].plot(*zip(*scored, strict=True), color=BLUE, marker="o")
            axes[1, column].set_xlabel(name)
        axes[0, 0].set_ylabel("training loss")
        percent = ", %" if result.metric == "accuracy" else ""
        axes[1, 0].set_ylabel(metric_words(result.metric) + percent)
        if dense is not None and result.points:
            end_s = dense.virtual_s * result.points[-1].step
            _mark_dense(axes[:, 1], end_s, result.points[-1].usage.virtual_s)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140)


def _mark_dense(axes: Any, end_s: float, ours_s: float) -> None:
    """Say when dense fp32 would have ended: by a line, where it does not squeeze ours to see it."""
    words = f"dense fp32 ends at {end_s:,.3g} s"
    if end_s <= NEAR * ours_s:
        for axis in axes:
            axis.axvline(end_s, color=ORANGE, linestyle=(0, (4, 2)))
    elif ours_s > 0.0:
        words += f", {end_s / ours_s:,.3g} times as late"
    axes[0].set_title(words, color=ORANGE, fontsize=10, fontweight="normal", loc="right")


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Means over equal parts of the run, each at its last step."""
    known = [point for point in points if math.isfinite(point.loss)]
    size = max(1, len(known) // SMOOTH)
    parts = [known[start : start + size] for start in range(0, len(known), size)]
    return [
        dataclasses.replace(part[-1], loss=sum(p.loss for p in part) / len(part)) for part in parts
    ]


def _place(step: int, usage: Any, column: int) -> float:
    return (float(step), usage.virtual_s, usage.up_bytes / 1e6)[column]


def _shown(result: SimResult, score: Score) -> float:
    value = score.scores.get(result.metric, math.nan)
    return 100 * value if result.metric == "accuracy" else value


def _score(plain: dict[str, Any]) -> str:
    return "-" if plain["score"] is None else format_score(plain["metric"], plain["score"])


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _seconds(value: float) -> str:
    return f"{value:,.2f} s"


def _line(plain: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = _finite(plain)
    return made


def _finite(plain: Any) -> Any:
    """The same for JSON, which has neither NaN nor Inf."""
    if isinstance(plain, dict):
        return {key: _finite(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [_finite(value) for value in plain]
    if isinstance(plain, float) and not math.isfinite(plain):
        return None if math.isnan(plain) else str(plain)
    return plain


def dump(plain: dict[str, Any]) -> str:
    """One JSON line."""
    return json.dumps(plain, separators=(",", ":")) + "\n"

"""Trains both tasks with several seeds through real processes and writes docs/results.md.

    python bench/results.py              about a quarter of an hour on two cores; `make results`
    python bench/results.py --seeds 0 1

Each cell (task, method, seed) is one server with its workers, or plain Adam in one process; its
numbers are kept as JSON under runs/results/, and cells already there are not trained again. All
methods of a task see the same samples in the same steps from the same initial weights, at the same
learning rate. Bytes are counted at the socket, headers included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from psq.config import WorkerConfig
from psq.presets import preset
from psq_worker.board import Board
from psq_worker.display import make_view
from psq_worker.launch import Commands, child_env, launch, run_one
from psq_worker.picture import curve_of
from psq_worker.tasks.idx import SHIPPED_DIR

ROOT: Final = Path(__file__).resolve().parent.parent
CELLS: Final = ROOT / "runs" / "results"
PAGE: Final = ROOT / "docs" / "results.md"
PICTURE: Final = ROOT / "docs" / "results.png"

WORKERS: Final = 2
SEEDS: Final = (0, 1, 2)


@dataclass(frozen=True)
class Method:
    """A way to train: its name in files and tables, and the flags that choose it."""

    name: str
    colour: str
    words: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, colour: str, recipe: str, uplink: str, downlink: str) -> Method:
        words = ("--recipe", recipe, "--uplink", uplink, "--downlink", downlink)
        return cls(name, colour, words)


BASELINE: Final = Method("adam", "#000000")
# Codecs are written out, so that a cell stays what it was when a recipe's defaults change.
METHODS: Final = (
    BASELINE,
    Method.of("fp32", "#999999", "fp32", "fp32", "weights:fp32"),
    Method.of(
        "server-adam, 4 + 3 bits",
        "#0072B2",
        "server-adam",
        "lloyd-max:bits=4,block=256",
        "delta:lloyd-max:bits=3",
    ),
    Method.of(
        "server-adam, 4 + 1 bits", "#009E73", "server-adam", "log:k=6,block=256", "delta:sign"
    ),
    Method.of(
        "qadam-1bit, 1 + 1 bits", "#D55E00", "qadam-1bit", "sign:norm=l2", "delta:sign:norm=l2"
    ),
)
# Two-sided 95 % points of Student's t by degrees of freedom; beyond them the last, which is wider.
STUDENT_95: Final = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Subject:
    """A task and how its score is shown."""

    task: str
    title: str
    score: str
    scale: float
    digits: int
    words: tuple[str, ...] = ()

    def show(self, value: float, *, sign: bool = False) -> str:
        shown = round(self.scale * value, self.digits) or 0.0  # no negative zero
        return f"{shown:{'+' if sign else ''}.{self.digits}f}"


SUBJECTS: Final = (
    Subject(
        "fashion-mnist",
        "Convolutional network, Fashion-MNIST (the subset that psq ships)",
        "test accuracy, %",
        100,
        2,
        ("--data", str(SHIPPED_DIR)),
    ),
    Subject("char-lm", "Transformer, characters of Shakespeare", "validation loss, nats", 1, 4),
)


def train_cell(subject: Subject, method: Method, seed: int) -> dict[str, Any]:
    """Trains one cell by processes of its own; its numbers as plain data."""
    path = CELLS / f"{subject.task}-{re.sub(r'[^a-z0-9]+', '-', method.name)}-{seed}.json"
    if path.exists():
        cell: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cell
    started_s = time.monotonic()
    board = _run(subject, method, ("--task", subject.task, "--seed", str(seed), *subject.words))
    cell = {
        "summary": board.summary(),
        "curve": dataclasses.asdict(curve_of(method.name, board)),
        "wall_s": time.monotonic() - started_s,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(cell), encoding="utf-8")
    partial.replace(path)
    return cell


def _run(subject: Subject, method: Method, words: tuple[str, ...]) -> Board:
    env = child_env(WORKERS, os.environ) | {"OMP_NUM_THREADS": "1"}
    with make_view(f"{subject.task}, {method.name}", quiet=True) as view:
        if method is BASELINE:
            flags = ["--world-size", str(WORKERS), "--progress", "json", "--json", *words]
            command = [sys.executable, "-m", "psq_worker.cli", "baseline", *flags]
            return run_one("baseline", command, view, env)
        return launch(Commands(WORKERS, worker_words=(*method.words, *words)), view, env)


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval; infinite for a single value."""
    mean = statistics.mean(differences)
    if len(differences) < 2:  # noqa: PLR2004 - one value has no spread
        return mean, float("inf")
    spread = statistics.stdev(differences) / len(differences) ** 0.5
    return mean, STUDENT_95[min(len(differences) - 1, len(STUDENT_95)) - 1] * spread


Cells = dict[tuple[str, str], list[dict[str, Any]]]


def write_page(cells: Cells, seeds: list[int]) -> None:
    about = (
        "Made by `make results` ([`bench/results.py`](../bench/results.py)); do not edit. One "
        f"`psq-server` and {WORKERS} `psq-worker` processes on one machine, seeds "
        f"{', '.join(map(str, seeds))}. All methods of a task see the same samples in the same "
        "steps from the same initial weights, with the same learning rate and schedule; plain Adam "
        "takes the workers' batches as one. Bits are per parameter and step, counted at the socket "
        "with all headers and heartbeats, and without the initial weights."
    )
    lines = ["# Results", "", about, "", "![score by step and by bytes](results.png)", ""]
    for subject in SUBJECTS:
        lines += _section(subject, cells)
    lines += [_machine(), ""]
    PAGE.write_text("\n".join(lines), encoding="utf-8")


def _section(subject: Subject, cells: Cells) -> list[str]:
    plain = [cell["summary"] for cell in cells[subject.task, BASELINE.name]]
    scores = [summary["score"] for summary in plain]
    first = plain[0]
    head = (
        f"| method | {subject.score}, mean | per seed | minus Adam, 95 % interval | bits up "
        "| bits down | fewer bytes |"
    )
    lines = [
        f"## {subject.title}",
        "",
        f"{first['numel']:,} parameters, {first['steps']:,} steps of "
        f"{first['samples'] // first['steps']} samples. " + _spread_words(subject, scores),
        "",
        head,
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    lines += [_row(subject, method, cells) for method in METHODS]
    return [*lines, ""]


def _spread_words(subject: Subject, scores: list[float]) -> str:
    if len(scores) < 2:  # noqa: PLR2004 - one value has no spread
        return ""
    return (
        f"Plain Adam's score has a standard deviation of {subject.show(statistics.stdev(scores))} "
        "from seed to seed."
    )


def _row(subject: Subject, method: Method, cells: Cells) -> str:
    ours = [cell["summary"] for cell in cells[subject.task, method.name]]
    plain = [cell["summary"]["score"] for cell in cells[subject.task, BASELINE.name]]
    scores = [summary["score"] for summary in ours]
    each = " ".join(subject.show(score) for score in scores)
    line = f"| {_words(method, ours[0])} | {subject.show(statistics.mean(scores))} | {each} "
    if method is BASELINE:
        return f"{line}| | 32 | 32 | 1x |"
    mean, half = interval([a - b for a, b in zip(scores, plain, strict=True)])
    wire = ours[0]["wire"]
    return (
        f"{line}| {subject.show(mean, sign=True)} ± {subject.show(half)} "
        f"| {wire['bits_per_parameter_up']:.2f} | {wire['bits_per_parameter_down']:.2f} "
        f"| {wire['compression_ratio']:.1f}x |"
    )


def _words(method: Method, summary: dict[str, Any]) -> str:
    """What a row is: the recipe as the workers named it, and whether it is a preset as it comes."""
    if method is BASELINE:
        return "plain `torch.optim.Adam`, one process"
    name, _, codecs = summary["recipe"].partition(" ")
    recipe = preset(name)
    up, down = recipe.uplink.codec, recipe.downlink
    is_default = summary["recipe"] == f"{name} ({up} up, {down.kind} {down.codec} down)"
    note = ", psq's default" if is_default and name == WorkerConfig().recipe else ""
    return f"`{name}` {codecs}{note}"


def _machine() -> str:
    import torch  # noqa: PLC0415 - half a second that only the page needs

    from psq import __version__, kernels  # noqa: PLC0415

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"psq {__version__}, {kernels.level()} kernels, torch {torch.__version__.split('+')[0]}, "
        f"Python {platform.python_version()}, {platform.machine()}, {cores} cores, one thread per "
        "process."
    )


def draw(cells: Cells) -> None:
    """Score by step and by bytes; lines are means over the seeds, bands go from min to max."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only the picture needs it

    figure = Figure(figsize=(11, 7.4), layout="constrained")
    axes = figure.subplots(len(SUBJECTS), 2, sharey="row", squeeze=False)
    for row, subject in zip(axes, SUBJECTS, strict=True):
        for method in METHODS:
            _draw_method(row, subject, method, cells[subject.task, method.name])
        row[0].set_ylabel(subject.score)
        row[0].set_title(f"{subject.title}: by step", loc="left", fontsize=10)
        row[1].set_title("by bytes", loc="left", fontsize=10)
        row[0].set_xlabel("step")
        row[1].set_xlabel("sent and received by each worker, MB (logarithmic)")
        row[1].set_xscale("log")
        for axis in row:
            axis.grid(color="#e6e6e6")
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    figure.savefig(PICTURE, dpi=140)


def _draw_method(row: Any, subject: Subject, method: Method, ours: list[dict[str, Any]]) -> None:
    curves, wire = [cell["curve"] for cell in ours], ours[0]["summary"]["wire"]
    scores = list(zip(*(curve["scores"] for curve in curves), strict=True))
    mean = [subject.scale * statistics.mean(at) for at in scores]
    low = [subject.scale * min(at) for at in scores]
    high = [subject.scale * max(at) for at in scores]
    both_ways = 1 + wire["bits_per_parameter_down"] / wire["bits_per_parameter_up"]
    megabytes = [both_ways * count / 1e6 for count in curves[0]["score_bytes"]]
    dash = "--" if method is BASELINE else "-"
    for axis, across in zip(row, (curves[0]["score_steps"], megabytes), strict=True):
        axis.plot(across, mean, dash, color=method.colour, label=method.name, linewidth=1.8)
        axis.fill_between(across, low, high, color=method.colour, alpha=0.15, linewidth=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options = parser.parse_args()
    cells: Cells = {}
    for subject in SUBJECTS:
        for method in METHODS:
            for seed in options.seeds:
                cell = train_cell(subject, method, seed)
                cells.setdefault((subject.task, method.name), []).append(cell)
                score = subject.show(cell["summary"]["score"])
                print(
                    f"{subject.task} {method.name} seed {seed}: {score} in {cell['wall_s']:.0f} s",
                    flush=True,
                )
    write_page(cells, options.seeds)
    draw(cells)
    print(f"{PAGE} and {PICTURE} written")


if __name__ == "__main__":
    main()

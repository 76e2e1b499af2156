"""`psq demo`: the same job twice, through psq and by plain Adam, side by side.

Both see the same samples in the same steps from the same initial weights. The workers' number does
not change the job: W workers share each global batch, plain Adam takes it whole. It has the same
learning rate, unless the recipe is none of Adam's: then plain Adam has the one that the task gives
it, and the page says both.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

from psq import __version__
from psq.config import WorkerConfig
from psq.errors import StateError
from psq_worker.board import Board, metric_words
from psq_worker.display import make_view
from psq_worker.doctor import cores
from psq_worker.launch import Commands, cast_words, child_env, launch, run_one, threads_words
from psq_worker.picture import Curve, curve_of, draw
from psq_worker.recipes import recipe_of, takes_adams_rate
from psq_worker.report import comparison_table

__all__ = ["run_demo", "verdict"]

PICTURE: Final = "demo.png"
NUMBERS: Final = "demo.json"


def run_demo(  # noqa: PLR0913 - one keyword for each thing that is typed
    told: WorkerConfig,
    *,
    servers: int,
    output: str,
    words: tuple[str, ...],
    plain_words: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run both jobs, print the comparison, write the picture and the numbers.

    Args:
        told: what every worker is told; its world_size is the number of workers.
        servers: how many to start.
        output: folder for the files; made if it is not there.
        words: the flags that were typed for the workers.
        plain_words: those of them that plain Adam understands too.
        as_json: print the numbers instead of the table.

    Raises:
        StateError: the folder cannot be written to.
        PsqError: whatever ends `launch`.
    """
    folder = _make_folder(output)
    data = _data_words(told)
    timeline, worker_words = told.timeline_filename, (*words, *data)
    commands = Commands(told.world_size, servers, timeline=timeline, worker_words=worker_words)
    rates = _rates(told)
    psq = _run_psq(told, commands)
    plain = (*plain_words, *data, *(("--lr", str(rates.baseline)) if rates else ()))
    baseline = _run_baseline(told, plain)
    numbers = _numbers(psq, baseline, rates)
    (folder / NUMBERS).write_text(json.dumps(numbers, indent=2) + "\n")
    picture = _draw(folder / PICTURE, numbers, psq, baseline)
    if as_json:
        click.echo(json.dumps(numbers, indent=2))
        return
    console = Console()
    console.print()
    note = rates.words if rates else ""
    console.print(comparison_table(numbers["psq"], numbers["baseline"], note))
    console.print(verdict(numbers), style="bold", soft_wrap=True)
    console.print(f"\nPicture: {picture}\nNumbers: {(folder / NUMBERS).resolve()}", soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Rates:
    """Learning rates of two jobs that cannot have the same, at their first step."""

    psq: float
    baseline: float

    @property
    def words(self) -> str:
        """What to know of the comparison."""
        return (
            f"The recipe is none of Adam's: psq's learning rate is {self.psq:g}, plain Adam's "
            f"{self.baseline:g}, the task's own."
        )


def _rates(told: WorkerConfig) -> Rates | None:
    """Both learning rates, where one that suits Adam does not suit the recipe."""
    if takes_adams_rate(recipe_of(told)):
        return None
    from psq_worker.tasks import find_task, job_defaults  # noqa: PLC0415 - imports torch

    own = job_defaults(find_task(told.task, told.data)).lr
    return Rates(own if told.lr is None else told.lr, own)


def _data_words(told: WorkerConfig) -> tuple[str, ...]:
    """The shipped images unless others were named: the demo shows the same on every machine."""
    if told.task != "fashion-mnist" or told.data is not None:
        return ()
    from psq_worker.tasks.idx import SHIPPED_DIR  # noqa: PLC0415 - torch comes with it

    return ("--data", str(SHIPPED_DIR))


def _run_psq(told: WorkerConfig, commands: Commands) -> Board:
    env = child_env(commands.workers, os.environ)
    title = f"1 of 2: {told.task} through psq, {cast_words(commands, env)}"
    with make_view(title) as view:
        return launch(commands, view, env)


def _run_baseline(told: WorkerConfig, words: tuple[str, ...]) -> Board:
    env = child_env(1, os.environ)
    title = f"2 of 2: the same job by plain Adam in one process, {threads_words(env)}"
    flags = ["--world-size", str(told.world_size), "--progress", "json", "--json"]
    command = [sys.executable, "-m", "psq_worker.cli", "baseline", *flags, *words]
    with make_view(title) as view:
        return run_one("baseline", command, view, env)


def _numbers(psq: Board, baseline: Board, rates: Rates | None) -> dict[str, Any]:
    ours, plain = psq.summary(), baseline.summary()
    difference = None
    if ours.get("score") is not None and plain.get("score") is not None:
        difference = ours["score"] - plain["score"]
    return {
        "version": __version__,
        "cores": cores(),
        "psq": ours,
        "baseline": plain,
        "score_difference": difference,
        "learning_rates": dataclasses.asdict(rates) if rates else None,
        "curves": {
            "psq": dataclasses.asdict(curve_of("psq", psq)),
            "baseline": dataclasses.asdict(curve_of("plain Adam", baseline)),
        },
    }


def verdict(numbers: dict[str, Any]) -> str:
    """The comparison in one sentence."""
    ours, difference = numbers["psq"], numbers["score_difference"]
    ratio = ours["wire"]["compression_ratio"]
    words = f"psq sent {ratio:.1f} times fewer bytes than fp32"
    if difference is None:
        return f"{words}."
    accuracy = ours["metric"] == "accuracy"
    shown = f"{100 * difference:+.2f} points" if accuracy else f"{difference:+.4f}"
    return f"{words}; {metric_words(ours['metric'])} differs by {shown}."


def _draw(path: Path, numbers: dict[str, Any], psq: Board, baseline: Board) -> str:
    """Draw the picture; where it is, or why it is not."""
    ours, rates = numbers["psq"], numbers["learning_rates"]
    wire = ours["wire"]
    title = f"{ours['task']}: psq with {ours['workers']} workers, beside plain fp32 Adam"
    subtitle = (
        f"recipe {ours['recipe']}"
        + (f", lr {rates['psq']:g} (plain Adam: {rates['baseline']:g})" if rates else "")
        + f"\n{ours['numel']:,} parameters, "
        f"{wire['bits_per_parameter_up']:.2f} bits per parameter up and "
        f"{wire['bits_per_parameter_down']:.2f} down, counted on the wire with headers"
    )
    bits = (
        f"{wire['bits_per_parameter_up']:.1f} bits up, {wire['bits_per_parameter_down']:.1f} down"
    )
    label = f"psq ({bits})"
    curves: list[Curve] = [curve_of(label, psq), curve_of("plain Adam (fp32, 32 bits)", baseline)]
    try:
        draw(path, title, subtitle, *curves)
    except ImportError:
        return "not drawn, matplotlib is not installed (the extra psq-train[plot] brings it)"
    return str(path.resolve())


def _make_folder(output: str) -> Path:
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"cannot make the folder {output!r}: {error.strerror}"
        raise StateError(msg) from error
    return folder

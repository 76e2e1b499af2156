"""`psq simulate`: settings in, progress on stderr, a table on stdout, files where asked for."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import click
from rich.console import Console

from psq.config import SimulateConfig, WorkerConfig
from psq.errors import StateError
from psq_worker.board import metric_words
from psq_worker.display import format_score
from psq_worker.recipes import rate_warning, recipe_of
from psq_worker.simulate.cluster import SimResult, dense_usage, simulate
from psq_worker.simulate.config import SimConfig
from psq_worker.simulate.report import (
    draw,
    dump,
    opening,
    point_line,
    result_plain,
    score_line,
    summary_table,
)
from psq_worker.simulate.settings import config_of
from psq_worker.simulate.trace import Point, Score, Usage
from psq_worker.tasks import find_task, job_defaults

__all__ = ["run_simulate"]

PLAIN_EVERY_S: Final = 5.0
LIVE_EVERY_S: Final = 0.2


def run_simulate(told: WorkerConfig, wanted: SimulateConfig) -> None:
    """Simulate the job, say how it goes, and print what it came to.

    Raises:
        ConfigError: what is asked for cannot be.
        StateError: a file cannot be written.
        GaveUpError: workers wait for somebody who never comes, in virtual time.
    """
    task = find_task(told.task, told.data)
    config = config_of(told, wanted, task)
    console = Console(stderr=True)
    with _quiet_log(), _lines(wanted.save_report) as lines, _Progress(console) as progress:
        _write(lines, opening(config, task.name))
        progress.warn(rate_warning(told, recipe_of(told), job_defaults(task).lr))
        result = _run(config, progress, lines)
        dense = None
        if not wanted.alone:
            progress.say("dense fp32 on the same network")
            dense = dense_usage(config)
        plain = result_plain(result, dense)
        _write(lines, plain)
    if wanted.json:
        click.echo(json.dumps(plain, indent=2))
    else:
        Console().print(summary_table(plain))
    if wanted.picture is not None:
        _draw(Path(wanted.picture), result, dense)


def _run(config: SimConfig, progress: _Progress, lines: IO[str] | None) -> SimResult:
    def on_point(point: Point) -> None:
        _write(lines, point_line(point))
        progress.point(point)

    def on_score(score: Score) -> None:
        _write(lines, score_line(score))
        progress.score(score, getattr(config.task, "metric", ""))

    return simulate(config, on_point=on_point, on_score=on_score)


class _Progress:
    """One line that changes on a terminal, a line now and then anywhere else."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._status = console.status("joining") if self._live else contextlib.nullcontext()
        self._every_s = LIVE_EVERY_S if self._live else PLAIN_EVERY_S
        self._said_s = time.monotonic()
        self._score = ""

    def __enter__(self) -> Self:
        self._status.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._status.__exit__(kind, error, trace)

    def point(self, point: Point) -> None:
        """A step is done."""
        now_s = time.monotonic()
        if now_s - self._said_s >= self._every_s:
            self._said_s = now_s
            virtual = f"{point.usage.virtual_s:,.2f} s virtual"
            self.say(f"step {point.step}  loss {point.loss:.4f}  {virtual}{self._score}")

    def score(self, score: Score, metric: str) -> None:
        """The model was evaluated."""
        if metric in score.scores:
            shown = format_score(metric, score.scores[metric])
            self._score = f"  {metric_words(metric)} {shown} at step {score.step}"

    def warn(self, words: str) -> None:
        """Show this, if it is anything, on a line that stays."""
        if words:
            self._console.print(f"WARNING {words}", highlight=False, soft_wrap=True)

    def say(self, words: str) -> None:
        """Show this."""
        if self._live:
            self._status.update(words)  # type: ignore[union-attr]
        else:
            self._console.print(words, highlight=False)


@contextlib.contextmanager
def _lines(path: str | None) -> Iterator[IO[str] | None]:
    """The file for the report, which is written as it comes."""
    if path is None:
        yield None
        return
    try:
        stream = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        msg = f"save_report: cannot write {path!r}: {error.strerror}"
        raise StateError(msg) from error
    with stream:
        yield stream


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """Hundreds of workers' warnings are counted in the result; nobody wants to read them."""
    log = logging.getLogger("psq")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _write(lines: IO[str] | None, plain: dict[str, Any]) -> None:
    if lines is not None:
        lines.write(dump(plain))
        lines.flush()


def _draw(path: Path, result: SimResult, dense: Usage | None) -> None:
    try:
        draw(path, result, dense)
    except ImportError:
        words = "matplotlib is not installed (the extra psq-train[plot] brings it)"
        click.echo(f"picture: not drawn, {words}", err=True)
    except OSError as error:
        msg = f"picture: cannot write {str(path)!r}: {error.strerror}"
        raise StateError(msg) from error

"""What a `psq-worker` process does: train a task, or run a user's script, and say how it goes.

A script runs in this very process, as `python script.py` would run it; a `psq.torch.Worker` it
makes finds the command line through `psq.config`. However the process ends, its workers leave the
job first, with the reason: done, error or interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

import click
import torch

import psq.torch
from psq import kernels
from psq.adam_text import parse_adam
from psq.config import Given, WorkerConfig, use_given
from psq.process import has_parent
from psq.recipe import AdamConfig, Recipe
from psq.theory import privacy_words, recipe_release, schedule_warning
from psq.torch.decoder import RETURN
from psq.torch.drain import DRAIN_S
from psq_worker.averaged import AdamSteps, own_adam
from psq_worker.baseline import PlainAdam
from psq_worker.board import Board
from psq_worker.events import Evaluation, Event, Progress, Started, Summary, format_event
from psq_worker.job import Job, Record, job_for
from psq_worker.loop import Stepper, train
from psq_worker.pace import OwnPace, is_own, steps_behind
from psq_worker.recipes import rate_warning, recipe_of
from psq_worker.reporter import Reporter
from psq_worker.tasks import Task, find_task

__all__ = ["run_baseline", "run_script", "run_task"]

TEXT_EVERY_S: Final = 5.0
JSON_EVERY_S: Final = 0.2
LAUNCHED_DRAIN_S: Final = 0.3
"""A launcher that ends its children has no more time for them (`children.STOP_GRACE_S`)."""
_log = logging.getLogger("psq.worker")
BASELINE_RECIPE: Final = "plain torch Adam, one process"

Emit = Callable[[Event], None]


def run_task(given: Given, config: WorkerConfig) -> None:
    """Train a task as one worker of a job, to its last step.

    Raises:
        PsqError: no such task, no server, or whatever else the worker meets.
    """
    with _process(config) as emit:
        emit(Started(rank=config.rank, world_size=config.world_size, task=config.task))
        task, recipe = find_task(config.task, config.data), recipe_of(config)
        job = _in_rounds(_job_of(task, config), recipe.direction.local_steps)
        model = task.model(job.seed)
        optimizer = own_adam(model, job) if recipe.apply.kind == RETURN else None
        # The loop's schedule starts from the rate that was typed: the worker must not see it twice.
        rest = {key: value for key, value in given.values.items() if key != "lr"}
        with use_given(Given(rest, given.file)):
            lr = job.lr_at if optimizer is None else None
            worker = psq.torch.Worker(model, lr=lr, optimizer=optimizer)
        begun = steps_behind(worker.plan, worker.steps)
        job = dataclasses.replace(job, start_step=min(begun, job.steps))
        _say_theory(worker, job)
        _say_rate(config, recipe, job)
        watch = _Watch(config, emit, task.name, job, _description(task))
        with worker, watch.installed():
            train(task, model, _stepper(worker, optimizer, job), job, watch.on_record(task.metric))
        watch.end()


def _stepper(
    worker: psq.torch.Worker, optimizer: torch.optim.Optimizer | None, job: Job
) -> Stepper:
    """The worker, told the job's rates as it needs them."""
    if optimizer is not None:
        return AdamSteps(worker, optimizer, job)
    return OwnPace(worker, job) if is_own(worker.plan) else worker


def run_script(given: Given, config: WorkerConfig, script: str, arguments: tuple[str, ...]) -> None:
    """Run a user's program as `python script arguments` would.

    Raises:
        PsqError: whatever the script's worker meets and the script lets pass.
        Exception: whatever else the script raises; its traceback is the user's to see.
    """
    with _process(config) as emit:
        emit(Started(rank=config.rank, world_size=config.world_size, task=script))
        watch = _Watch(config, emit, script)
        sys.argv = [script, *arguments]
        sys.excepthook = functools.partial(_show_from, script)
        sys.path[0] = str(Path(script).resolve().parent)
        with use_given(given), watch.installed():
            runpy.run_path(script, run_name="__main__")
            psq.torch.close_workers("done")
        watch.end()


def run_baseline(config: WorkerConfig) -> None:
    """Train a task by plain Adam on the batches of `config.world_size` workers together."""
    with _process(config) as emit:
        task = find_task(config.task, config.data)
        job = _job_of(task, config)
        job = dataclasses.replace(job, batch_size=config.world_size * job.batch_size)
        model = task.model(job.seed)
        watch = _Watch(config, emit, task.name, job, _description(task))
        numel = sum(p.numel() for p in model.parameters() if p.requires_grad)
        reporter = watch.begin(rank=0, world_size=1, numel=numel, recipe=BASELINE_RECIPE)
        adam = AdamConfig(**parse_adam(config.adam)) if config.adam else None
        stepper = _Watched(PlainAdam(model, job, adam), reporter)
        train(task, model, stepper, job, watch.on_record(task.metric))
        watch.end()


class _Watch:
    """Makes a reporter at the first step, when the worker is known, and feeds it."""

    def __init__(
        self, config: WorkerConfig, emit: Emit, task: str, job: Job | None = None, text: str = ""
    ) -> None:
        self._config = config
        self._emit = emit
        self._task = task
        self._job = job
        self._text = text
        self._worker: psq.torch.Worker | None = None
        self._reporter: Reporter | None = None

    def begin(
        self, *, rank: int, world_size: int, numel: int, recipe: str, consistency: str = "bsp"
    ) -> Reporter:
        """Make the reporter."""
        job = self._job
        started = Started(
            rank=rank,
            world_size=world_size,
            task=self._task,
            recipe=recipe,
            consistency=consistency,
            steps=job.steps if job else 0,
            numel=numel,
            text=self._text,
        )
        evaluates = job.is_evaluated if job and rank == 0 else lambda _: False
        self._reporter = Reporter(
            self._emit,
            started,
            every_s=_every_s(self._config),
            clock=time.perf_counter,
            evaluates_after=evaluates,
        )
        return self._reporter

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Hear of every step made within the block."""
        psq.torch.observers.append(self._on_step)
        try:
            yield
        finally:
            psq.torch.observers.remove(self._on_step)

    def on_record(self, metric: str) -> Callable[[Record], None]:
        """What the loop calls when it has evaluated."""

        def evaluated(record: Record) -> None:
            if self._reporter is not None:
                self._reporter.evaluated(metric, record.scores)

        return evaluated

    def end(self) -> None:
        """Say the summary, if there was a step, and what noise has hidden."""
        if self._reporter is not None:
            self._emit(self._reporter.summary())
        if self._worker is not None:
            _say_privacy(self._worker.plan.recipe, self._worker.steps, "the job is over")

    def _on_step(
        self,
        worker: psq.torch.Worker,
        report: psq.torch.StepReport,
        loss: float | None,
        samples: int,
    ) -> None:
        if self._reporter is None:
            self._worker = worker
            self.begin(
                rank=worker.rank,
                world_size=worker.world_size,
                numel=worker.plan.layout.numel,
                recipe=_recipe_words(worker.plan.recipe, worker.choice),
                consistency=worker.plan.consistency,
            )
        if worker is self._worker and self._reporter is not None:
            # A script with several models is shown by its first.
            self._reporter.step(report, loss, samples)


class _Watched:
    """A stepper whose steps are reported."""

    def __init__(self, stepper: Stepper, reporter: Reporter) -> None:
        self._stepper = stepper
        self._reporter = reporter
        self.rank: Final = stepper.rank
        self.world_size: Final = stepper.world_size
        self.data_rank: Final = stepper.data_rank
        self.data_world_size: Final = stepper.data_world_size
        self.replica: Final = stepper.replica

    def step(self, loss: float | None = None, samples: int = 0) -> psq.torch.StepReport:
        """The stepper's step."""
        report = self._stepper.step(loss, samples)
        self._reporter.step(report, loss, samples)
        return report


def _say_theory(worker: psq.torch.Worker, job: Job) -> None:
    """What is known of this job before it begins."""
    recipe = worker.plan.recipe
    warning = schedule_warning(recipe, lambda t: job.lr_at(t - 1), job.steps)
    if warning and worker.rank == 0:  # all would say the same
        _log.warning("%s", warning)
    _say_privacy(recipe, job.steps, "the job begins")


def _say_privacy(recipe: Recipe, steps: int, when: str) -> None:
    """What the noise in this worker's messages hides, if there is any."""
    release = recipe_release(recipe, steps)
    if release is not None:
        _log.info("%s: %s", when, privacy_words(release))


def _say_rate(config: WorkerConfig, recipe: Recipe, job: Job) -> None:
    """That the rate may be none for this recipe; once, by rank 0."""
    warning = rate_warning(config, recipe, job.lr) if config.rank == 0 else ""
    if warning:
        _log.warning("%s", warning)


def _description(task: Task) -> str:
    """What a task says about itself and its data, if it does."""
    return str(getattr(task, "description", ""))


def _job_of(task: Task, config: WorkerConfig) -> Job:
    return job_for(
        task,
        steps=config.steps,
        batch_size=config.batch_size,
        lr=config.lr,
        schedule=config.schedule,
        seed=config.seed,
        eval_every=config.eval_every,
        threads=torch.get_num_threads(),
    )


def _in_rounds(job: Job, local_steps: int) -> Job:
    """The job with its last steps pushed: those after the last round would be nobody's."""
    whole = job.in_rounds(local_steps)
    if whole.steps != job.steps:
        words = "steps=%d makes it %d: the job ends with a round, of %d local steps"
        _log.info(words, job.steps, whole.steps, local_steps)
    return whole


def _recipe_words(recipe: Recipe, choice: str) -> str:
    up, down = recipe.uplink.codec, recipe.downlink
    words = f"{recipe.name} ({up} up, {down.kind} {down.codec} down)"
    if recipe.aggregate.kind != "mean":
        words += f", aggregate {recipe.aggregate.kind}"
    if recipe.direction.local_steps > 1:
        words += f", {recipe.direction.local_steps} local steps a round"
    if recipe.uplink.every > 1:
        words += f", each shard in 1 of {recipe.uplink.every} steps"
    reason = choice.partition(": ")[0]  # the codecs stand there already
    return f"{words}, codec auto: {reason}" if choice else words


def _every_s(config: WorkerConfig) -> float:
    if config.progress_every_s is not None:
        return config.progress_every_s
    return TEXT_EVERY_S if config.progress == "text" else JSON_EVERY_S


@contextlib.contextmanager
def _process(config: WorkerConfig) -> Iterator[Emit]:
    """Log to stderr, end politely on SIGTERM, and leave the job in any case."""
    _log_to_stderr()
    psq.torch.drain_on_sigterm(LAUNCHED_DRAIN_S if has_parent() else DRAIN_S)
    try:
        yield _emitter(config)
    except BaseException as error:
        psq.torch.close_workers(*_reason_of(error))
        raise


def _show_from(
    script: str, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Show a script's traceback from its own first line on, as `python script` would."""
    start = trace
    while start is not None and start.tb_frame.f_code.co_filename != script:
        start = start.tb_next
    if start is None and not isinstance(error, SyntaxError):  # not the script's
        start = trace
    sys.__excepthook__(kind, error.with_traceback(start), start)


def _reason_of(error: BaseException) -> tuple[Literal["done", "error", "interrupted"], str]:
    """Why a process leaves its job, and the words that go with it."""
    match error:
        case psq.torch.Drained():
            return "interrupted", "SIGTERM"
        case SystemExit(code=None | 0):
            return "done", ""
        case SystemExit(code=code) if code == 128 + signal.SIGTERM:
            return "interrupted", "SIGTERM"
        case KeyboardInterrupt():
            return "interrupted", "Ctrl-C"
    return "error", f"{type(error).__name__}: {error}"


def _log_to_stderr() -> None:
    """Psq's own log lines; the root logger stays the script's to configure."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    log = logging.getLogger("psq")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _emitter(config: WorkerConfig) -> Emit:
    """Where this process's events go, as --progress and --json say."""
    show = {"json": _print_event, "text": _text_emitter(), "none": _drop}[config.progress]

    def emit(event: Event) -> None:
        if isinstance(event, Summary) and config.json:
            _print_event(event)
        else:
            show(event)

    return emit


def _print_event(event: Event) -> None:
    sys.stdout.write(format_event(event) + "\n")
    sys.stdout.flush()


def _drop(event: Event) -> None:
    """Nothing is shown."""
    del event


def _text_emitter() -> Emit:
    """Words on stderr: a line for each report."""
    from psq_worker.display import format_seconds, plain_line  # noqa: PLC0415 - rich is not needed otherwise

    board = Board(1)

    def emit(event: Event) -> None:
        alone: Any = dataclasses.replace(event, rank=0)
        board.add(alone, time.monotonic())
        if isinstance(event, Started) and event.numel:
            words = [event.recipe, f"{event.numel:,} parameters", f"{kernels.level()} kernels"]
            click.echo(f"{event.task}: {', '.join(words)}; {event.text}".rstrip("; "), err=True)
        if isinstance(event, Progress | Evaluation):
            click.echo(f"rank {event.rank}  {plain_line(board)}", err=True)
        if isinstance(event, Summary):
            click.echo(f"rank {event.rank}  done in {format_seconds(event.elapsed_s)}", err=True)

    return emit

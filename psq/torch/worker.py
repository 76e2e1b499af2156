"""`Worker`: the optimizer of a training loop whose other half is a parameter server.

    step:     compress and push shard by shard, decoding what comes back meanwhile
              -> zero the gradients -> wait for the rest of the new weights
    overlap:  the same, but shards are pushed while backward still runs; step pushes what is left
    local:    a recipe with local steps moves this worker's own weights in most steps, and only
              every so many steps does what is above

What holds:
- Every replica has the same bytes after each round: all decode the same payloads.
- Weights change inside `step` only, never between a forward and its backward pass.
- A shard whose gradient has NaN or Inf is not sent: this worker sits the round out for that shard,
  and training goes on with what the others say (`psq.torch.exchange` says what stays as it was).
- Buffers (batch-norm statistics and the like) belong to each worker: psq neither sends nor changes
  them. Rank 0's are the ones to save.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias

from torch import Tensor, nn

from psq import kernels
from psq.adam_text import with_adam_text
from psq.advice.candidates import Specs
from psq.client import RoundResult
from psq.config import DEFAULT_LR, WorkerConfig, worker_config
from psq.errors import ConfigError, StateError, UsageError
from psq.plan import Plan
from psq.presets import preset
from psq.recipe import AdamConfig, Recipe
from psq.timeline import NOWHERE, Phase, Process, Timeline, check_writable, write_part
from psq.torch.exchange import Exchange
from psq.torch.overlap import Overlap
from psq.torch.parameters import ParameterTable
from psq.torch.report import LOCAL, StepReport

__all__ = ["LearningRate", "Observer", "Worker", "close_workers", "observers"]

LearningRate: TypeAlias = float | Callable[[int], float]
Reason: TypeAlias = Literal["done", "error", "interrupted"]
Observer: TypeAlias = Callable[["Worker", StepReport, float | None, int], None]

observers: Final[list[Observer]] = []
"""Called after each step of every worker in this process."""

_log = logging.getLogger("psq.torch")
_open: Final[list[Worker]] = []


class Worker:
    """Joins a job and trains `model` in it.

    The constructor blocks until the server has weights, and returns with them in the model: rank
    0's at the start of a job, the present ones later. Every argument but the model may also come
    from a `PSQ_*` variable, a TOML file or torchrun's variables (see `psq.config`).

    Gradient accumulation: call `step` under `no_sync` for all but the last of the backward passes.

        for i, (x, y) in enumerate(loader):
            last = (i + 1) % 4 == 0
            with contextlib.nullcontext() if last else ps.no_sync():
                (loss_fn(model(x), y) / 4).backward()
                ps.step()

    Clipping works as ever: `torch.nn.utils.clip_grad_norm_` before `step`.

    With `overlap` a gradient is sent as soon as backward has finished it, so the network works
    while backward still runs. The weights are the same, byte for byte, but what is sent cannot be
    changed any more: clipping or scaling after backward, a second backward before `step` that is
    not under `no_sync`, and another `lr` than at the first gradient are refused with UsageError.
    A backward pass that is not for training (an adversarial example, say) goes under `no_sync` too,
    with `zero_grad` after it.

    With a recipe of H local steps, H - 1 of H steps send nothing: the worker's Adam moves the
    weights in its model, their report says `reason="local"`, and `version` stays. The H-th step
    pushes how far they have moved since the last round, and replaces them by the job's. So replicas
    are equal after every H-th step only: save and evaluate then. Steps after the last round are
    dropped by `close`, which leaves the job's weights in the model.

    A schedule counts by the job's steps, which is what `steps` says: a function given as `lr`, or
    `ps.lr = schedule(ps.steps)` before each step. All ranks must ask for the same rate, a
    restarted one included, and a script's own counter would start at 0 again.

    Args:
        model: its parameters that require grad are trained, each once, in float32; they may live
            on a GPU. It must be complete: parameters replaced later are noticed and refused.
        lr: learning rate, or a function of the step number (from 0, over the whole job, so that a
            worker that joins late asks for the rate the others ask for).
        recipe: the algorithm, by name or as a value.
        adam: settings for a recipe given by name, as a value or as a text, see `psq.adam_text`.
        connect: the server's address; of several servers all, as a list or with commas between
            them, in the same order for every worker.
        rank: this worker's number.
        world_size: how many workers the job has.
        seed: the job's; stochastic codecs draw from it.
        consistency: how many rounds workers may be apart: bsp, ssp:K or asp, see `psq.clock`.
        overlap: push gradients while backward still runs.
        residual: how error feedback keeps what was not sent: f32 or bf16.
        codec: "recipe", or "auto": rank 0 measures links and machine and chooses the codecs for
            all, see `psq.torch.auto`.
        give_up_after_s: the longest wait before GaveUpError.

    Raises:
        ConfigError: an argument, a parameter of the model, or PSQ_KERNEL cannot be used.
        GaveUpError: no server answered in time.
        StateError: the timeline that was asked for cannot be written there.
        RemotePlanError, RefusedError: the server trains something else, or does not want this rank.
    """

    def __init__(  # noqa: PLR0913 - the public face: all optional but one
        self,
        model: nn.Module,
        *,
        lr: LearningRate | None = None,
        recipe: Recipe | str | None = None,
        adam: AdamConfig | str | None = None,
        connect: str | Sequence[str] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int | None = None,
        consistency: str | None = None,
        overlap: bool | None = None,
        residual: str | None = None,
        codec: str | None = None,
        give_up_after_s: float | None = None,
    ) -> None:
        said = {
            "lr": None if callable(lr) else lr,
            "recipe": recipe if isinstance(recipe, str) else None,
            "adam": adam if isinstance(adam, str) else None,
            "connect": connect if isinstance(connect, str | None) else list(connect),
            "rank": rank,
            "world_size": world_size,
            "seed": seed,
            "consistency": consistency,
            "overlap": overlap,
            "residual": residual,
            "codec": codec,
            "give_up_after_s": give_up_after_s,
        }
        settled = ["lr"] if callable(lr) else []
        if isinstance(recipe, Recipe):
            settled += ["recipe", "uplink", "downlink", "local_steps", "every", "adam", "codec"]
        if isinstance(adam, AdamConfig):
            settled += ["adam"]
        config = worker_config(said, settled=settled)
        kernels.active()  # a PSQ_KERNEL that cannot run here is refused now, not in the first step
        self.skipped = 0
        self._empty_steps = 0
        self._samples = 0
        self._lr: LearningRate = lr if callable(lr) else (config.lr or DEFAULT_LR)
        made = _recipe(config, recipe, adam)
        self._table = ParameterTable(model, apart=made.direction.local_steps > 1)
        self.choice = ""
        if config.codec == "auto":
            made, self.choice = _settle(config, self._table.specs, made, recipe)
        self.plan = Plan.of(
            self._table.specs,
            made,
            config.world_size,
            servers=len(config.endpoints),
            consistency=config.consistency,
        )
        self._table.bind(self.plan.layout)
        self._local_steps = self.plan.recipe.direction.local_steps
        self._local_step = 0  # how many the worker has taken since the last round
        self._accumulating = False
        self._failed = ""
        self._process = os.getpid()
        self._timeline_path = Path(config.timeline_filename or "")
        self._timeline: Timeline | None = None
        if config.timeline_filename is not None:
            check_writable(self._timeline_path)
            self._timeline = Timeline()
        self._exchange = Exchange(self._table, self.plan, config, self._timeline)
        self._client = self._exchange.client
        self._compressor = self._exchange.compressor
        self._overlap: Overlap | None = None
        _open.append(self)
        self._join()
        if config.overlap:
            self._overlap = Overlap(
                self._table,
                self.plan.layout,
                armed=self._is_armed,
                say=self._say_early,
                fail=self._fail,
            )
        self._returned_s = time.monotonic()
        self._counted = (self._client.sent_bytes, self._client.received_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(*_reason_of(error))

    @property
    def rank(self) -> int:
        """This worker's number."""
        return self._client.rank

    @property
    def world_size(self) -> int:
        """How many workers the job has."""
        return self.plan.world_size

    @property
    def version(self) -> int:
        """How many rounds the weights in the model have behind them."""
        return self._client.version

    @property
    def steps(self) -> int:
        """How many steps of every worker the job has behind it: `version`, but for local steps."""
        return self.version * self._local_steps + self._local_step

    @property
    def lr(self) -> float:
        """The learning rate of the next step. May be set, to a number or a function of the step."""
        value = float(self._lr(self.steps) if callable(self._lr) else self._lr)
        if not (math.isfinite(value) and value >= 0.0):
            msg = f"lr must be a finite number >= 0, got {value!r} for step {self.steps}"
            raise UsageError(msg)
        return value

    @lr.setter
    def lr(self, value: LearningRate) -> None:
        self._lr = value

    @property
    def sent_bytes(self) -> int:
        """Everything sent, as on the wire, joining included."""
        return self._client.sent_bytes

    @property
    def received_bytes(self) -> int:
        """Everything received, as on the wire, joining included."""
        return self._client.received_bytes

    @property
    def resent_frames(self) -> int:
        """Frames sent again because a connection lost them."""
        return self._client.resent_frames

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within the block gradients only accumulate: backward sends nothing, nor does `step`."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def step(self, loss: float | Tensor | None = None, samples: int = 0) -> StepReport:
        """Push the gradients, wait for everybody, take the new weights, zero the gradients.

        Args:
            loss: of this step, for `observers`; a tensor is read only if there are any.
            samples: how many were in the batch, for `observers`; those of accumulated batches are
                added up.

        Raises:
            UsageError: the worker is closed, a parameter was replaced or moved, or a gradient is
                sparse; nothing was sent. With overlap also: a gradient or the learning rate was
                changed after the first was sent; the worker cannot go on then.
            FencedError: another process has taken this rank over.
            GaveUpError: the round took longer than `give_up_after_s`, or the server ended the job.
            RemoteError: the server says that something is wrong; it says what.

        Cost: what `Compressor.compress` takes (a read of the gradients more with Adam on the
        worker), one pass to zero the gradients, the round's wait, one pass to decode.
        """
        self._check_usable()
        self._samples += samples
        if self._accumulating:
            return StepReport(self.version, self.version, applied=False, reason="accumulating")
        try:
            present = self._table.refresh()
        except UsageError as error:
            if self._exchange.open:  # what was sent cannot be taken back
                self._fail(error)
            raise
        if not present:
            self._say_empty()
        try:
            report = self._round() if self._pushes else self._step_locally()
        except BaseException as error:
            self._fail(error)
            raise
        samples, self._samples = self._samples, 0
        self._observe(report, loss, samples)
        return report

    def close(self, reason: Reason = "done", text: str = "") -> None:
        """Leave the job. Safe to call twice; happens by itself when the process ends.

        After an error inside the worker the server is told so, whatever `reason` says.
        """
        if self in _open:
            _open.remove(self)
        if self._failed and reason == "done":
            reason, text = "error", self._failed
        if self._overlap is not None:
            self._overlap.close()
        if self._local_step:
            self._drop_local_steps()
        try:
            self._client.leave(reason, text)
        finally:
            self._write_timeline(reason)

    # ---- one round

    def _round(self) -> StepReport:
        started_s, exchange, client = time.monotonic(), self._exchange, self._client
        self._begin()
        self._record(Phase.COMPUTE, exchange.step, self._returned_s, started_s)
        early_s = exchange.encode_s
        watch = _Watch(exchange, started_s)
        exchange.say_rest()
        encode_s, fault = watch.lap_s(), self._fault()
        zero_at_s = watch.now_s
        self._table.zero_gradients(client.poll)
        zeroing_s, stood_s = watch.lap_s(), client.waited_s
        self._record(Phase.ZERO, exchange.step, zero_at_s, watch.now_s)
        result = exchange.finish()
        waited_s, stood_s = watch.lap_s(), client.waited_s - stood_s
        self._table.publish()
        self._local_step = 0
        if self._overlap is not None:
            self._overlap.reset()
        publish_s = watch.lap_s()
        server_s = min(result.server_s, waited_s)
        before_s, self._returned_s = self._returned_s, watch.now_s
        sent, received = client.sent_bytes, client.received_bytes
        before, self._counted = self._counted, (sent, received)
        return StepReport(
            step=exchange.step,
            version=result.version,
            applied=result.applied and not fault and not result.rejected,
            reason=fault or _refusal(result),
            lr=exchange.rate,
            compute_s=started_s - before_s - early_s + zeroing_s,
            encode_s=early_s + encode_s,
            wire_s=waited_s - server_s,
            server_s=server_s,
            decode_s=exchange.decode_s + publish_s,
            exposed_s=stood_s,
            left_out=tuple(sorted(exchange.left_out)),
            rejected=result.rejected,
            staleness=result.staleness,
            sent_bytes=sent - before[0],
            received_bytes=received - before[1],
        )

    @property
    def _pushes(self) -> bool:
        """Whether the next step is one that pushes."""
        return self._local_step == self._local_steps - 1

    def _step_locally(self) -> StepReport:
        """A step of this worker alone."""
        exchange, client, started_s = self._exchange, self._client, time.monotonic()
        exchange.step_locally(self.lr)
        fault = self._fault()
        self._local_step += 1
        self._table.zero_gradients()
        before_s, self._returned_s = self._returned_s, time.monotonic()
        self._record(Phase.COMPUTE, self.version, before_s, started_s)
        self._record(Phase.LOCAL, self.version, started_s, self._returned_s)
        sent, received = client.sent_bytes, client.received_bytes
        before, self._counted = self._counted, (sent, received)
        return StepReport(
            step=self.version,
            version=self.version,
            applied=False,
            reason=fault or LOCAL,
            lr=exchange.rate,
            compute_s=self._returned_s - before_s - exchange.encode_s,
            encode_s=exchange.encode_s,
            left_out=tuple(sorted(exchange.left_out)),
            sent_bytes=sent - before[0],
            received_bytes=received - before[1],
        )

    def _drop_local_steps(self) -> None:
        words = "%d local steps of rank %d came after the last round: nobody will hear of them"
        _log.info(words, self._local_step, self.rank)
        self._local_step = 0
        self._table.publish()

    def _begin(self) -> None:
        """Open the step, if no hook has done so."""
        lr, exchange = self.lr, self._exchange
        if not exchange.open:
            exchange.begin(lr)
        elif lr != exchange.rate:
            msg = (
                f"lr changed from {exchange.rate!r} to {lr!r} after this step's first gradient was "
                "sent with the old one (overlap=True sends gradients while backward runs): set lr "
                "before backward"
            )
            raise UsageError(msg)

    def _say_early(self, shards: Sequence[int]) -> None:
        """Backward has finished with these shards."""
        self._begin()
        for shard in shards:
            self._exchange.say(shard)

    def _is_armed(self) -> bool:
        """Whether a backward pass that runs now is one whose gradients are pushed."""
        still = self._accumulating or self._failed or not self._pushes
        return not still and self.in_this_process

    def _fault(self) -> str:
        """What was wrong with this step's gradients; empty when nothing was."""
        left_out = self._exchange.left_out
        if not left_out:
            return ""
        self.skipped += 1
        fault = left_out[min(left_out)]
        shards = f"{len(left_out)} of {len(self.plan.layout.shards)} shards"
        if self._local_steps == 1:
            words = "step %d: %s; rank %d sits this round out for %s"
        else:
            words = "step %d: %s; rank %d does not take this step, for %s"
        _log.warning(words, self.steps, fault, self.rank, shards)
        return fault

    def _fail(self, error: BaseException) -> None:
        """The worker cannot go on: its word is half said, or the conversation is over."""
        self._failed = f"{type(error).__name__}: {error}"

    def _say_empty(self) -> None:
        """Warn of a step without any gradient: the 1st, the 10th, the 100th and so on."""
        self._empty_steps += 1
        if math.log10(self._empty_steps).is_integer():
            _log.warning("step %d: no parameter has a gradient; was backward called?", self.version)

    def _record(self, phase: Phase, step: int, start_s: float, end_s: float) -> None:
        if self._timeline is not None:
            self._timeline.add(phase, start_s, end_s, NOWHERE, step)

    def _observe(self, report: StepReport, loss: float | Tensor | None, samples: int) -> None:
        if not observers:
            return
        value = float(loss.detach()) if isinstance(loss, Tensor) else loss
        for observer in tuple(observers):
            observer(self, report, value, samples)

    # ---- beginning and end

    def _join(self) -> None:
        try:
            self._client.join()
            self._table.publish()
        except BaseException as error:
            self._fail(error)
            self.close()
            raise

    def _write_timeline(self, reason: Reason) -> None:
        """Write what was recorded, once; after an error there is a worse one to hear of."""
        recorder, self._timeline = self._timeline, None
        if recorder is None:
            return
        process, job = Process("rank", self.rank), f"{self.plan.job_digest:016x}"
        offsets = [
            {"server": server, **asdict(offset)}
            for server, offset in enumerate(self._client.clock_offsets)
            if offset is not None
        ]
        try:
            path = write_part(self._timeline_path, recorder, process, job=job, offsets=offsets)
            if lost := recorder.lost_spans:
                _log.info("%s holds the end of the job: %d spans before are lost", path, lost)
        except StateError as error:
            if reason == "done":
                raise
            _log.error("%s", error)

    def _check_usable(self) -> None:
        if self._failed:
            msg = f"this worker stopped working ({self._failed}): close it"
            raise UsageError(msg)
        if self not in _open:
            msg = "this worker is closed: make a new one to go on"
            raise UsageError(msg)

    @property
    def in_this_process(self) -> bool:
        """Whether this process made it; a forked child has a copy that it must leave alone."""
        return self._process == os.getpid()


class _Watch:
    """Seconds from one lap to the next, without those spent in decoding."""

    def __init__(self, exchange: Exchange, now_s: float) -> None:
        self._exchange = exchange
        self._decoded_s = exchange.decode_s
        self.now_s = now_s

    def lap_s(self) -> float:
        before_s, self.now_s = self.now_s, time.monotonic()
        decoded_s, self._decoded_s = self._decoded_s, self._exchange.decode_s
        return max(0.0, self.now_s - before_s - (self._decoded_s - decoded_s))


def close_workers(reason: Reason, text: str = "") -> None:
    """Close every worker this process has open: for programs that run a user's script."""
    for worker in tuple(_open):
        if worker.in_this_process:
            worker.close(reason, text)


def _recipe(
    config: WorkerConfig, recipe: Recipe | str | None, adam: AdamConfig | str | None
) -> Recipe:
    if isinstance(recipe, Recipe):
        if adam is not None:
            msg = "adam: a recipe given as a value has its own settings; use recipe.with_adam"
            raise ConfigError(msg)
        return recipe
    if isinstance(adam, AdamConfig):
        made = preset(config.recipe, adam)
    else:
        made = with_adam_text(preset(config.recipe), config.adam)
    made = made.with_codecs(uplink=config.uplink, downlink=config.downlink)
    return made.with_rhythm(local_steps=config.local_steps, every=config.every)


def _settle(
    config: WorkerConfig, specs: Specs, made: Recipe, recipe: Recipe | str | None
) -> tuple[Recipe, str]:
    """The recipe that `codec="auto"` makes of the one that was asked for, and why."""
    if isinstance(recipe, Recipe):
        msg = "codec: auto chooses the recipe's codecs, so it cannot be given as a value: leave one"
        raise ConfigError(msg)
    from psq.torch.auto import settle  # noqa: PLC0415 - only such jobs need to measure

    choice = settle(config, specs, made)
    return choice.recipe, choice.words


def _refusal(result: RoundResult) -> str:
    """Why the server did not count all that was said; empty when it did."""
    if result.reason or not result.rejected:
        return result.reason
    return f"the server refused shards {', '.join(map(str, result.rejected))}"


def _reason_of(error: BaseException | None) -> tuple[Reason, str]:
    if error is None:
        return "done", ""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        return "interrupted", type(error).__name__
    return "error", f"{type(error).__name__}: {error}"


@atexit.register
def _close_at_exit() -> None:
    """A script that ends without `close` has done its work, unless an error ended it."""
    close_workers(*_reason_of(getattr(sys, "last_value", None)))

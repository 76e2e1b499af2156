"""`Worker`: the optimizer of a training loop whose other half is a parameter server.

    step:     compress and push shard by shard, decoding what comes back meanwhile
              -> zero the gradients -> wait for the rest of the new weights
    overlap:  the same, but shards are pushed while backward still runs; step pushes what is left
    local:    a recipe with local steps moves this worker's own weights in most steps, and only
              every so many steps does what is above
    sit_out:  takes the new weights without having said anything

What holds:
- Every replica has the same bytes after each round: all decode the same payloads, and where
  replicas take the step themselves, all apply the same rule to them.
- Weights change inside `step` only, never between a forward and its backward pass.
- A shard whose gradient has NaN or Inf is not sent: this worker sits the round out for that shard,
  and training goes on with what the others say (`psq.torch.exchange` says what stays as it was).
- Buffers (batch-norm statistics and the like) belong to each worker: psq neither sends nor changes
  them. Rank 0's are the ones to save.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeAlias

import torch
from torch import Tensor, nn

from psq import kernels
from psq.config import DEFAULT_LR
from psq.errors import UsageError
from psq.recipe import AdamConfig, Recipe
from psq.rules import is_apart
from psq.torch.asked import Asked, check_said, check_weight, loss_value
from psq.torch.averaging import make_averaging
from psq.torch.exchange import Exchange
from psq.torch.groups import Group, group_up
from psq.torch.keeper import Load, Save
from psq.torch.keeping import make_keeper
from psq.torch.opened import Reason, close_workers, note_opened, opened, reason_of
from psq.torch.optimizer import Optimizer
from psq.torch.overlap import Overlap, check_overlap
from psq.torch.parameters import ParameterTable
from psq.torch.rates import LearningRate, Rates, rate_groups
from psq.torch.recording import begin_recording, write_recording
from psq.torch.report import StepReport
from psq.torch.settings import config_of, plan_of, recipe_of, settle_codecs, warn_of_schedule
from psq.torch.steps import Steps

__all__ = ["LearningRate", "Observer", "Worker", "close_workers", "observers"]

Observer: TypeAlias = Callable[["Worker", StepReport, float | None, int], None]

observers: Final[list[Observer]] = []
"""Called after each step of every worker in this process."""

_log = logging.getLogger("psq.torch")


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

    Groups of parameters may have a rate and codecs of their own, may be only received, or local:
    never pushed nor received, stepped by an optimizer of the user's own. Frozen parameters
    (`requires_grad=False`) are left out by themselves.

        groups=[Group("head.*", lr_factor=0.1), Group(model.memory.parameters(), local=True)]

    A round need not be everybody's: `sit_out` instead of `step` takes the others' word. What the
    workers say may weigh differently (`weight`), and need not be `.grad` (`step(vectors=...)`).

    With a recipe that looks ahead (dqgan) the model holds, between two steps, the weights that the
    next gradients are to be taken at; `with ps.replica():` has the job's own in it, to evaluate and
    save. So it does between local steps.

    With recipe="average" the workers' mean gradient comes back and `optimizer`, a torch optimizer
    of the user's, steps with it on every worker alike. All workers start with the job, with the
    same optimizer; nobody can come late, since the server has no weights to give.

    A schedule counts by the job's steps, which is what `steps` says: a function given as `lr`, or
    `ps.lr = schedule(ps.steps)` before each step. All ranks must ask for the same rate, a
    restarted one included, and a script's own counter would start at 0 again. Torch's schedulers
    take `ps.optimizer`.

    Args:
        model: its parameters that require grad are trained, each once, in float32; they may live
            on a GPU. It must be complete: parameters replaced later are noticed and refused.
        lr: learning rate, or a function of the step number (from 0, over the whole job, so that a
            worker that joins late asks for the rate the others ask for).
        groups: parameters that are treated in a way of their own; the same for every worker, but
            for local ones.
        weight: how much this worker counts in the mean, beside the others; may be set later.
        optimizer: what steps with recipe="average".
        recipe: the algorithm, by name or as a value.
        options: what parts of it do otherwise, as in "apply.momentum=0.9": a text, or a list.
        adam: settings for a recipe given by name, as a value or as a text, see `psq.adam_text`.
        connect: the server's address; of several servers all, as a list or with commas between
            them, in the same order for every worker.
        rank: this worker's number.
        world_size: how many workers the job has.
        keys: the folder with this worker's keys, where the server wants some (psq keygen).
        seed: the job's; stochastic codecs draw from it.
        consistency: how many rounds workers may be apart: bsp, ssp:K or asp, see `psq.clock`.
        overlap: push gradients while backward still runs.
        residual: how error feedback keeps what was not sent: f32 or bf16.
        codec: "recipe", or "auto": rank 0 measures links and machine and chooses the codecs for
            all, see `psq.torch.auto`.
        give_up_after_s: the longest wait before GaveUpError.
        state_dir: where this worker keeps all it needs for a process that comes after it, should
            this one be killed: it goes on as if nothing had been (see `keep`).

    Raises:
        ConfigError: an argument, a parameter of the model, or PSQ_KERNEL cannot be used.
        GaveUpError: no server answered in time.
        StateError: the timeline that was asked for cannot be written there, or the state directory
            cannot be used.
        RemotePlanError, RefusedError: the server trains something else, or does not want this rank.
    """

    def __init__(  # noqa: PLR0913 - the public face: all optional but one
        self,
        model: nn.Module,
        *,
        lr: LearningRate | None = None,
        groups: Sequence[Group] = (),
        weight: int = 1,
        optimizer: torch.optim.Optimizer | None = None,
        recipe: Recipe | str | None = None,
        options: str | Sequence[str] | None = None,
        adam: AdamConfig | str | None = None,
        connect: str | Sequence[str] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        keys: str | None = None,
        seed: int | None = None,
        consistency: str | None = None,
        overlap: bool | None = None,
        residual: str | None = None,
        codec: str | None = None,
        give_up_after_s: float | None = None,
        state_dir: str | None = None,
    ) -> None:
        config = config_of(
            lr=lr,
            optimizer=optimizer,
            recipe=recipe,
            options=options,
            adam=adam,
            connect=connect,
            rank=rank,
            world_size=world_size,
            keys=keys,
            seed=seed,
            consistency=consistency,
            overlap=overlap,
            residual=residual,
            codec=codec,
            give_up_after_s=give_up_after_s,
            state_dir=state_dir,
        )
        kernels.active()  # a PSQ_KERNEL that cannot run here is refused now, not in the first step
        made = recipe_of(config, recipe, adam)
        check_overlap(made, overlap=config.overlap)
        grouping = group_up(model, groups)
        self._table = ParameterTable(model, grouping, apart=is_apart(made))
        made, self.choice = settle_codecs(config, self._table.specs, made, recipe)
        warn_of_schedule(config, made, lr)
        self.plan = plan_of(config, self._table.specs, made, grouping)
        self._averaging = make_averaging(
            self.plan, optimizer, self._table.parameters, gives_rate=lr is not None
        )
        self._table.bind(self.plan.layout)
        self._rates = Rates(
            lr if callable(lr) else (config.lr or DEFAULT_LR),
            rate_groups(self.plan, self._table),
            len(self.plan.groups),
            is_inside=made.direction.meaning == "update",
        )
        self._weight = check_weight(weight, self.plan)
        self._report = StepReport(0, 0, applied=False)
        self._empty_steps = 0
        self._samples = 0
        self._accumulating = False
        self._showing = False
        self._failed = ""
        self._process = os.getpid()
        self._timeline_path = Path(config.timeline_filename or "")
        self._timeline = begin_recording(config.timeline_filename)
        self._exchange = Exchange(self._table, self.plan, config, self._timeline, self._averaging)
        self._client = self._exchange.client
        self._compressor = self._exchange.compressor
        self._steps = Steps(self._table, self._exchange, self.plan, self._timeline)
        self._overlap: Overlap | None = None
        self._exchange.keeper = make_keeper(
            config, self.plan, self._table, model, self._exchange, self._averaging
        )
        note_opened(self)
        self._join()
        if config.overlap:
            self._overlap = Overlap(
                self._table,
                self.plan.layout,
                armed=self._is_armed,
                say=self._say_early,
                fail=self._fail,
            )
        self._exchange.load_script()
        self._steps.begin_counting()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(*reason_of(error))

    @property
    def rank(self) -> int:
        """This worker's number."""
        return self._client.rank

    @property
    def world_size(self) -> int:
        """How many workers the job has."""
        return self.plan.world_size

    @property
    def data_rank(self) -> int:
        """Whose data this worker is to train on: its rank, unless several compute the same."""
        return self.plan.data_rank(self.rank)

    @property
    def data_world_size(self) -> int:
        """How many workers have data of their own."""
        return self.plan.data_world_size

    @property
    def version(self) -> int:
        """How many rounds the weights in the model have behind them."""
        return self._client.version

    @property
    def steps(self) -> int:
        """How many steps of every worker the job has behind it: `version`, but for local steps."""
        return self._steps.count

    @property
    def resumed(self) -> bool:
        """Whether it goes on from what a process before has kept (see `state_dir`)."""
        keeper = self._exchange.keeper
        return keeper is not None and keeper.resumed

    @property
    def skipped(self) -> int:
        """How many steps left something out because it was not finite."""
        return self._steps.skipped

    @property
    def lr(self) -> float:
        """The learning rate of the next step. May be set, to a number or a function of the step."""
        return self._asked().rate

    @lr.setter
    def lr(self, value: LearningRate) -> None:
        if self._averaging is not None:
            msg = "lr: set it in the optimizer that you gave, which takes the steps"
            raise UsageError(msg)
        self._rates.set(value)

    @property
    def weight(self) -> int:
        """How much this worker counts in the mean of the next step. May be set."""
        return self._weight

    @weight.setter
    def weight(self, value: int) -> None:
        self._weight = check_weight(value, self.plan)

    @property
    def optimizer(self) -> Optimizer:
        """This worker as a torch optimizer, for torch's schedulers; from now on it has the rates.

        Raises:
            UsageError: lr is a function of the step, or the user's own optimizer takes the steps.
        """
        if self._averaging is not None:
            msg = "recipe 'average' steps with the optimizer that you gave: schedule that one"
            raise UsageError(msg)
        return self._rates.make_optimizer(self._step)

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

    @contextmanager
    def replica(self) -> Iterator[None]:
        """Within the block the model has the job's weights, as all workers have them.

        That matters between local steps and with recipes that look ahead; elsewhere the model has
        them always. At its end the model is as before; no step may be taken within.
        """
        if not self._table.is_apart or self._showing:
            yield
            return
        own = self._table.local_copy()
        self._table.publish()
        self._showing = True
        try:
            yield
        finally:
            self._showing = False
            self._table.restore_local(own)

    def step(
        self,
        loss: float | Tensor | None = None,
        samples: int = 0,
        vectors: Mapping[str, Tensor] | None = None,
    ) -> StepReport:
        """Push the gradients, wait for everybody, take the new weights, zero the gradients.

        Args:
            loss: of this step, for `observers`; a tensor is read only if there are any.
            samples: how many were in the batch, for `observers`; those of accumulated batches are
                added up.
            vectors: what to push in the place of gradients: for each parameter that is pushed, by
                name, a finite float32 tensor in its shape. It is treated as the gradient would be.

        Raises:
            UsageError: the worker is closed, a parameter was replaced or moved, a gradient is
                sparse, or an argument is not as it should be; nothing was sent. With overlap
                also: a gradient or the learning rate was changed after the first was sent; the
                worker cannot go on then.
            FencedError: another process has taken this rank over.
            GaveUpError: the round took longer than `give_up_after_s`, or the server ended the job.
            RemoteError: the server says that something is wrong; it says what.

        Cost: what `Compressor.compress` takes (a read of the gradients more with Adam on the
        worker), one pass to zero the gradients, the round's wait, one pass to decode.
        """
        optimizer = self._rates.optimizer
        if optimizer is None:
            self._step(loss, samples, vectors)
        else:  # through torch's own method, which a scheduler watches
            optimizer.step(loss=loss, samples=samples, vectors=vectors)
        return self._report

    def keep(self, name: str, save: Save, load: Load) -> None:
        """Keep something of the script's with the worker's state, where there is a `state_dir`.

            ps.keep("loader", lambda: {"next": ps.steps}, loader.load_state_dict)
            ps.keep("scheduler", scheduler.state_dict, scheduler.load_state_dict)

        `save` is called at the end of each round, when `steps` has been counted, and says what the
        next one begins with. If a process before this one has kept something under this name,
        `load` is given it at once. Random numbers of Python, NumPy and torch, the model's buffers
        and its local parameters are kept without being asked for. They are put back at the end of
        the constructor: what draws from them between there and the first step draws once more.

        Args:
            name: of it.
            save: returns dicts, lists, numbers, texts, bytes, tensors or arrays; no other objects.
            load: takes what `save` returned.

        Raises:
            UsageError: the name is taken, or what `save` returns cannot be kept.
        """
        if self._exchange.keeper is not None:
            self._exchange.keeper.keep(name, save, load)

    def sit_out(self) -> StepReport:
        """Take no part in a round: say nothing, wait for the others, take the new weights.

        Moments and residual stay as they are; gradients that are there are zeroed, since they are
        of weights that are gone. With local steps it is the whole round that is sat out.

        Raises:
            UsageError: the worker is closed, or has said or stepped something in this round.
            as `step`.
        """
        self._check_usable()
        self._check_silent()
        self._table.refresh()
        try:
            self._report = self._steps.sit_out(self._asked())
        except BaseException as error:
            self._fail(error)
            raise
        self._end_round()
        self._samples = 0
        self._observe(self._report, None, 0)
        return self._report

    def close(self, reason: Reason = "done", text: str = "") -> None:
        """Leave the job. Safe to call twice; happens by itself when the process ends.

        After an error inside the worker the server is told so, whatever `reason` says.
        """
        if self in opened:
            opened.remove(self)
        if self._failed and reason == "done":
            reason, text = "error", self._failed
        if self._overlap is not None:
            self._overlap.close()
        self._steps.drop_local_steps()
        if self._table.is_apart:
            self._table.publish()
        try:
            self._client.leave(reason, text)
        finally:
            self._exchange.close(done=reason == "done")
            self._write_timeline(reason)

    # ---- one step

    def _step(
        self,
        loss: float | Tensor | None = None,
        samples: int = 0,
        vectors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._check_usable()
        check_said(loss, samples)
        if vectors is not None:
            self._check_may_give()
        self._samples += samples
        if self._accumulating:
            version = self.version
            self._report = StepReport(version, version, applied=False, reason="accumulating")
            return
        try:
            present, asked = self._table.refresh(vectors), self._asked()
        except UsageError as error:
            if self._exchange.open:  # what was sent cannot be taken back
                self._fail(error)
            raise
        if not present:
            self._say_empty()
        try:
            take = self._steps.round if self._steps.pushes else self._steps.step_locally
            self._report = take(asked)
        except BaseException as error:
            self._fail(error)
            raise
        if take == self._steps.round:
            self._end_round()
        samples, self._samples = self._samples, 0
        self._observe(self._report, loss, samples)

    def _end_round(self) -> None:
        if self._overlap is not None:
            self._overlap.reset()

    def _asked(self) -> Asked:
        if self._averaging is not None:
            return Asked(self._averaging.rate, self._weight)
        rate, ratios = self._rates.at(self.steps)
        return Asked(rate, self._weight, ratios)

    def _check_silent(self) -> None:
        """Whether this worker can still sit the round out."""
        said = ""
        if self._exchange.open:
            said = "backward has sent gradients of this round already (overlap=True)"
        elif self._steps.local_step:
            said = f"{self._steps.local_step} local steps of this round are not said yet"
        elif self._accumulating:
            said = "gradients are being accumulated (no_sync)"
        if said:
            msg = f"a round cannot be sat out any more: {said}; decide before its first step"
            raise UsageError(msg)

    def _check_may_give(self) -> None:
        """Whether vectors may be pushed in the place of gradients."""
        if self._overlap is not None:
            msg = (
                "vectors: with overlap=True gradients are sent while backward runs, before there "
                "are vectors: use overlap=False"
            )
            raise UsageError(msg)
        if self._accumulating:
            msg = "vectors: nothing accumulates them under no_sync: add them up and push the sum"
            raise UsageError(msg)

    def _say_early(self, shards: Sequence[int]) -> None:
        """Backward has finished with these shards."""
        self._exchange.begin(self._asked())
        for shard in shards:
            self._exchange.say(shard)

    def _is_armed(self) -> bool:
        """Whether a backward pass that runs now is one whose gradients are pushed."""
        still = self._accumulating or self._failed or not self._steps.pushes
        return not still and self.in_this_process

    def _fail(self, error: BaseException) -> None:
        """The worker cannot go on: its word is half said, or the conversation is over."""
        self._failed = f"{type(error).__name__}: {error}"

    def _say_empty(self) -> None:
        """Warn of a step without any gradient: the 1st, the 10th, the 100th and so on."""
        self._empty_steps += 1
        if math.log10(self._empty_steps).is_integer():
            _log.warning("step %d: no parameter has a gradient; was backward called?", self.version)

    def _observe(self, report: StepReport, loss: float | Tensor | None, samples: int) -> None:
        if not observers:
            return
        value = loss_value(loss)
        for observer in tuple(observers):
            observer(self, report, value, samples)

    # ---- beginning and end

    def _join(self) -> None:
        try:
            self._exchange.join()
        except BaseException as error:
            self._fail(error)
            self.close()
            raise

    def _write_timeline(self, reason: Reason) -> None:
        """Write what was recorded, once."""
        recorder, self._timeline = self._timeline, None
        if recorder is not None:
            must_work = reason == "done"
            write_recording(self._timeline_path, recorder, self._client, must_work=must_work)

    def _check_usable(self) -> None:
        if self._failed:
            msg = f"this worker stopped working ({self._failed}): close it"
            raise UsageError(msg)
        if self not in opened:
            msg = "this worker is closed: make a new one to go on"
            raise UsageError(msg)
        if self._showing:
            msg = "a step within replica(): the model has the job's weights there, not its own"
            raise UsageError(msg)

    @property
    def in_this_process(self) -> bool:
        """Whether this process made it; a forked child has a copy that it must leave alone."""
        return self._process == os.getpid()

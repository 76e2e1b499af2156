"""`Worker`: the optimizer of a training loop whose other half is a parameter server.

    step:  gradients finite? -> compress and push shard by shard -> wait -> decode the new weights

What holds:
- Every replica has the same bytes after each step: all decode the same payloads.
- Weights change inside `step` only, never between a forward and its backward pass.
- A gradient with NaN or Inf is not sent: the worker sits the round out, its residual and moments
  stay as they were, and training goes on with what the others say.
- Buffers (batch-norm statistics and the like) belong to each worker: psq neither sends nor changes
  them. Rank 0's are the ones to save.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias

import numpy as np
from torch import Tensor, nn

from psq import kernels
from psq.adam_text import with_adam_text
from psq.client import Client, Hooks, Patience
from psq.codec import ShardCodec, get_codec
from psq.config import DEFAULT_LR, WorkerConfig, worker_config
from psq.errors import ConfigError, UsageError
from psq.feedback import Compressor
from psq.plan import Plan
from psq.recipe import AdamConfig, Recipe, preset
from psq.torch.parameters import ParameterTable
from psq.torch.report import StepReport
from psq_proto.frames import Header
from psq_proto.messages import Flags

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

    A schedule counts by the job's steps, which is what `version` says: a function given as `lr`, or
    `ps.lr = schedule(ps.version)` before each step. All ranks must ask for the same rate, a
    restarted one included, and a script's own counter would start at 0 again.

    Args:
        model: its parameters that require grad are trained, each once, in float32; they may live
            on a GPU. It must be complete: parameters replaced later are noticed and refused.
        lr: learning rate, or a function of the step number (from 0, over the whole job, so that a
            worker that joins late asks for the rate the others ask for).
        recipe: the algorithm, by name or as a value.
        adam: settings for a recipe given by name, as a value or as a text, see `psq.adam_text`.
        connect: the server's address.
        rank: this worker's number.
        world_size: how many workers the job has.
        seed: the job's; stochastic codecs draw from it.
        give_up_after_s: the longest wait before GaveUpError.

    Raises:
        ConfigError: an argument, a parameter of the model, or PSQ_KERNEL cannot be used.
        GaveUpError: no server answered in time.
        RemotePlanError, RefusedError: the server trains something else, or does not want this rank.
    """

    def __init__(  # noqa: PLR0913 - the public face: all optional but one
        self,
        model: nn.Module,
        *,
        lr: LearningRate | None = None,
        recipe: Recipe | str | None = None,
        adam: AdamConfig | str | None = None,
        connect: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int | None = None,
        give_up_after_s: float | None = None,
    ) -> None:
        said = {
            "lr": None if callable(lr) else lr,
            "recipe": recipe if isinstance(recipe, str) else None,
            "adam": adam if isinstance(adam, str) else None,
            "connect": connect,
            "rank": rank,
            "world_size": world_size,
            "seed": seed,
            "give_up_after_s": give_up_after_s,
        }
        settled = ["lr"] if callable(lr) else []
        if isinstance(recipe, Recipe):
            settled += ["recipe", "uplink", "downlink", "adam"]
        if isinstance(adam, AdamConfig):
            settled += ["adam"]
        config = worker_config(said, settled=settled)
        kernels.active()  # a PSQ_KERNEL that cannot run here is refused now, not in the first step
        self.skipped = 0
        self._empty_steps = 0
        self._samples = 0
        self._lr: LearningRate = lr if callable(lr) else (config.lr or DEFAULT_LR)
        self._table = ParameterTable(model)
        self.plan = Plan.of(self._table.specs, _recipe(config, recipe, adam), config.world_size)
        self._table.bind(self.plan.layout)
        self._shards = range(len(self.plan.layout.shards))
        self._compressor = Compressor(self.plan, config.rank, seed=config.seed)
        downlink = get_codec(self.plan.recipe.downlink.codec)
        self._downlinks = [ShardCodec(downlink, shard) for shard in self.plan.layout.shards]
        self._dense = get_codec("fp32")
        self._decode_s = 0.0
        self._accumulating = False
        self._failed = ""
        self._process = os.getpid()
        self._client = Client(
            config.connect,
            self.plan,
            config.rank,
            Hooks(self._table.flat_weights, self._decode, self._restore, self._reset),
            patience=Patience(give_up_after_s=config.give_up_after_s),
            rng=random.Random(),  # noqa: S311 - jitter and names; must differ between processes
        )
        _open.append(self)
        self._join()
        self._returned_s = time.perf_counter()
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
    def lr(self) -> float:
        """The learning rate of the next step. May be set, to a number or a function of the step."""
        value = float(self._lr(self.version) if callable(self._lr) else self._lr)
        if not (math.isfinite(value) and value >= 0.0):
            msg = f"lr must be a finite number >= 0, got {value!r} for step {self.version}"
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
        """Within the block `step` only lets gradients accumulate."""
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
                sparse; nothing was sent.
            FencedError: another process has taken this rank over.
            GaveUpError: the round took longer than `give_up_after_s`, or the server ended the job.
            RemoteError: the server says that something is wrong; it says what.

        Cost: one read of the gradients to check them, what `Compressor.compress` takes, the
        round's wait, one pass to decode, one to zero the gradients.
        """
        self._check_usable()
        self._samples += samples
        if self._accumulating:
            return StepReport(self.version, self.version, applied=False, reason="accumulating")
        present = self._table.refresh()
        if not present:
            self._say_empty()
        try:
            report = self._round()
        except BaseException as error:
            self._failed = f"{type(error).__name__}: {error}"
            raise
        self._table.zero_gradients()
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
        self._client.leave(reason, text)

    # ---- one round

    def _round(self) -> StepReport:
        started_s, before_s = time.perf_counter(), self._returned_s
        self._decode_s = 0.0
        lr = self.lr
        step = self._client.begin(lr)
        fault = self._say(lr)
        encoded_s = time.perf_counter()
        result = self._client.finish()
        published_s = time.perf_counter()
        self._table.publish()
        self._returned_s = done_s = time.perf_counter()
        decode_s = self._decode_s + done_s - published_s
        waited_s = max(0.0, published_s - encoded_s - self._decode_s)
        server_s = min(result.server_s, waited_s)
        sent, received = self._client.sent_bytes, self._client.received_bytes
        before, self._counted = self._counted, (sent, received)
        return StepReport(
            step=step,
            version=result.version,
            applied=result.applied and not fault,
            reason=fault or result.reason,
            lr=lr,
            compute_s=started_s - before_s,
            encode_s=encoded_s - started_s,
            wire_s=waited_s - server_s,
            server_s=server_s,
            decode_s=decode_s,
            sent_bytes=sent - before[0],
            received_bytes=received - before[1],
        )

    def _say(self, lr: float) -> str:
        """Push every shard, or skip. Returns why not; empty when pushed."""
        if not all(self._compressor.finite(self._table.gradients(k)) for k in self._shards):
            name = self._table.not_finite()
            self.skipped += 1
            _log.warning(
                "step %d: the gradient of %r is not finite; rank %d sits this round out",
                self.version,
                name,
                self.rank,
            )
            self._client.skip()
            return f"the gradient of {name!r} is not finite"
        for k in self._shards:
            gradients, weights = self._table.gradients(k), self._table.weights(k)
            self._compressor.compress(k, gradients, lr, self._client.payload(k), weights=weights)
            self._client.push(k)
        return ""

    def _say_empty(self) -> None:
        """Warn of a step without any gradient: the 1st, the 10th, the 100th and so on."""
        self._empty_steps += 1
        if math.log10(self._empty_steps).is_integer():
            _log.warning("step %d: no parameter has a gradient; was backward called?", self.version)

    def _observe(self, report: StepReport, loss: float | Tensor | None, samples: int) -> None:
        if not observers:
            return
        value = float(loss.detach()) if isinstance(loss, Tensor) else loss
        for observer in tuple(observers):
            observer(self, report, value, samples)

    # ---- what the client asks

    def _decode(self, header: Header, body: memoryview) -> None:
        """Weights came: into the parameters with them (see `ReplicaVersions` for what comes)."""
        started_s = time.perf_counter()
        shard = header.shard
        codec, out = self._downlinks[shard], self._table.weights(shard)
        if Flags.DELTA in header.flags:
            codec.check(body)
            codec.decode_add_segments(body, out)
        elif header.codec == self._dense.wire_id:
            self._dense.check(body, body.nbytes // 4)
            values = np.frombuffer(body, "<f4").astype(np.float32, copy=False)
            self._table.write_part(shard, header.part, values)
        else:
            codec.check(body)
            codec.decode_segments(body, out)
        self._decode_s += time.perf_counter() - started_s

    def _restore(self, k: int) -> None:
        """The server did not take this step's push of a shard: it is still to be said."""
        if not self._compressor.restore(k, self._client.said(k)):
            _log.warning(
                "step %d: shard %d of rank %d has exploded; its residual starts from zero",
                self.version,
                k,
                self.rank,
            )

    def _reset(self, shards: Sequence[int]) -> None:
        residual = self._compressor.state_arrays().get("residual")
        if residual is None:
            return
        for k in shards:
            shard = self.plan.layout.shards[k]
            residual[shard.offset : shard.offset + shard.numel] = 0.0

    # ---- beginning and end

    def _join(self) -> None:
        try:
            self._client.join()
            self._table.publish()
        except BaseException as error:
            self._failed = f"{type(error).__name__}: {error}"
            self.close()
            raise

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
    return made.with_codecs(uplink=config.uplink, downlink=config.downlink)


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

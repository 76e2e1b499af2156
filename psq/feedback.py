"""The worker's side of a push: direction + residual -> payload, shard by shard.

    gradient recipes   c = g + e          straight from the tensors' own memory, no copy
    Adam recipes       c = u + e          u from this worker's moments, in the cache
    local steps        x <- x - u         H - 1 times, said to nobody (`descend`); then
                       c = x0 - x + u + e                     x0: where the replica stands
    all                d = C(c);  e <- c - d;  push d         (no e without error feedback)

The residual e is what the codec could not say this time, and is said later: the sum of all decoded
pushes plus e is the sum of all directions, up to float32 addition. A push that the server did not
apply is sent again byte for byte, or folded back with `restore`; d is lost only where no server
would ever take it (`MAX_SCALE`). A step may also say nothing at all (`absorb`): e <- u + e.
With local steps the same holds of x0 - x + u, which is the sum of the local directions as far as
the weights have taken it: float32 rounds x in every step.

The residual may be kept in bf16: 2 bytes a value instead of 4. What stays in it is then rounded to
nearest, and the sum above holds up to 2^-8 of each residual there was; a direction below 2^-9 of
the residual is lost by `absorb`.

Each shard is compressed once in a step. A gradient with NaN or Inf must not reach the server, nor a
worker's moments. Two ways to see to that, shard by shard:
- `finite` before `compress`: nothing is touched, e, m and v stay as they were; one more read.
- `payload_finite` after it, for gradient recipes: nearly free. A block that is not finite has left
  its part of e alone; the others are folded back with `restore`, so c waits in e for the next step.

Weight decay acts where the direction is formed: here for Adam on the worker, else on the server.
For gradient recipes the learning rate is outside the message and the residual is in units of the
gradient: a change of the rate re-weights what the residual still holds (no rescaling is done).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from psq import kernels
from psq.codec import MAX_SCALE, ShardCodec, get_codec
from psq.errors import ConfigError, RemotePayloadError, UsageError
from psq.kernels import Buffer, Floats, Residual, WorkerStep
from psq.layout import Shard
from psq.optim import Adam, per_shard
from psq.plan import Plan

__all__ = ["SERVER_RANK", "Compressor", "ResidualType", "stream_seed"]

Segments: TypeAlias = Sequence[Floats]
ResidualType: TypeAlias = Literal["f32", "bf16"]

SERVER_RANK: Final = 0xFFFFFFFF  # the server's place in `stream_seed`: no worker has it
_MASK: Final = 0xFFFFFFFFFFFFFFFF
_RESIDUALS: Final = {"f32": np.float32, "bf16": np.uint16}


def stream_seed(job_seed: int, rank: int, step: int, shard: int) -> int:
    """The 64-bit seed of a stochastic codec's random stream for one payload.

    The four numbers are absorbed one after another by splitmix64's finalizer; the last state is
    the seed. A restarted worker that repeats a step therefore makes the same payload.
    """
    state = 0
    for word in (job_seed, rank, step, shard):
        state = ((state ^ word) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


class Compressor:
    """One worker's moments and residual, and what turns gradients into payloads.

    Memory in bytes: 4 numel for the residual with error feedback, half of it in bf16; 4 numel times
    2 or 3 for Adam's state. Its scratch is addressed for the largest segment, but only a cache's
    worth is touched, unless one scale spans a segment (block=0); with local steps it is the largest
    shard.

    Args:
        plan: the job.
        rank: this worker's.
        seed: the job's; only stochastic codecs use it.
        residual_dtype: what the residual is kept in.

    Raises:
        ConfigError: the recipe's Adam settings cannot run, or it has no residual to keep in bf16.
    """

    def __init__(
        self, plan: Plan, rank: int, *, seed: int = 0, residual_dtype: ResidualType = "f32"
    ) -> None:
        recipe, layout = plan.recipe, plan.layout
        codec = get_codec(recipe.uplink.codec)
        self._rank = rank
        self._seed = seed
        self._shards = layout.shards
        self._codecs = [ShardCodec(codec, shard) for shard in layout.shards]
        self._steps = [0] * len(layout.shards)
        self._state: dict[str, NDArray[Any]] = {}
        self._residual: Residual | None = None
        if recipe.uplink.error_feedback:
            self._residual = np.zeros(layout.numel, _dtype_of(residual_dtype))
            self._state["residual"] = self._residual
        elif residual_dtype != "f32":
            msg = f"a {residual_dtype} residual: recipe {recipe.name!r} has no error feedback"
            raise ConfigError(msg)
        self._adams = None
        self._local_steps = recipe.direction.local_steps
        if recipe.direction.adam is not None:
            self._adams, moments = per_shard(recipe.direction.adam, layout, plan.world_size)
            self._state |= moments
            cuts = [cut for shard in layout.shards for cut in shard.segments]
            largest = max(cut.numel for cut in (layout.shards if self._local_steps > 1 else cuts))
            self._scratch = np.empty(largest, np.float32)

    def nbytes(self, shard: int) -> int:
        """Exact payload bytes of a shard."""
        return self._codecs[shard].nbytes

    @staticmethod
    def finite(gradients: Segments) -> bool:
        """Whether no value of these f32 arrays is NaN or Inf. Cost: one read."""
        return all(kernels.all_finite(values) for values in gradients)

    def compress(  # noqa: PLR0913 - what a push is made of
        self,
        shard: int,
        gradients: Segments,
        lr: float,
        payload: Buffer,
        *,
        weights: Segments | None = None,
        clear: bool = False,
    ) -> None:
        """Write one shard's push; moments and residual take this step.

        Args:
            shard: its index.
            gradients: f32[segment.numel] per segment of the shard; finite, or see above.
            lr: learning rate of this step (it is inside an Adam direction, beside a gradient).
            payload: u8[nbytes(shard)], written.
            weights: the current weights like the gradients; needed for weight decay on the worker.
            clear: what is finite of the gradients becomes 0 in the same pass.

        Raises:
            UsageError: the learning rate is illegal, the arrays do not fit the shard's segments, or
                weight decay has no weights.

        Cost: one pass over gradient, residual, and Adam's state where it is here.
        """
        if self._adams is None:
            seed = self._next_seed(shard)
            residual = self._residual_of(shard)
            codec = self._codecs[shard]
            codec.encode_segments(gradients, residual, payload, seed=seed, clear=clear)
        else:
            self._step(shard, gradients, lr, payload, weights, clear=clear)
        self._steps[shard] += 1

    def absorb(
        self, shard: int, gradients: Segments, lr: float, weights: Segments | None = None
    ) -> None:
        """Take a step that says nothing: its direction waits in the residual.

        Args:
            shard: its index.
            gradients: as for `compress`; a value that is not finite leaves its residual alone.
            lr: as for `compress`.
            weights: as for `compress`.

        Raises:
            UsageError: as for `compress`, or there is no residual to wait in.

        Cost: as `compress`.
        """
        self._check_can_wait()
        self._step(shard, gradients, lr, None, weights)
        self._steps[shard] += 1

    def descend(self, shard: int, gradients: Segments, lr: float, weights: Segments) -> None:
        """Take one local step: weights -= u. Nothing is said, the residual is not looked at.

        Args:
            shard: its index.
            gradients: as for `compress`, finite.
            lr: of this step.
            weights: this worker's own, f32[segment.numel] per segment; written.

        Raises:
            UsageError: as for `compress`, or the gradients are what is pushed: there is no step.

        Cost: `Adam.write`, and one pass over the weights.
        """
        adam, cut = self._local_adam(shard), self._shards[shard]
        for values in (gradients, weights):
            _check_segments(cut, values)
        adam.advance(lr)
        for segment, g, x in zip(cut.segments, gradients, weights, strict=True):
            u = self._scratch[: segment.numel]
            adam.write(g, u, start=segment.offset, x=x)
            with np.errstate(over="ignore"):  # then the next gradients will not be finite
                np.subtract(x, u, out=x)

    def compress_drift(  # noqa: PLR0913 - as `compress`, and where the steps began
        self,
        shard: int,
        gradients: Segments | None,
        lr: float,
        payload: Buffer | None,
        *,
        weights: Segments,
        start: Segments,
    ) -> None:
        """Write one shard's push after local steps: how far they went, this last one included.

        Without a payload nothing is said, as in `absorb`.

        Args:
            shard: its index.
            gradients: as for `compress`, finite; None leaves this step out, not those before it.
            lr: of this step.
            payload: u8[nbytes(shard)], written; or None.
            weights: as for `descend`, but not written: backward may still read them.
            start: the replica's weights, from which the first local step started.

        Raises:
            UsageError: as for `descend`; without a payload also as for `absorb`.

        Cost: `Adam.write`, two passes over the weights, one over start, and encoding.
        """
        if payload is None:
            self._check_can_wait()
        adam, cut = self._local_adam(shard), self._shards[shard]
        for values in (weights, start) if gradients is None else (gradients, weights, start):
            _check_segments(cut, values)
        parts = [self._scratch[s.offset : s.offset + s.numel] for s in cut.segments]
        if gradients is not None:
            adam.advance(lr)
        with np.errstate(over="ignore", invalid="ignore"):  # the payload will tell
            for index, (segment, drift) in enumerate(zip(cut.segments, parts, strict=True)):
                x = weights[index]
                if gradients is not None:
                    adam.write(gradients[index], drift, start=segment.offset, x=x)
                    x = np.subtract(x, drift, out=drift)
                np.subtract(start[index], x, out=drift)
        if payload is None:
            self._wait(shard, self._scratch[: cut.numel])
        else:
            residual, seed = self._residual_of(shard), self._next_seed(shard)
            self._codecs[shard].encode_segments(parts, residual, payload, seed=seed)
        self._steps[shard] += 1

    def payload_finite(self, shard: int, payload: Buffer) -> bool:
        """Whether what `compress` wrote says no NaN or Inf. Cost: one read of the scales."""
        try:
            self._codecs[shard].check(payload)
        except RemotePayloadError:  # what a server would say of it
            return False
        return True

    def restore(self, shard: int, payload: Buffer) -> bool:
        """Fold a payload that was not applied back: residual += what it says.

        One that no server would take (`MAX_SCALE`) would come again and again: it is given up, and
        the shard's residual, of which it has left nothing but rounding errors, starts from zero.

        Without error feedback there is nowhere to keep it and nothing happens: the step is lost,
        as a lost message is in any scheme without a residual. A block that says NaN took nothing
        from the residual, and gives nothing back.

        Returns:
            Whether the residual was kept.

        Cost: one shard of memory for the time of the call; pushes are rarely rejected.
        """
        residual, codec = self._residual_of(shard), self._codecs[shard]
        if residual is None:
            return True
        scales = codec.scales(payload)
        if (np.isfinite(scales) & (np.abs(scales) > MAX_SCALE)).any():
            residual.fill(0.0)
            return False
        said = np.empty(residual.size, np.float32)
        codec.decode(payload, said)
        self._wait(shard, said)
        return True

    def forget(self, shard: int) -> None:
        """Let a shard's residual start from zero; moments stay."""
        residual = self._residual_of(shard)
        if residual is not None:
            residual.fill(0)

    @property
    def steps(self) -> int:
        """Steps taken by the first shard; one that was left out of a step has taken one fewer."""
        return self._steps[0]

    def state_arrays(self) -> dict[str, NDArray[Any]]:
        """Residual and moments by name, not copied: with `steps` the whole state.

        All are f32[numel], but the residual is uint16[numel] where it is kept in bf16.
        """
        return dict(self._state)

    def resume(self, steps: int) -> None:
        """Take the step counter of a saved state, whose arrays were copied into `state_arrays`.

        With local steps it counts those that pushed: no state is saved between two of these.
        """
        self._steps = [steps] * len(self._shards)
        for adam in self._adams or ():
            adam.resume(steps * self._local_steps)

    def _local_adam(self, shard: int) -> Adam:
        if self._adams is None or self._local_steps == 1:
            msg = "this recipe has no local steps: its workers push in every step"
            raise UsageError(msg)
        return self._adams[shard]

    def _residual_of(self, shard: int) -> Residual | None:
        if self._residual is None:
            return None
        cut = self._shards[shard]
        return self._residual[cut.offset : cut.offset + cut.numel]

    def _next_seed(self, shard: int) -> int:
        return stream_seed(self._seed, self._rank, self._steps[shard], shard)

    def _check_can_wait(self) -> None:
        if self._residual is None:
            msg = "without error feedback a step cannot wait: there is no residual to wait in"
            raise UsageError(msg)

    def _wait(self, shard: int, values: Floats) -> None:
        """Add what is not said now, f32[shard.numel], to the residual."""
        form, residual = self._codecs[shard].codec.format, self._residual_of(shard)
        kernels.active().worker_step(
            WorkerStep(uplink=form, gradients=[values], starts=[0], payload=None, residual=residual)
        )

    def _step(  # noqa: PLR0913 - as `compress`
        self,
        shard: int,
        gradients: Segments,
        lr: float,
        payload: Buffer | None,
        weights: Segments | None,
        *,
        clear: bool = False,
    ) -> None:
        """One pass over a shard: its direction, then its payload or its residual."""
        codec, cut = self._codecs[shard], self._shards[shard]
        for values in (gradients, weights):
            if values is not None:
                _check_segments(cut, values)
        step = WorkerStep(
            uplink=codec.codec.format,
            gradients=gradients,
            starts=codec.starts(self._next_seed(shard)),
            payload=payload,
            residual=self._residual_of(shard),
            clear=clear,
        )
        if self._adams is not None:
            step = self._with_adam(step, self._adams[shard], lr, weights)
        kernels.active().worker_step(step)

    def _with_adam(
        self, step: WorkerStep, adam: Adam, lr: float, weights: Segments | None
    ) -> WorkerStep:
        weights, state = adam.weights(weights), adam.state_arrays()
        adam.advance(lr)
        return dataclasses.replace(
            step,
            adam=adam.coefficients,
            correction=adam.correction,
            m=state["m"],
            v=state["v"],
            third=state.get("vmax", state.get("s")),
            weights=weights,
            scratch=self._scratch,
        )


def _dtype_of(residual_dtype: str) -> Any:
    if residual_dtype not in _RESIDUALS:
        msg = f"a residual cannot be kept in {residual_dtype!r}: choose f32 or bf16"
        raise ConfigError(msg)
    return _RESIDUALS[residual_dtype]


def _check_segments(shard: Shard, values: Segments) -> None:
    wanted, came = [s.numel for s in shard.segments], [v.size for v in values]
    if wanted != came:
        msg = f"shard {shard.index} has segments of {wanted} values, got {came}"
        raise UsageError(msg)

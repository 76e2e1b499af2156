"""One worker's compressor: what its package's docstring says, method by method.

What common recipes say (`gradient` and `adam` in one codec) goes through one kernel, `worker_step`
or `encode`: one pass over memory. Other directions, and codecs that change, go by way of a shard of
scratch: the rule writes the message there, the codec reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from psq import kernels
from psq.codec import ShardCodec
from psq.errors import ConfigError, UsageError
from psq.feedback.counts import ShardCounts
from psq.feedback.local import LocalSteps, check_segments
from psq.feedback.payloads import Payloads
from psq.feedback.residual import Rates, Residuals, ResidualType
from psq.kernels import Buffer, Floats, Residual, WorkerStep
from psq.kernels.reference import clear_finite
from psq.optim import Adam, per_shard
from psq.plan import Plan
from psq.rules import DirectionRule, Move, Segments, is_linear, make_direction

__all__ = ["Compressor"]

_FUSED: Final = ("gradient", "adam")
_NOTHING: Final[Mapping[str, Floats]] = MappingProxyType({})


class Compressor:
    """One worker's moments and residual, and what turns gradients into payloads.

    Memory in bytes: 4 numel for the residual with error feedback, half of it in bf16; 4 numel times
    2 or 3 for Adam's state, times the rule's vectors for another direction's. Its scratch is
    addressed for the largest segment, but only a cache's worth is touched, unless one scale spans a
    segment (block=0); with local steps, a rule or a codec that changes it is the largest shard.

    Args:
        plan: the job.
        rank: this worker's.
        seed: the job's; stochastic codecs and directions that draw noise use it.
        residual_dtype: what the residual is kept in.

    Raises:
        ConfigError: the recipe's Adam settings or its direction cannot run, or it has no residual
            to keep in bf16.
    """

    def __init__(
        self, plan: Plan, rank: int, *, seed: int = 0, residual_dtype: ResidualType = "f32"
    ) -> None:
        recipe, layout = plan.recipe, plan.layout
        self._shards = layout.shards
        self._factors = [plan.rate_of(shard.index) for shard in layout.shards]
        self._steps = [0] * len(layout.shards)
        self._state: dict[str, NDArray[Any]] = {}
        self._residuals = _residuals_of(plan, residual_dtype)
        if self._residuals is not None:
            self._state["residual"] = self._residuals.array
        self._payloads = Payloads(plan, rank, seed, self._residuals)
        self._told = [False] * len(layout.shards)
        choice = self._payloads.choice
        self._state |= {f"choice.{name}": array for name, array in choice.state_arrays().items()}
        self._rates: Rates | None = None
        if self._residuals is not None and is_linear(recipe):
            self._rates = Rates(self._residuals, len(layout.shards))
            self._state["rates"] = self._rates.array
        self._local_steps = recipe.direction.local_steps
        self._adams: list[Adam] | None = None
        self._rule: DirectionRule | None = None
        is_fixed = recipe.uplink.choice.kind == "fixed"
        if recipe.direction.kind not in _FUSED or not (is_fixed or self._local_steps > 1):
            self._rule = make_direction(
                recipe,
                layout=layout,
                world_size=plan.data_world_size,
                rank=rank,
                seed=seed,
                choice=choice,
            )
            self._state |= self._rule.state_arrays()
        elif recipe.direction.adam is not None:
            self._adams, moments = per_shard(recipe.direction.adam, layout, plan.data_world_size)
            self._state |= moments
        self._scratch = np.empty(self._scratch_numel(), np.float32)

    def _scratch_numel(self) -> int:
        if self._rule is not None or self._local_steps > 1:
            return max(shard.numel for shard in self._shards)
        if self._adams is not None:
            return max(cut.numel for shard in self._shards for cut in shard.segments)
        return 0

    def nbytes(self, shard: int) -> int:
        """Payload bytes of a shard, exact where it has one codec; else of the largest it may be."""
        return max(codec.nbytes for codec in self._payloads.codecs(shard))

    def codec(self, shard: int, index: int = 0) -> ShardCodec:
        """One of the codecs that a shard may be said in: what `compress` returned the number of."""
        return self._payloads.codecs(shard)[index]

    @property
    def reads_first(self) -> bool:
        """Whether gradients must be found `finite` before `compress`: there is a state to keep."""
        return self._adams is not None or self._rule is not None

    @property
    def needs_all(self) -> bool:
        """Whether `prepare` must see a step's gradients before the first shard is compressed."""
        return self._rule is not None and self._rule.needs_all

    @property
    def looks_ahead(self) -> bool:
        """Whether gradients are to be taken at the replica's weights less `look_ahead`."""
        return self._rule is not None and self._rule.looks_ahead

    @staticmethod
    def finite(gradients: Segments) -> bool:
        """Whether no value of these f32 arrays is NaN or Inf. Cost: one read."""
        return all(kernels.all_finite(values) for values in gradients)

    def prepare(self, gradients: Sequence[Segments], lr: float, *, t: int | None = None) -> None:
        """See a whole step's gradients, shard by shard in order, where the direction `needs_all`.

        Those of a shard that is left out of the step may be zeros.
        """
        if self._rule is not None:
            self._rule.prepare(self._steps[0] + 1 if t is None else t, lr, gradients)

    def look_ahead(self, shard: int, out: Floats) -> None:
        """Write what to subtract from a shard's weights, f32[shard.numel], before backward.

        Raises:
            UsageError: gradients are taken at the replica's own weights.
        """
        if self._rule is None or not self._rule.looks_ahead:
            msg = "this recipe takes its gradients where the weights are: there is no look-ahead"
            raise UsageError(msg)
        residual = None if self._residuals is None else self._residuals.values(shard)
        self._rule.look_ahead(shard, residual, out)

    def compress(  # noqa: PLR0913 - what a push is made of
        self,
        shard: int,
        gradients: Segments,
        lr: float,
        payload: Buffer,
        *,
        weights: Segments | None = None,
        clear: bool = False,
        t: int | None = None,
        shared: Mapping[str, Floats] | None = None,
    ) -> int:
        """Write one shard's push; moments, residual and the rule's state take this step.

        Args:
            shard: its index.
            gradients: f32[segment.numel] per segment of the shard; finite, or see above.
            lr: learning rate of this step (it is inside an Adam direction, beside a gradient); a
                group's multiplier comes on top of it here.
            payload: u8[nbytes(shard)], of which the codec's bytes are written.
            weights: the current weights like the gradients; needed for weight decay on the worker.
            clear: what is finite of the gradients becomes 0 in the same pass.
            t: the round, version + 1; counted from this worker's first step when None.
            shared: the shard's views of the state that all nodes hold alike, where there is one.

        Returns:
            The number of the codec it is written in: `codec(shard, number)`, of whose nbytes the
            payload is. 0 where the recipe has one.

        Raises:
            UsageError: the learning rate is illegal, the arrays do not fit the shard's segments, or
                weight decay or the direction lacks something.

        Cost: one pass over gradient, residual, and Adam's state where it is here; for another
        direction or a codec that changes, some passes over a shard of scratch.
        """
        lr *= self._factors[shard]
        index, takes_part = 0, self._follow_rate(shard, gradients, lr)
        if self._rule is not None:
            round_t = self._round(shard, t)
            move = None if self._local_steps > 1 else self._rule.move(round_t, shared or _NOTHING)
            if move is None:
                self._direct(
                    self._rule, shard, gradients, lr, round_t, weights, shared, clear=clear
                )
                index = self._say(self._rule, shard, round_t, payload, takes_part=takes_part)
            else:
                self._say_move(self._rule, shard, move, gradients, payload, clear=clear)
        else:
            self._step(shard, gradients, lr, payload, weights, clear=clear, takes_part=takes_part)
            if self._rates is not None:
                self._payloads.note(shard, has_residual=takes_part)
        self._steps[shard] += 1
        return index

    def absorb(  # noqa: PLR0913 - as `compress`
        self,
        shard: int,
        gradients: Segments,
        lr: float,
        weights: Segments | None = None,
        *,
        t: int | None = None,
        shared: Mapping[str, Floats] | None = None,
    ) -> None:
        """Take a step that says nothing: its direction waits in the residual.

        Where the residual takes no part (`shared` in a refresh; a rate of 0 outside the message) it
        has nowhere to wait: the step is lost, as it would be without error feedback.

        Args:
            shard: its index.
            gradients: as for `compress`; a value that is not finite leaves its residual alone.
            lr: as for `compress`.
            weights: as for `compress`.
            t: as for `compress`.
            shared: as for `compress`.

        Raises:
            UsageError: as for `compress`, or there is no residual to wait in.

        Cost: as `compress`.
        """
        residuals = self._check_can_wait()
        lr *= self._factors[shard]
        takes_part = self._follow_rate(shard, gradients, lr)
        if self._rule is not None:
            round_t = self._round(shard, t)
            self._direct(self._rule, shard, gradients, lr, round_t, weights, shared)
            if takes_part and self._rule.uses_residual(round_t):
                residuals.add(shard, self._message(shard))
        elif takes_part:
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
        lr *= self._factors[shard]
        self._local().descend(self._shards[shard], gradients, lr, weights, self._scratch)

    def compress_drift(  # noqa: PLR0913 - as `compress`, and where the steps began
        self,
        shard: int,
        gradients: Segments | None,
        lr: float,
        payload: Buffer | None,
        *,
        weights: Segments,
        start: Segments,
        t: int | None = None,
    ) -> int:
        """Write one shard's push after local steps: how far they went, this last one included.

        Without a payload nothing is said, as in `absorb`.

        Args:
            shard: its index.
            gradients: as for `compress`, finite; None leaves this step out, not those before it.
            lr: of this step.
            payload: u8[nbytes(shard)], as for `compress`; or None.
            weights: as for `descend`, but not written: backward may still read them.
            start: the replica's weights, from which the first local step started.
            t: as for `compress`.

        Returns:
            As `compress`.

        Raises:
            UsageError: as for `descend`; without a payload also as for `absorb`.

        Cost: `Adam.write`, two passes over the weights, one over start, and encoding.
        """
        residuals = self._check_can_wait() if payload is None else self._residuals
        lr *= self._factors[shard]
        self._local().drift(
            self._shards[shard], gradients, lr, weights, start, self._message(shard)
        )
        number = 0
        if payload is not None:
            number = self._encode(shard, self._round(shard, t), payload)
        elif residuals is not None:
            residuals.add(shard, self._message(shard))
        self._steps[shard] += 1
        return number

    def payload_finite(self, shard: int, payload: Buffer) -> bool:
        """Whether what `compress` wrote says no NaN or Inf. Cost: one read of the scales."""
        return self._payloads.is_finite(shard, payload)

    def restore(self, shard: int, payload: Buffer) -> bool:
        """Fold a shard's last payload, which was not applied, back: residual += what it says.

        One that no server would take (`MAX_SCALE`) would come again and again: it is given up, and
        the shard's residual, of which it has left nothing but rounding errors, starts from zero.
        A direction that was told of the payload takes it back.

        Without error feedback, or where the payload took nothing from the residual, there is
        nowhere to keep it and nothing happens: the step is lost, as a lost message is in any scheme
        without a residual. A block that says NaN took nothing from the residual, and gives nothing
        back.

        Returns:
            Whether the residual was kept.

        Cost: one shard of memory for the time of the call; pushes are rarely rejected.
        """
        if self._told[shard] and self._rule is not None:
            message = np.empty(self._shards[shard].numel, np.float32)
            self._payloads.decode(shard, payload, message)
            if kernels.all_finite(message):  # else it was spoilt since: that is not what it said
                self._rule.unsaid(shard, message)
            self._told[shard] = False
        return self._payloads.fold_back(shard, payload)

    def forget(self, shard: int) -> None:
        """Let a shard's residual start from zero; moments stay."""
        if self._residuals is not None:
            self._residuals.clear(shard)

    def rescale(self, shard: int, factor: Floats) -> None:
        """Multiply a shard's residual by f32[shard.numel]: its units have changed on all nodes."""
        if self._residuals is not None:
            self._residuals.scale(shard, factor)

    @property
    def steps(self) -> int:
        """Steps taken by the first shard; one that was left out of a step has taken one fewer."""
        return self._steps[0]

    def state_arrays(self) -> dict[str, NDArray[Any]]:
        """All vectors by name, not copied: with `steps` the whole state.

        f32[numel], but for: the residual, uint16[numel] where it is kept in bf16; `rates`,
        f64[shards], the learning rates the residual is in units of; and what the choice of codecs
        remembers, whose names begin with "choice.".
        """
        return dict(self._state)

    def resume(self, steps: int) -> None:
        """Take the step counter of a saved state, whose arrays were copied into `state_arrays`.

        With local steps it counts those that pushed: no state is saved between two of these.
        """
        self._steps = [steps] * len(self._shards)
        self._payloads.choice.resume(steps)
        if self._rule is not None:
            self._rule.resume(steps)
        for adam in self._adams or ():
            adam.resume(steps * self._local_steps)

    def counts(self, shard: int) -> ShardCounts:
        """What there is to know of a shard beside its vectors."""
        codec, has_residual = self._payloads.made(shard)
        return ShardCounts(
            steps=self._steps[shard],
            moments=0 if self._adams is None else self._adams[shard].count,
            rule=0 if self._rule is None else self._rule.count(shard),
            codec=codec,
            has_residual=has_residual,
            told=self._told[shard],
        )

    def check_recall(self, counts: Mapping[int, ShardCounts]) -> None:
        """Refuse what `recall` cannot do.

        Raises:
            UsageError: the direction's rule counts in a way of its own, and shards differ.
        """
        if self._rule is None or self._rule.resumes_shards():
            return
        if len(counts) < len(self._shards) or len({each.rule for each in counts.values()}) > 1:
            kind = type(self._rule).__name__
            msg = (
                f"direction {kind} has a resume of its own and no resume_shard: a process that "
                "ended amid a step leaves nothing that another could go on from"
            )
            raise UsageError(msg)

    def recall(self, counts: Mapping[int, ShardCounts]) -> None:
        """Go on with shards whose vectors were copied into `state_arrays`.

        Raises:
            UsageError: as `check_recall`.
        """
        self.check_recall(counts)
        for shard, each in counts.items():
            self._steps[shard], self._told[shard] = each.steps, each.told
            self._payloads.recall(shard, each.codec, has_residual=each.has_residual)
            if self._adams is not None:
                self._recall_moments(self._adams, shard, each.moments)
            if self._rule is not None and self._rule.resumes_shards():
                self._rule.resume_shard(shard, each.rule)
        if 0 in counts:
            self._payloads.choice.resume(counts[0].steps)
            if self._rule is not None and not self._rule.resumes_shards():
                self._rule.resume(counts[0].rule)

    @staticmethod
    def _recall_moments(adams: Sequence[Adam], shard: int, count: int) -> None:
        twin = next((adam for adam in adams if adam.count == count), None)
        if twin is None:
            adams[shard].resume(count)
        else:
            adams[shard].resume_as(twin)

    # ---- a rule's message, by way of scratch

    def _direct(  # noqa: PLR0913, PLR0917 - what a direction is made of
        self,
        rule: DirectionRule,
        shard: int,
        gradients: Segments,
        lr: float,
        t: int,
        weights: Segments | None,
        shared: Mapping[str, Floats] | None,
        *,
        clear: bool = False,
    ) -> None:
        """Let the rule write a shard's message to scratch."""
        for values in (gradients, weights):
            if values is not None:
                check_segments(self._shards[shard], values)
        message, common = self._message(shard), _NOTHING if shared is None else shared
        with np.errstate(all="ignore"):  # the payload will tell
            rule.write(shard, t, lr, gradients, message, weights=weights, shared=common)
        rule.advance(shard)
        if clear:
            for said in gradients:
                clear_finite(said)

    def _say(
        self, rule: DirectionRule, shard: int, t: int, payload: Buffer, *, takes_part: bool
    ) -> int:
        """Encode the message in scratch, and tell the rule what it became."""
        uses_residual = takes_part and rule.uses_residual(t)
        index = self._encode(shard, t, payload, uses_residual=uses_residual)
        self._told[shard] = rule.wants_said and self._payloads.is_finite(shard, payload)
        if self._told[shard]:
            message = self._message(shard)
            self._payloads.decode(shard, payload, message)
            rule.said(shard, t, message)
        return index

    def _encode(self, shard: int, t: int, payload: Buffer, *, uses_residual: bool = True) -> int:
        message, step = self._message(shard), self._steps[shard]
        return self._payloads.encode(
            shard, message, payload, t=t, step=step, uses_residual=uses_residual
        )

    def _message(self, shard: int) -> Floats:
        return self._scratch[: self._shards[shard].numel]

    # ---- rates and residuals

    def _follow_rate(self, shard: int, gradients: Segments, lr: float) -> bool:
        """Whether the residual takes part in a step of this rate; see `Rates`."""
        if self._rates is None:
            return True
        check_segments(self._shards[shard], gradients)  # before anything changes
        return self._rates.follow(shard, lr)

    def _round(self, shard: int, t: int | None) -> int:
        return self._steps[shard] + 1 if t is None else t

    def _local(self) -> LocalSteps:
        if self._adams is None or self._local_steps == 1:
            msg = "this recipe has no local steps: its workers push in every step"
            raise UsageError(msg)
        return LocalSteps(self._adams)

    def _residual_of(self, shard: int) -> Residual | None:
        return None if self._residuals is None else self._residuals.of(shard)

    def _check_can_wait(self) -> Residuals:
        if self._residuals is None:
            msg = "without error feedback a step cannot wait: there is no residual to wait in"
            raise UsageError(msg)
        return self._residuals

    # ---- one kernel

    def _step(  # noqa: PLR0913 - as `compress`
        self,
        shard: int,
        gradients: Segments,
        lr: float,
        payload: Buffer | None,
        weights: Segments | None,
        *,
        clear: bool = False,
        takes_part: bool = True,
    ) -> None:
        """One pass over a shard: its direction, then its payload or its residual."""
        codec, cut = self._payloads.codecs(shard)[0], self._shards[shard]
        check_segments(cut, gradients)
        if self._adams is not None and weights is not None:
            check_segments(cut, weights)
        step = WorkerStep(
            uplink=codec.codec.format,
            gradients=gradients,
            starts=codec.starts(self._payloads.seed(shard, self._steps[shard])),
            payload=payload,
            residual=self._residual_of(shard) if takes_part else None,
            clear=clear,
        )
        if self._adams is not None:
            step = self._with_adam(step, self._adams[shard], lr, weights)
        kernels.active().worker_step(step)

    def _say_move(  # noqa: PLR0913 - as `compress`
        self,
        rule: DirectionRule,
        shard: int,
        move: Move,
        gradients: Segments,
        payload: Buffer,
        *,
        clear: bool,
    ) -> None:
        """One pass over a shard whose message moves a common vector, in the default codec."""
        codec = self._payloads.codecs(shard)[0]
        check_segments(self._shards[shard], gradients)
        step = WorkerStep(
            uplink=codec.codec.format,
            gradients=gradients,
            starts=codec.starts(self._payloads.seed(shard, self._steps[shard])),
            payload=memoryview(payload)[: codec.nbytes],
            residual=self._residual_of(shard),
            blend=move.blend,
            before=move.before,
            unit=move.unit,
            scratch=self._scratch,
            clear=clear,
        )
        kernels.active().worker_step(step)
        rule.advance(shard)
        self._payloads.note(shard, has_residual=self._residuals is not None)

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


def _residuals_of(plan: Plan, residual_dtype: ResidualType) -> Residuals | None:
    if plan.recipe.uplink.error_feedback:
        return Residuals(plan.layout, residual_dtype)
    if residual_dtype != "f32":
        msg = f"a {residual_dtype} residual: recipe {plan.recipe.name!r} has no error feedback"
        raise ConfigError(msg)
    return None

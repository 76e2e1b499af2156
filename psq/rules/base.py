"""What the parts of a recipe are in arithmetic: one small base class for each slot.

    direction   gradients of a shard        -> the message, before error feedback      (a worker)
    choice      a shard, a round            -> which codec its message is written in   (both)
    aggregate   the workers' messages       -> one vector                              (a server)
    apply       that vector                 -> what is subtracted from the weights     (a server, or
                                               every node: downlink "mean")

A rule sees one shard at a time, by its index in the job; the layout that it is given says where the
shard lies in its own state vectors. It holds no scratch that grows with the model, knows no socket
and no clock, and draws no random number that a seed does not fix (but for `gaussian`, which says
so). t counts rounds from 1: the round that moves the weights of version v is t = v + 1.

The defaults here are what most rules want: no state, the mean, nothing to tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from psq.codec import ShardCodec
from psq.errors import UsageError
from psq.kernels import Blend, Buffer, Floats, Residual
from psq.kernels.reference import expand
from psq.layout import Layout, Shard
from psq.recipe import AdamConfig

__all__ = [
    "AggregateRule",
    "ApplyRule",
    "ChoiceRule",
    "DirectionRule",
    "Judgement",
    "Move",
    "OptionValue",
    "RoundView",
    "RuleOptions",
    "Said",
    "Segments",
]

Segments: TypeAlias = Sequence[Floats]
OptionValue: TypeAlias = bool | int | float | str
RuleOptions: TypeAlias = Mapping[str, OptionValue]


class _Rule:
    """State vectors, f32[layout.numel] by name, and the shards' views of them."""

    state_names: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        options: RuleOptions,
        layout: Layout,
        world_size: int,
        state: Mapping[str, Floats] | None,
    ) -> None:
        self.options = options
        self.layout = layout
        self.world_size = world_size
        self._arrays: dict[str, Floats] = {
            name: np.zeros(layout.numel, np.float32) if state is None else state[name]
            for name in self.state_names
        }
        self._shards = {shard.index: shard for shard in layout.shards}

    def state_arrays(self) -> dict[str, Floats]:
        """The state vectors by name, not copied."""
        return dict(self._arrays)

    def memory(self) -> tuple[dict[str, NDArray[Any]], Any]:
        """What else a checkpoint needs, between two rounds.

        Returns:
            Arrays by name, which are never written to again, and facts: what msgpack can hold.
        """
        return {}, None

    def remember(self, arrays: Mapping[str, NDArray[Any]], facts: Any) -> None:
        """Take what `memory` gave, in a rule that has not worked yet."""
        del arrays, facts

    def of(self, name: str, shard: int) -> Floats:
        """A shard's view of a state vector."""
        cut = self._shards[shard]
        return self._arrays[name][cut.offset : cut.offset + cut.numel]

    def cut(self, shard: int) -> Shard:
        """The shard itself."""
        return self._shards[shard]


class ChoiceRule:
    """Which codec a shard's message is written in; the default is always the first.

    Attributes:
        codecs: specs by number; a shard whose group has a codec of its own has that as number 0.

    Args:
        options: of the part, complete.
        codecs: see the attribute.
        layout: the cut.
    """

    def __init__(self, options: RuleOptions, *, codecs: Sequence[str], layout: Layout) -> None:
        self.options = options
        self.codecs = tuple(codecs)
        self.layout = layout

    def bind(self, codecs: Sequence[Sequence[ShardCodec]]) -> None:
        """Learn what each shard may be written in: called once, where messages are written.

        Raises:
            ConfigError: it cannot choose from these.
        """

    def measure(self, shard: int, message: Floats, residual: Residual | None) -> float:
        """The norm by which it chooses: L2 of message + residual, [shard.numel] each."""
        del shard
        said = message.astype(np.float64)
        if residual is not None:
            np.add(said, expand(residual), out=said)
        return float(np.sqrt(np.sum(np.square(said))))

    def choose(self, shard: int, t: int, norm: Callable[[], float]) -> int:
        """The number of the codec for a shard in round t.

        Args:
            shard: its index.
            t: the round, from 1.
            norm: what `measure` says of what is to be said, computed when it is called.
        """
        del shard, t, norm
        return 0

    def state_arrays(self) -> dict[str, NDArray[Any]]:
        """What a checkpoint needs, by name, not copied."""
        return {}

    def resume(self, steps: int) -> None:
        """Take the number of steps of a saved state."""
        del steps


@dataclass(frozen=True, slots=True)
class Move:
    """A message that moves a common vector, f32[shard.numel]: kept before + rest (g / unit).

    Attributes:
        blend: kept and rest.
        before: the vector; only read.
        unit: of the gradient, alike; None: as it is.
    """

    blend: Blend
    before: Floats
    unit: Floats | None = None


class DirectionRule(_Rule):
    """What a worker wants to say: one object per worker.

    Attributes:
        state_names: its vectors, f32[layout.numel] each.
        needs_all: it must see all gradients of a step before the first shard is written.
        wants_said: it is told what was said of each shard, decoded.
        looks_ahead: gradients are to be taken at other weights than the replica's.

    Args:
        options: of the part, complete.
        layout: the cut.
        world_size: of the job.
        rank: this worker's.
        seed: the job's.
        adam: the recipe's Adam settings, if it has any.
        choice: the uplink's choice of codecs: rules whose rounds differ ask it which round it is.
        state: the vectors to work on, taken as they are; made here (zeros) when None.
    """

    needs_all: ClassVar[bool] = False
    wants_said: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False

    def __init__(  # noqa: PLR0913 - all that a direction may depend on
        self,
        options: RuleOptions,
        *,
        layout: Layout,
        world_size: int,
        rank: int,
        seed: int,
        adam: AdamConfig | None = None,
        choice: ChoiceRule | None = None,
        state: Mapping[str, Floats] | None = None,
    ) -> None:
        super().__init__(options, layout, world_size, state)
        self.rank = rank
        self.seed = seed
        self.adam = adam
        self.choice = choice
        self._counts = {shard.index: 0 for shard in layout.shards}
        self.setup(state)

    def setup(self, state: Mapping[str, Floats] | None) -> None:
        """Make what else follows from the arguments, or refuse them; called once, at the end.

        Args:
            state: as the constructor's.

        Raises:
            ConfigError: they do not go together.
        """

    def prepare(self, t: int, lr: float, gradients: Sequence[Segments]) -> None:
        """See all gradients of a step, in the order of the shards, before the first is written."""

    def write(  # noqa: PLR0913 - what a direction is made of
        self,
        shard: int,
        t: int,
        lr: float,
        gradients: Segments,
        out: Floats,
        *,
        weights: Segments | None,
        shared: Mapping[str, Floats],
    ) -> None:
        """Write a shard's message, before error feedback; the state takes this step.

        Args:
            shard: its index.
            t: the round, from 1.
            lr: the learning rate of this step for this shard.
            gradients: f32[segment.numel] for each segment, finite; only read.
            out: f32[shard.numel], written.
            weights: the replica's weights like the gradients, where the caller has them.
            shared: the shard's views of the state that all nodes hold alike (downlink "mean"), by
                name; only read. Empty elsewhere.
        """
        raise NotImplementedError

    def move(self, t: int, shared: Mapping[str, Floats]) -> Move | None:
        """What `write` would do in round t, where it only moves a vector that all nodes hold.

        Then one kernel forms the message and its payload, and `write` is not called.
        """
        del t, shared
        return None

    def uses_residual(self, t: int) -> bool:
        """Whether the residual is added to the message of round t, and takes what it leaves out."""
        del t
        return True

    def said(self, shard: int, t: int, message: Floats) -> None:
        """Take what a shard's message of round t says, decoded: f32[shard.numel]."""

    def unsaid(self, shard: int, message: Floats) -> None:
        """Take back the last message of a shard, as `said` had it: it was not applied."""

    def look_ahead(self, shard: int, residual: Floats | None, out: Floats) -> None:
        """Write to out, f32[shard.numel], what to subtract from the replica's weights."""
        raise NotImplementedError

    def count(self, shard: int) -> int:
        """How many steps a shard has taken."""
        return self._counts[shard]

    def advance(self, shard: int) -> None:
        """Count a shard's step: the caller does, after `write`."""
        self._counts[shard] += 1

    def resume(self, steps: int) -> None:
        """Take the step counter of a saved state, whose arrays were copied into `state_arrays`."""
        self._counts = dict.fromkeys(self._counts, steps)

    @classmethod
    def resumes_shards(cls) -> bool:
        """Whether `resume_shard` does all that is to be done: a rule with a `resume` says how."""
        own = cls.resume is not DirectionRule.resume
        return not own or cls.resume_shard is not DirectionRule.resume_shard

    def resume_shard(self, shard: int, steps: int) -> None:
        """The same for one shard, where they have not taken equally many."""
        self._counts[shard] = steps


@dataclass(frozen=True, slots=True)
class Said:
    """One worker's contribution to a shard's round.

    Attributes:
        rank: the worker's.
        codec: what the payload is written in.
        payload: u8[codec.nbytes], checked.
        weight: of this contribution in the mean.
        staleness: how many rounds behind its gradient was taken.
    """

    rank: int
    codec: ShardCodec
    payload: Buffer
    weight: float = 1.0
    staleness: int = 0


@dataclass(frozen=True, slots=True)
class Judgement:
    """What an aggregate decides of one worker's round: its weight, or why it is refused.

    Raises:
        UsageError: the weight is no finite number >= 0.
    """

    weight: float = 1.0
    refused: str = ""

    def __post_init__(self) -> None:
        """Refuse what no mean can be made with, where the rule that says so is still on the way."""
        if not (math.isfinite(self.weight) and self.weight >= 0.0):
            msg = f"a judgement's weight must be a finite number >= 0, got {self.weight!r}"
            raise UsageError(msg)


class RoundView(Protocol):
    """A whole round as an aggregate or an apply may look at it.

    Attributes:
        number: the round, from 1.
        ranks: who has said something, ascending.
        staleness: of each rank, in rounds.
        weights: of each rank, as it was pushed.
        shards: the indexes that this round moves, ascending.
    """

    @property
    def number(self) -> int: ...  # noqa: D102
    @property
    def ranks(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def staleness(self) -> Mapping[int, int]: ...  # noqa: D102
    @property
    def weights(self) -> Mapping[int, float]: ...  # noqa: D102
    @property
    def shards(self) -> Sequence[int]: ...  # noqa: D102

    def payload(self, rank: int, shard: int) -> tuple[ShardCodec, Buffer] | None:
        """What a rank said of a shard, checked; None where it said nothing."""

    def decode(self, rank: int, shard: int, out: Floats) -> None:
        """Write what a rank said of a shard to out, f32[shard.numel]; zeros for nothing."""

    def x(self, shard: int) -> Floats:
        """The weights of a shard before this round, f32[shard.numel]; only read."""


class AggregateRule(_Rule):
    """How the workers' messages become one; the default is the weighted mean.

    Attributes:
        state_names: its vectors, f32[layout.numel] each.
        whole: it judges whole rounds before the first shard is reduced.

    Args:
        options: of the part, complete.
        layout: the cut; offsets are in this rule's vectors.
        world_size: of the job.
        state: the vectors to work on; made here (zeros) when None.
    """

    whole: ClassVar[bool] = False

    def __init__(
        self,
        options: RuleOptions,
        *,
        layout: Layout,
        world_size: int,
        state: Mapping[str, Floats] | None = None,
    ) -> None:
        super().__init__(options, layout, world_size, state)
        self.setup()

    def setup(self) -> None:
        """What a rule needs besides, made when options and layout are there.

        Raises:
            ConfigError: it cannot run with these options, or with so few workers.
        """

    @classmethod
    def copies(cls, world_size: int) -> int:
        """How many dense copies of the weights it may keep, besides its state vectors."""
        del world_size
        return 0

    def judge(self, round: RoundView) -> Mapping[int, Judgement]:  # noqa: A002 - the field's word
        """Decide whose messages of a round count; ranks left out count with weight 1."""
        del round
        return {}

    def combine(self, shard: int, said: Sequence[Said], out: Floats) -> None:
        """Write the aggregate of at least one contribution to out, f32[shard.numel].

        By ascending rank; with weights of 1 these are the bits of the kernel's mean. Where all
        weights are 0 nobody has said anything: zeros.

        Cost: one decode per contribution; a shard of scratch where weights differ from 1.
        """
        del shard
        if all(one.weight == 1.0 for one in said):
            for index, one in enumerate(said):
                (one.codec.decode_add if index else one.codec.decode)(one.payload, out)
            np.multiply(out, np.float32(1.0 / len(said)), out=out)
            return
        part = np.empty(out.size, np.float32)
        out.fill(0.0)
        for one in said:
            one.codec.decode(one.payload, part)
            np.multiply(part, np.float32(one.weight), out=part)
            np.add(out, part, out=out)
        total = sum(one.weight for one in said)
        if total > 0.0:
            np.multiply(out, np.float32(1.0 / total), out=out)


class ApplyRule(_Rule):
    """What becomes of the aggregate: on the server, or on every node with the downlink "mean".

    Attributes:
        state_names: its vectors, f32[layout.numel] each.
        whole: it takes whole rounds, by tensor: `step_whole` instead of `write`.
        units: the state vector, if there is one, whose values residuals are in units of: who is
            given it whole, having missed some rounds, rescales its residual by old / new.
        counts_absent: a rank that says nothing has said zero: the aggregate comes multiplied by
            contributors / world_size.

    Args:
        options: of the part, complete.
        layout: the cut; offsets are in this rule's vectors.
        world_size: of the job.
        adam: the recipe's Adam settings, if it has any.
        choice: the uplink's choice of codecs: rules whose rounds differ ask it which round it is.
        state: the vectors to work on; made here (zeros) when None.
    """

    whole: ClassVar[bool] = False
    units: ClassVar[str] = ""
    counts_absent: ClassVar[bool] = False

    def __init__(  # noqa: PLR0913 - all that an apply may depend on
        self,
        options: RuleOptions,
        *,
        layout: Layout,
        world_size: int,
        adam: AdamConfig | None = None,
        choice: ChoiceRule | None = None,
        state: Mapping[str, Floats] | None = None,
    ) -> None:
        super().__init__(options, layout, world_size, state)
        self.adam = adam
        self.choice = choice

    @classmethod
    def is_linear(cls, options: RuleOptions) -> bool:
        """Whether a step is the push's learning rate times something linear in the messages.

        Workers then rescale their residuals when that rate changes (Zheng 2019).
        """
        del options
        return False

    def advance(self, shard: int, t: int, lr: float) -> None:
        """Begin round t of a shard, with this learning rate."""

    def write(self, shard: int, change: Floats, x: Floats) -> None:
        """Turn the aggregate into what is subtracted from the weights, in place.

        Args:
            shard: its index, of which `advance` has begun a round.
            change: f32[shard.numel], the aggregate; written.
            x: the shard's weights before the round, f32[shard.numel]; only read.
        """
        raise NotImplementedError

    def uses_residual(self, shard: int, t: int) -> bool:
        """Whether the server's residual takes part in its answer of round t."""
        del shard, t
        return True

    def rescale(self, shard: int) -> Floats | None:
        """After a shard's step: what its residuals are to be multiplied by, everywhere.

        Returns:
            f32[shard.numel], or None where units have not changed.
        """
        del shard
        return None

    def step_whole(
        self,
        means: Mapping[str, NDArray[np.float32]],
        weights: Mapping[str, NDArray[np.float32]],
        t: int,
        lr: float,
        said: RoundView,
    ) -> None:
        """Take a whole round: edit the weights in place, shaped arrays by tensor name."""
        raise NotImplementedError

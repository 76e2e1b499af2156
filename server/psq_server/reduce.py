"""The server's arithmetic: a round's payloads in, the weights moved, the answer's payload out.

    a  = aggregate of the decoded pushes, by ascending rank           the mean, if nothing else
    u  = what the recipe's apply makes of it                          Adam's step, or a itself

    downlink "weights"   x <- x - u;  broadcast C(x)               x is exact, workers see C(x)
    downlink "delta"     z = -u + e;  d = C(z);  e <- z - d;  x <- x + d;  broadcast d
    downlink "mean"      z = a + e;   d = C(z);  e <- z - d;  broadcast d;  everyone: x <- x - u(d)

In "delta" and "mean" x is, byte for byte, what every worker holds, because each does the same with
the same d; what the codec has not said yet is e.

A mean that is added, or that Adam steps on, is one kernel, `server_step`, if all pushes came in one
codec and count alike; this module holds the vectors and says which. Everything else goes through
the recipe's rules (`psq.rules`), shard by shard, and gives the same bits where both can. State in
bytes: 4 numel (1 for x; the vectors of the rules; 1 for e where the downlink has error feedback),
and 4 times the largest shard of scratch. An apply that takes whole rounds (a server step of the
user's) has two vectors more from its step to the end of the round. No torch, no clock, no socket.
The caller guarantees checked payloads (`check`, `check_rate`), and each shard once a round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from psq import kernels
from psq.codec import ShardCodec, get_codec
from psq.errors import RemotePayloadError, UsageError
from psq.kernels import Buffer, Floats, ServerStep
from psq.plan import Plan
from psq.rules import (
    AggregateRule,
    ApplyRule,
    Judgement,
    Said,
    is_linear,
    make_aggregate,
    make_apply,
)
from psq.rules.applies import AdamStep, Add
from psq.rules.blocks import is_worth_nothing
from psq.seeds import SERVER_RANK, stream_seed
from psq_server.answers import Answer, Bytes, Codecs, Full
from psq_server.state import Pushed
from psq_server.vectors import Vectors
from psq_server.view import View
from psq_server.whole import WholeStep

__all__ = ["MEMORY", "Answer", "Full", "Reducer"]

MEMORY: Final = ":"
"""Between the slot and the name of an array that a rule keeps beside its vectors."""
NOTHING: Final = np.float32(-0.0)  # unlike +0.0 it changes no bit of what it is added to


class Reducer:
    """A job's weights, as far as this server has them, and the optimizer that moves them.

    Args:
        plan: the job.
        seed: the job's; only a stochastic downlink codec uses it.

    Raises:
        ConfigError: the recipe's Adam settings cannot run.
    """

    def __init__(self, plan: Plan, *, seed: int = 0) -> None:
        recipe = plan.recipe
        self._recipe = recipe
        self._plan = plan
        self._seed = seed
        self._vectors = vectors = Vectors(plan)
        self._codecs = Codecs(plan, vectors.layout)
        layout, world_size = vectors.layout, plan.world_size
        self._aggregate = make_aggregate(recipe, layout=layout, world_size=world_size)
        self._apply = make_apply(recipe, layout=layout, world_size=world_size)
        self._adams = self._apply if isinstance(self._apply, AdamStep) else None
        self._whole = None
        if self._apply.whole:
            self._whole = WholeStep(plan, vectors, self._apply, self._combine)
        self._is_mean = recipe.downlink.kind == "mean"
        self._is_kernels = (
            recipe.aggregate.kind == "mean"
            and not self._is_mean
            and isinstance(self._apply, Add | AdamStep)
        )
        """Whether the kernel can do a round of pushes that count alike in one codec."""
        self._rounds = dict.fromkeys(vectors.shards, 0)
        self._moves = dict.fromkeys(vectors.shards, 0)
        self._state: dict[str, Floats] = {"x": vectors.x, **self._apply.state_arrays()}
        self._residual = None
        if recipe.downlink.kind != "weights" and recipe.downlink.error_feedback:
            self._residual = self._state["residual"] = np.zeros_like(vectors.x)
        self._is_linear = self._is_mean and is_linear(recipe)
        self._rates: dict[int, float] = {}
        """Of each shard, the rate that its residual was left with, where rates are outside it."""
        self._scratch = np.empty(max(s.numel for s in vectors.layout.shards), np.float32)

    @property
    def has_weights(self) -> bool:
        """Whether every part of the initial weights has come."""
        return self._vectors.has_weights

    def init(self, shard: int, part: int, values: Buffer) -> None:
        """Take part `part` of a shard's initial weights; see `Vectors.init`.

        Raises:
            RemotePayloadError: no such part, another length, or a value that is not finite.
        """
        self._vectors.init(shard, part, values)

    def weights(self) -> dict[str, Floats]:
        """The weights by parameter name; see `Vectors.weights`."""
        return self._vectors.weights()

    def check(self, shard: int, payload: Buffer) -> None:
        """Whether a worker's payload, in the usual codec, may be given to `reduce`.

        Raises:
            RemotePayloadError: wrong length, or a scale that is not finite.
        """
        self._codecs.usual(shard).check(payload)

    def check_rate(self, rate: float) -> None:
        """Whether a learning rate a worker asked for may be given to `reduce`.

        Raises:
            RemotePayloadError: the server's step needs one and this is negative or not finite.
        """
        if not isinstance(self._apply, Add) and not (math.isfinite(rate) and rate >= 0.0):
            msg = f"the push asks for the learning rate {rate!r}: it must be finite and >= 0"
            raise RemotePayloadError(msg)

    def payload_nbytes(self, shard: int, *, anything: bool = True) -> int:
        """Exact bytes of the next broadcast of a shard, to which somebody contributed or not."""
        return self._next_codec(shard).nbytes if anything or not self._is_mean else 0

    def judge(
        self, number: int, said: Mapping[int, Sequence[Pushed]], lr: float
    ) -> Mapping[int, Judgement]:
        """Let the recipe's rules look at a round before any of it is reduced.

        Needed, once a round and before its first `step`, where `recipe.whole`.

        Args:
            number: the round, from 0: it turns this version into the next one.
            said: of every shard that the round moves, the contributions by ascending rank, checked.
            lr: the round's learning rate.

        Returns:
            Of ranks that it says something of: the weight that replaces theirs, or why nothing of
            theirs may be given to `step`.
        """
        view = View(number + 1, said, codec=self._codecs.uplink, x=self._x_of)
        judged = dict(self._aggregate.judge(view)) if self._aggregate.whole else {}
        if self._whole is not None:
            self._whole.take(view, said, judged, lr)
        return judged

    def reduce(
        self, shard: int, payloads: Sequence[Buffer], lr: float | None, out: Bytes | None = None
    ) -> Bytes:
        """One round of one shard, of payloads in the usual codec that count alike; see `step`.

        Returns:
            The broadcast's body.
        """
        usual = self._codecs.usual(shard).codec.wire_id
        said = [Pushed(rank, memoryview(p), usual) for rank, p in enumerate(payloads)]
        return self.step(shard, said, lr, out).body

    def step(
        self, shard: int, said: Sequence[Pushed], lr: float | None, out: Bytes | None = None
    ) -> Answer:
        """One round of one shard.

        With nothing said (every worker skipped, or was refused) nothing moves and no state changes;
        the answer says so: the same weights again, a delta of zeros, or "nothing".

        Args:
            shard: its index.
            said: the contributions by ascending rank, checked, and judged where they need be.
            lr: learning rate of the server's step; ignored where the rate is inside the message.
            out: u8[payload_nbytes(shard, anything=bool(said))], written; made here when None.

        Raises:
            UsageError: the step needs a learning rate, and it is None, negative or not finite.

        Cost: one pass over x, the state and the residual where the kernel does it, some more where
            rules do; of the payloads and the answer, their bytes.
        """
        if out is None:
            out = np.empty(self.payload_nbytes(shard, anything=bool(said)), np.uint8)
        downlink = self._next_codec(shard)
        stepped = None if self._whole is None else self._whole.next(shard)
        if not said and stepped is None:
            self._rounds[shard] += 1
            return self._repeat(shard, downlink, out)
        rate = self._rate(shard, lr)
        # Where everyone runs the rule its rounds are counted by version, for all must agree;
        # otherwise those that move something are.
        counts = self._rounds if self._is_mean else self._moves
        self._apply.advance(shard, counts[shard] + 1, rate)
        self._rounds[shard] += 1
        self._moves[shard] += 1
        if self._is_fused(said):
            kernels.active().server_step(self._server_step(shard, said, downlink, out))
        else:
            residual = self._residual_for(shard, rate)
            with np.errstate(over="ignore", invalid="ignore"):  # as in the kernels
                change = self._change(shard, said, stepped, downlink, residual, out)
                self._move(shard, change, stepped, downlink, residual, out)
        return self._answer(downlink, out, lr)

    def full(self, shard: int) -> Full:
        """A shard's weights as a worker without any needs them: what the others now hold.

        "delta" and "mean": views of the vectors themselves, in parts, to be sent before the next
        `step`; "weights": the last broadcast, made again.
        """
        vectors, codec = self._vectors, self._codecs.downlink(shard, max(1, self._rounds[shard]))
        if self._recipe.downlink.kind == "weights":
            payload = np.empty(codec.nbytes, np.uint8)
            codec.encode(self._x_of(shard), payload, seed=self._stream(shard))
            return Full(codec.codec.wire_id, (payload,))
        planes = [vectors.x, *(self._apply.state_arrays().values() if self._is_mean else ())]
        parts = [part for plane in planes for part in vectors.parts(plane, shard)]
        return Full(get_codec("fp32").wire_id, tuple(part.view(np.uint8) for part in parts))

    def state_arrays(self) -> dict[str, Floats]:
        """x, the rules' vectors and the residual, f32[numel] by name, not copied."""
        aggregate = self._aggregate.state_arrays()
        return self._state | {f"aggregate.{name}": array for name, array in aggregate.items()}

    def counts(self) -> dict[int, tuple[int, int, float]]:
        """Of each shard: its rounds, those that moved it, and the rate its residual is in, or 0.

        With `state_arrays` and `memory` it is the whole state.
        """
        return {
            shard: (self._rounds[shard], self._moves[shard], self._rates.get(shard, 0.0))
            for shard in self._rounds
        }

    @property
    def vectors(self) -> Vectors:
        """How the weights, and every vector as long as they, are cut and named."""
        return self._vectors

    def resume(self, counts: Mapping[int, tuple[int, int, float]]) -> None:
        """Take the counts of a saved state, whose arrays were copied into `state_arrays`."""
        self._vectors.fill()
        self._rounds = {shard: each[0] for shard, each in counts.items()}
        self._moves = {shard: each[1] for shard, each in counts.items()}
        self._rates = {shard: each[2] for shard, each in counts.items() if each[2]}

    def memory(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """What the rules keep beside their vectors: arrays that do not change any more, facts."""
        arrays: dict[str, NDArray[Any]] = {}
        facts: dict[str, Any] = {}
        for slot, rule in self._rules():
            made, facts[slot] = rule.memory()
            arrays |= {f"{slot}{MEMORY}{name}": array for name, array in made.items()}
        return arrays, facts

    def remember(self, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
        """Take what `memory` gave."""
        for slot, rule in self._rules():
            start = slot + MEMORY
            mine = {n.removeprefix(start): a for n, a in arrays.items() if n.startswith(start)}
            rule.remember(mine, facts[slot])

    def _rules(self) -> tuple[tuple[str, AggregateRule | ApplyRule], ...]:
        return (("aggregate", self._aggregate), ("apply", self._apply))

    # ---- how a shard moves

    def _rate(self, shard: int, lr: float | None) -> float:
        """The rate of a shard in this round.

        Raises:
            UsageError: there is none, and the apply needs one.
        """
        if lr is None and not isinstance(self._apply, Add):
            msg = f"the server's {self._recipe.apply.kind} needs a learning rate"
            raise UsageError(msg)
        return (lr or 0.0) * self._plan.rate_of(shard)

    def _residual_for(self, shard: int, rate: float) -> Floats | None:
        """The residual that a round of this rate meets, if it takes part.

        Where rates are outside the message, what waits keeps what it is worth when they change; at
        a rate of 0, or next to it, it goes on waiting, for what is said then is worth nothing.
        """
        residual = self._residual_of(shard)
        if residual is None or not self._is_linear:
            return residual
        before = self._rates.get(shard, rate)
        if is_worth_nothing(rate, before):
            return None
        self._rates[shard] = rate
        if before != rate:
            np.multiply(residual, np.float32(before / rate), out=residual)
        return residual

    def _is_fused(self, said: Sequence[Pushed]) -> bool:
        """Whether the kernel can do this round."""
        if not (self._is_kernels and said):
            return False
        first = said[0].codec
        return all([one.codec == first and one.weight == 1 for one in said])  # noqa: C419 - faster

    def _server_step(
        self,
        shard: int,
        said: Sequence[Pushed],
        downlink: ShardCodec,
        out: Bytes,
    ) -> ServerStep:
        cut, of = self._vectors.shards[shard], self._vectors.of
        vectors = {name: of(array, shard) for name, array in self._state.items()}
        return ServerStep(
            uplink=self._codecs.uplink(shard, said[0].codec).codec.format,
            downlink=downlink.codec.format,
            segments=[segment.numel for segment in cut.segments],
            payloads=[one.payload for one in said],
            scratch=self._scratch,
            answer=out,
            delta=self._recipe.downlink.kind == "delta",
            starts=downlink.starts(self._stream(shard)),
            adam=None if self._adams is None else self._adams.coefficients(shard),
            **vectors,
        )

    def _change(  # noqa: PLR0913, PLR0917 - all that a change may come of
        self,
        shard: int,
        said: Sequence[Pushed],
        stepped: Floats | None,
        downlink: ShardCodec,
        residual: Floats | None,
        out: Bytes,
    ) -> Floats:
        """What the weights are to lose; where a mean goes down, it is said on the way."""
        x, change = self._x_of(shard), self._scratch[: self._vectors.shards[shard].numel]
        if stepped is not None:
            return np.subtract(x, stepped, out=change)
        self._combine(shard, said, change)
        if self._is_mean:
            self._encode(shard, change, downlink, residual, out)
            downlink.decode(out, change)
        self._apply.write(shard, change, x)
        return change

    def _move(  # noqa: PLR0913, PLR0917 - as `_change`
        self,
        shard: int,
        change: Floats,
        stepped: Floats | None,
        downlink: ShardCodec,
        residual: Floats | None,
        out: Bytes,
    ) -> None:
        """Move the weights, and say it where that is not done."""
        x, kind = self._x_of(shard), self._recipe.downlink.kind
        if kind == "delta":
            np.negative(change, out=change)
            self._encode(shard, change, downlink, residual, out)
            downlink.decode_add(out, x)
            return
        if stepped is None:
            np.subtract(x, change, out=x)
        else:
            x[:] = stepped
        if kind == "weights":
            downlink.encode(x, out, seed=self._stream(shard))
        else:
            self._change_units(shard)

    def _combine(self, shard: int, said: Sequence[Pushed], out: Floats) -> None:
        """Write the aggregate to out."""
        messages = [
            Said(
                p.rank, self._codecs.uplink(shard, p.codec), p.payload, float(p.weight), p.staleness
            )
            for p in said
        ]
        self._aggregate.combine(shard, messages, out)
        if self._apply.counts_absent:
            share = len(messages) / self._plan.world_size
            np.multiply(out, np.float32(share), out=out)

    def _encode(
        self,
        shard: int,
        values: Floats,
        codec: ShardCodec,
        residual: Floats | None,
        out: Bytes,
    ) -> None:
        """Write an answer, with the residual unless the apply lets it wait."""
        if residual is None or not self._apply.uses_residual(shard, self._rounds[shard]):
            codec.encode(values, out, seed=self._stream(shard))
        else:
            codec.encode_ef(values, residual, out, seed=self._stream(shard))

    def _change_units(self, shard: int) -> None:
        factor, residual = self._apply.rescale(shard), self._residual_of(shard)
        if factor is not None and residual is not None:
            np.multiply(residual, factor, out=residual)

    def _repeat(self, shard: int, downlink: ShardCodec, out: Bytes) -> Answer:
        """Answer a round in which nobody said anything: the weights again, or no change."""
        x = self._x_of(shard)
        if self._is_mean:
            return Answer("nothing", 0, out)
        if self._recipe.downlink.kind == "weights":
            downlink.encode(x, out, seed=self._stream(shard))
        else:
            downlink.encode(np.full(x.size, NOTHING), out, seed=self._stream(shard))
            downlink.decode_add(out, x)  # as every worker will: of some codecs the answer is +0.0
        return self._answer(downlink, out, 0.0)

    def _answer(self, downlink: ShardCodec, out: Bytes, lr: float | None) -> Answer:
        rate = float(lr or 0.0) if self._is_mean else 0.0
        return Answer(self._recipe.downlink.kind, downlink.codec.wire_id, out, rate)

    # ---- codecs and vectors

    def _next_codec(self, shard: int) -> ShardCodec:
        """What the next answer is written in."""
        return self._codecs.downlink(shard, self._rounds[shard] + 1)

    def _x_of(self, shard: int) -> Floats:
        return self._vectors.of(self._vectors.x, shard)

    def _residual_of(self, shard: int) -> Floats | None:
        return None if self._residual is None else self._vectors.of(self._residual, shard)

    def _stream(self, shard: int) -> int:
        return stream_seed(self._seed, SERVER_RANK, self._rounds[shard], shard)

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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from psq import kernels
from psq.codec import ShardCodec, get_codec
from psq.errors import RemotePayloadError, UsageError
from psq.kernels import Buffer, Floats, ServerStep
from psq.layout import PART_NUMEL, Layout, Shard, part_count
from psq.plan import Plan
from psq.rules import Judgement, Said, is_linear, make_aggregate, make_apply, make_choice
from psq.rules.applies import AdamStep, Add
from psq.seeds import SERVER_RANK, stream_seed
from psq_server.slices import slice_name
from psq_server.state import Pushed
from psq_server.view import View

__all__ = ["Answer", "Full", "Reducer"]

NOTHING: Final = np.float32(-0.0)  # unlike +0.0 it changes no bit of what it is added to
Bytes: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Full:
    """A shard's whole weights, for a worker that has none: bodies in the codec `wire_id`.

    First the parts of the weights, then those of each vector of a rule that all nodes run.
    """

    wire_id: int
    parts: tuple[Bytes, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a round made of a shard, for everybody.

    Attributes:
        kind: as the downlink's; "nothing": a mean of no contributions, which has no body.
        wire_id: the codec of the body; 0 where there is none.
        body: the payload.
        rate: what a mean is to be applied with, the pushes' rate; else 0.
    """

    kind: Literal["weights", "delta", "mean", "nothing"]
    wire_id: int
    body: Bytes
    rate: float = 0.0


def _local(plan: Plan) -> Layout:
    """This server's shards, one behind the other: offsets are in its vectors, not in the job's."""
    shards: list[Shard] = []
    offset = 0
    for shard in plan.owned:
        shards.append(replace(shard, offset=offset))
        offset += shard.numel
    return replace(plan.layout, shards=tuple(shards), owners=(plan.server,) * len(shards))


class Reducer:
    """A job's weights, as far as this server has them, and the optimizer that moves them.

    Args:
        plan: the job.
        seed: the job's; only a stochastic downlink codec uses it.

    Raises:
        ConfigError: the recipe's Adam settings cannot run.
    """

    def __init__(self, plan: Plan, *, seed: int = 0) -> None:
        recipe, local = plan.recipe, _local(plan)
        self._recipe = recipe
        self._plan = plan
        self._layout = local
        self._seed = seed
        self._shards = {shard.index: shard for shard in local.shards}
        self._uplinks = {s.index: _codecs(plan.uplink_codecs(s.index), s) for s in local.shards}
        self._downlinks = {s.index: _codecs(plan.downlink_codecs(s.index), s) for s in local.shards}
        self._choice = None
        if recipe.downlink.choice.kind != "fixed":
            self._choice = make_choice(recipe.downlink, local)
        self._aggregate = make_aggregate(recipe, layout=local, world_size=plan.world_size)
        self._apply = make_apply(recipe, layout=local, world_size=plan.world_size)
        self._is_mean = recipe.downlink.kind == "mean"
        self._adams = self._apply if isinstance(self._apply, AdamStep) else None
        self._is_kernels = (
            recipe.aggregate.kind == "mean"
            and not self._is_mean
            and isinstance(self._apply, Add | AdamStep)
        )
        """Whether the kernel can do a round of pushes that count alike in one codec."""
        self._rounds = dict.fromkeys(self._shards, 0)
        self._moves = dict.fromkeys(self._shards, 0)
        self._missing = {(s.index, p) for s in local.shards for p in range(part_count(s.numel))}
        self._x = np.zeros(local.numel, np.float32)
        self._state: dict[str, Floats] = {"x": self._x, **self._apply.state_arrays()}
        self._residual = None
        if recipe.downlink.kind != "weights" and recipe.downlink.error_feedback:
            self._residual = self._state["residual"] = np.zeros(local.numel, np.float32)
        self._rates: dict[int, float] = {}
        """Of each shard, the rate that its residual was left with, where rates are outside it."""
        self._is_linear = recipe.downlink.kind == "mean" and is_linear(recipe)
        self._stepped: Floats | None = None
        """The next weights of all shards, where the apply takes whole rounds."""
        self._scratch = np.empty(max(shard.numel for shard in local.shards), np.float32)

    @property
    def has_weights(self) -> bool:
        """Whether every part of the initial weights has come."""
        return not self._missing

    def init(self, shard: int, part: int, values: Buffer) -> None:
        """Take part `part` of a shard's initial weights; one that came before is replaced.

        Args:
            shard: its index.
            part: which PART_NUMEL values of it.
            values: f32, as many as the part has.

        Raises:
            RemotePayloadError: no such part, another length, or a value that is not finite.
        """
        cut = self._shards.get(shard)
        if cut is None:
            msg = f"initial weights for shard {shard}, which this server does not have"
            raise RemotePayloadError(msg)
        if not 0 <= part < part_count(cut.numel):
            msg = f"initial weights part {part} of shard {shard}: it has {part_count(cut.numel)}"
            raise RemotePayloadError(msg)
        target = self._of(self._x, cut)[part * PART_NUMEL : (part + 1) * PART_NUMEL]
        raw = np.frombuffer(values, np.uint8)
        if raw.size != target.nbytes:
            msg = (
                f"initial weights part {part} of shard {shard} has {raw.size} bytes, "
                f"the layout says {target.nbytes}"
            )
            raise RemotePayloadError(msg)
        came = raw.view("<f4").astype(np.float32)  # a copy: a frame's body need not be aligned
        if not kernels.all_finite(came):
            msg = f"initial weights part {part} of shard {shard} hold NaN or Inf"
            raise RemotePayloadError(msg)
        target[:] = came
        self._missing.discard((shard, part))

    def check(self, shard: int, payload: Buffer) -> None:
        """Whether a worker's payload, in the usual codec, may be given to `reduce`.

        Raises:
            RemotePayloadError: wrong length, or a scale that is not finite.
        """
        self._uplinks[shard][0].check(payload)

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
        view = View(number + 1, said, codec=self._codec_of, x=self._x_of)
        judged = dict(self._aggregate.judge(view)) if self._aggregate.whole else {}
        if self._apply.whole:
            self._step_whole(view, said, judged, lr)
        return judged

    def reduce(
        self, shard: int, payloads: Sequence[Buffer], lr: float | None, out: Bytes | None = None
    ) -> Bytes:
        """One round of one shard, of payloads in the usual codec that count alike; see `step`.

        Returns:
            The broadcast's body.
        """
        usual = self._uplinks[shard][0].codec.wire_id
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
        if not said and self._stepped is None:
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
                self._compose(shard, said, downlink, residual, out)
        return self._answer(downlink, out, lr)

    def full(self, shard: int) -> Full:
        """A shard's weights as a worker without any needs them: what the others now hold.

        "delta" and "mean": views of the vectors themselves, in parts, to be sent before the next
        `step`; "weights": the last broadcast, made again.
        """
        cut = self._shards[shard]
        if self._recipe.downlink.kind == "weights":
            codec = self._last_codec(shard)
            payload = np.empty(codec.nbytes, np.uint8)
            codec.encode(self._of(self._x, cut), payload, seed=self._stream(shard))
            return Full(codec.codec.wire_id, (payload,))
        planes = [self._x, *(self._apply.state_arrays().values() if self._is_mean else ())]
        starts = range(0, cut.numel, PART_NUMEL)
        parts = tuple(
            self._of(plane, cut)[start : start + PART_NUMEL].view(np.uint8)
            for plane in planes
            for start in starts
        )
        return Full(get_codec("fp32").wire_id, parts)

    def weights(self) -> dict[str, Floats]:
        """The weights by parameter name, shaped; views of x, which in "delta" the workers hold.

        Of a server that shares the job with others: what it has of each parameter, flat, by
        `slice_name`.
        """
        if self._plan.servers > 1:
            return self._slices()
        return {
            tensor.name: self._x[tensor.offset : tensor.offset + tensor.numel].reshape(tensor.shape)
            for tensor in self._layout.tensors
        }

    def _slices(self) -> dict[str, Floats]:
        slices: dict[str, Floats] = {}
        for shard in self._layout.shards:
            x = self._of(self._x, shard)
            for segment in shard.segments:
                name = self._layout.tensors[segment.tensor].name
                stop = segment.offset + segment.numel
                key = slice_name(name, segment.start, segment.start + segment.numel)
                slices[key] = x[segment.offset : stop]
        return slices

    def state_arrays(self) -> dict[str, Floats]:
        """x, the rules' vectors and the residual, f32[numel] by name, not copied."""
        aggregate = self._aggregate.state_arrays()
        return self._state | {f"aggregate.{name}": array for name, array in aggregate.items()}

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
        a rate of 0 it goes on waiting, for what is said then is worth nothing.
        """
        residual = self._residual_of(shard)
        if residual is None or not self._is_linear:
            return residual
        if rate == 0.0:
            return None
        before = self._rates.get(shard, rate)
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
        cut = self._shards[shard]
        vectors = {name: self._of(array, cut) for name, array in self._state.items()}
        return ServerStep(
            uplink=self._codec_of(shard, said[0].codec).codec.format,
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

    def _compose(
        self,
        shard: int,
        said: Sequence[Pushed],
        downlink: ShardCodec,
        residual: Floats | None,
        out: Bytes,
    ) -> None:
        """The same by the recipe's rules, with this residual if it is to take part."""
        cut = self._shards[shard]
        x, change = self._of(self._x, cut), self._scratch[: cut.numel]
        if self._stepped is not None:
            np.subtract(x, self._of(self._stepped, cut), out=change)
        else:
            self._combine(shard, said, change)
        if self._is_mean:
            self._encode(shard, change, downlink, residual, out)
            downlink.decode(out, change)
        if self._stepped is None:
            self._apply.write(shard, change, x)
        if self._recipe.downlink.kind == "delta":
            np.negative(change, out=change)
            self._encode(shard, change, downlink, residual, out)
            downlink.decode_add(out, x)
            return
        self._move(shard, x, change)
        if self._recipe.downlink.kind == "weights":
            downlink.encode(x, out, seed=self._stream(shard))
        else:
            self._change_units(shard)

    def _combine(self, shard: int, said: Sequence[Pushed], out: Floats) -> None:
        """Write the aggregate to out."""
        messages = [
            Said(p.rank, self._codec_of(shard, p.codec), p.payload, float(p.weight), p.staleness)
            for p in said
        ]
        self._aggregate.combine(shard, messages, out)
        if self._apply.counts_absent:
            share = sum(one.weight for one in messages) / self._plan.world_size
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

    def _move(self, shard: int, x: Floats, change: Floats) -> None:
        if self._stepped is None:
            np.subtract(x, change, out=x)
        else:
            x[:] = self._of(self._stepped, self._shards[shard])

    def _change_units(self, shard: int) -> None:
        factor, residual = self._apply.rescale(shard), self._residual_of(shard)
        if factor is not None and residual is not None:
            np.multiply(residual, factor, out=residual)

    def _step_whole(
        self,
        view: View,
        said: Mapping[int, Sequence[Pushed]],
        judged: Mapping[int, Judgement],
        lr: float,
    ) -> None:
        """Let the apply take a whole round: `_stepped` are the weights that come of it."""
        means, self._stepped = np.zeros(self._layout.numel, np.float32), None
        counting = {shard: _counting(pushed, judged) for shard, pushed in said.items()}
        if not any(counting.values()):
            return
        for shard, pushed in counting.items():
            if pushed:
                self._combine(shard, pushed, self._of(means, self._shards[shard]))
        self._stepped = self._x.copy()
        pushed_shards = {index for index in self._shards if self._plan.pushes(index)}
        self._apply.step_whole(
            self._named(means, pushed_shards), self._named(self._stepped), view.number, lr, view
        )

    def _named(self, vector: Floats, only: Collection[int] | None = None) -> dict[str, Floats]:
        """A vector's values by parameter, shaped, not copied; of those shards only."""
        chosen = self._layout.shards if only is None else [self._shards[i] for i in sorted(only)]
        tensors = {segment.tensor for shard in chosen for segment in shard.segments}
        return {
            tensor.name: vector[tensor.offset : tensor.offset + tensor.numel].reshape(tensor.shape)
            for index, tensor in enumerate(self._layout.tensors)
            if index in tensors
        }

    def _repeat(self, shard: int, downlink: ShardCodec, out: Bytes) -> Answer:
        """Answer a round in which nobody said anything: the weights again, or no change."""
        x = self._of(self._x, self._shards[shard])
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
        return self._downlink_at(shard, self._rounds[shard] + 1)

    def _last_codec(self, shard: int) -> ShardCodec:
        return self._downlink_at(shard, max(1, self._rounds[shard]))

    def _downlink_at(self, shard: int, t: int) -> ShardCodec:
        if self._choice is None:
            return self._downlinks[shard][0]
        return self._downlinks[shard][self._choice.choose(shard, t, _no_norm)]

    def _codec_of(self, shard: int, wire_id: int) -> ShardCodec:
        """A shard's uplink codec by its wire id."""
        usual = self._uplinks[shard][0]
        if usual.codec.wire_id == wire_id:
            return usual
        return next(c for c in self._uplinks[shard] if c.codec.wire_id == wire_id)

    def _x_of(self, shard: int) -> Floats:
        return self._of(self._x, self._shards[shard])

    def _residual_of(self, shard: int) -> Floats | None:
        return None if self._residual is None else self._of(self._residual, self._shards[shard])

    def _stream(self, shard: int) -> int:
        return stream_seed(self._seed, SERVER_RANK, self._rounds[shard], shard)

    @staticmethod
    def _of(array: Floats, shard: Shard) -> Floats:
        return array[shard.offset : shard.offset + shard.numel]


def _codecs(specs: Sequence[str], shard: Shard) -> tuple[ShardCodec, ...]:
    return tuple(ShardCodec(get_codec(spec), shard) for spec in specs)


def _counting(said: Sequence[Pushed], judged: Mapping[int, Judgement]) -> list[Pushed]:
    """What counts of a shard's contributions, with the weights that were judged."""
    nothing = Judgement()
    return [
        one._replace(weight=judged[one.rank].weight) if one.rank in judged else one
        for one in said
        if not judged.get(one.rank, nothing).refused
    ]


def _no_norm() -> float:
    msg = "a downlink's choice of codecs decides by the round alone"
    raise UsageError(msg)

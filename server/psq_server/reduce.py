"""The server's arithmetic: a round's payloads in, the weights moved, the answer's payload out.

    g  = mean of the decoded pushes, by ascending rank
    u  = Adam's step on g (apply "adam"), or g itself (apply "add": the learning rate is inside)

    downlink "weights"   x <- x - u;  broadcast C(x)               x is exact, workers see C(x)
    downlink "delta"     z = -u + e;  d = C(z);  e <- z - d;  x <- x + d;  broadcast d

In "delta" x is, byte for byte, what every worker holds, because each adds the same d; what the
codec has not said yet is e, and x + e is where the weights would be without a codec in the way.

All of it is one kernel, `server_step`; this module holds the vectors and says which. State in
bytes: 4 numel (1 for x; 2 for m and v where the server runs Adam, 3 with AMSGrad; 1 for e where the
downlink has error feedback), and 4 times the largest shard of scratch. No torch, no clock, no
socket. The caller guarantees checked payloads (`check`, `check_rate`), and each shard once a round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from psq import kernels
from psq.codec import ShardCodec, get_codec
from psq.errors import RemotePayloadError, UsageError
from psq.feedback import SERVER_RANK, stream_seed
from psq.kernels import AdamCoefficients, Buffer, Floats, ServerStep
from psq.layout import PART_NUMEL, Layout, Shard, part_count
from psq.optim import Adam, per_shard
from psq.plan import Plan
from psq_server.slices import slice_name

__all__ = ["Full", "Reducer"]

NOTHING: Final = np.float32(-0.0)  # unlike +0.0 it changes no bit of what it is added to


@dataclass(frozen=True, slots=True)
class Full:
    """A shard's whole weights, for a worker that has none: bodies in the codec `wire_id`."""

    wire_id: int
    parts: tuple[NDArray[np.uint8], ...]


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
        uplink, downlink = get_codec(recipe.uplink.codec), get_codec(recipe.downlink.codec)
        self._recipe = recipe
        self._layout = local
        self._shares = plan.servers > 1
        self._seed = seed
        self._shards = {shard.index: shard for shard in local.shards}
        self._uplinks = {shard.index: ShardCodec(uplink, shard) for shard in local.shards}
        self._downlinks = {shard.index: ShardCodec(downlink, shard) for shard in local.shards}
        self._rounds = dict.fromkeys(self._shards, 0)
        self._missing = {(s.index, p) for s in local.shards for p in range(part_count(s.numel))}
        self._x = np.zeros(local.numel, np.float32)
        self._state: dict[str, Floats] = {"x": self._x}
        self._residual = None
        if recipe.downlink.kind == "delta" and recipe.downlink.error_feedback:
            self._residual = self._state["residual"] = np.zeros(local.numel, np.float32)
        self._adams: dict[int, Adam] | None = None
        if recipe.apply.adam is not None:
            adams, moments = per_shard(recipe.apply.adam, local)
            self._adams = dict(zip(self._shards, adams, strict=True))
            self._state |= moments
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
        """Whether a worker's payload may be given to `reduce`.

        Raises:
            RemotePayloadError: wrong length, or a scale that is not finite.
        """
        self._uplinks[shard].check(payload)

    def check_rate(self, rate: float) -> None:
        """Whether a learning rate a worker asked for may be given to `reduce`.

        Raises:
            RemotePayloadError: the server's Adam needs one and this is negative or not finite.
        """
        if self._adams is not None and not (math.isfinite(rate) and rate >= 0.0):
            msg = f"the push asks for the learning rate {rate!r}: it must be finite and >= 0"
            raise RemotePayloadError(msg)

    def payload_nbytes(self, shard: int) -> int:
        """Exact bytes of a shard's broadcast."""
        return self._downlinks[shard].nbytes

    def reduce(
        self,
        shard: int,
        payloads: Sequence[Buffer],
        lr: float | None,
        out: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """One round of one shard.

        With no payloads (every worker skipped) nothing moves and no state changes; the answer
        says so: the same weights again, or a delta of zeros.

        Args:
            shard: its index.
            payloads: the contributions by ascending rank, checked.
            lr: learning rate of the server's Adam; ignored where the rate is inside the message.
            out: u8[payload_nbytes(shard)], written; made here when None.

        Returns:
            The broadcast: `out`, or the array made.

        Raises:
            UsageError: the server runs Adam and lr is None, negative or not finite.

        Cost: one pass over x, m, v and the residual; of the payloads and the answer, their bytes.
        """
        if out is None:
            out = np.empty(self.payload_nbytes(shard), np.uint8)
        adam = self._adam_numbers(shard, lr) if payloads else None
        self._rounds[shard] += 1
        if payloads:
            kernels.active().server_step(self._server_step(shard, payloads, adam, out))
        else:
            self._repeat(shard, out)
        return out

    def full(self, shard: int) -> Full:
        """A shard's weights as a worker without any needs them: what the others now hold.

        "delta": views of x itself, in parts, to be sent before the next `reduce`; "weights": the
        last broadcast, made again.
        """
        cut = self._shards[shard]
        x = self._of(self._x, cut)
        if self._recipe.downlink.kind == "weights":
            payload = np.empty(self.payload_nbytes(shard), np.uint8)
            self._downlinks[shard].encode(x, payload, seed=self._stream(shard))
            return Full(get_codec(self._recipe.downlink.codec).wire_id, (payload,))
        starts = range(0, cut.numel, PART_NUMEL)
        parts = tuple(x[start : start + PART_NUMEL].view(np.uint8) for start in starts)
        return Full(get_codec("fp32").wire_id, parts)

    def weights(self) -> dict[str, Floats]:
        """The weights by parameter name, shaped; views of x, which in "delta" the workers hold.

        Of a server that shares the job with others: what it has of each parameter, flat, by
        `slice_name`.
        """
        if self._shares:
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
        """x, moments and residual, f32[numel] by name, not copied."""
        return dict(self._state)

    def _adam_numbers(self, shard: int, lr: float | None) -> AdamCoefficients | None:
        """Begin the next step of a shard's Adam, where the server has one."""
        if self._adams is None:
            return None
        if lr is None:
            msg = "the server's Adam needs a learning rate"
            raise UsageError(msg)
        self._adams[shard].advance(lr)
        return self._adams[shard].coefficients

    def _server_step(
        self,
        shard: int,
        payloads: Sequence[Buffer],
        adam: AdamCoefficients | None,
        out: NDArray[np.uint8],
    ) -> ServerStep:
        cut, downlink = self._shards[shard], self._downlinks[shard]
        vectors = {name: self._of(array, cut) for name, array in self._state.items()}
        return ServerStep(
            uplink=self._uplinks[shard].codec.format,
            downlink=downlink.codec.format,
            segments=[segment.numel for segment in cut.segments],
            payloads=payloads,
            scratch=self._scratch,
            answer=out,
            delta=self._recipe.downlink.kind == "delta",
            starts=downlink.starts(self._stream(shard)),
            adam=adam,
            **vectors,
        )

    def _repeat(self, shard: int, out: NDArray[np.uint8]) -> None:
        """Answer a round in which nobody said anything: the weights again, or no change."""
        codec, x = self._downlinks[shard], self._of(self._x, self._shards[shard])
        if self._recipe.downlink.kind == "weights":
            codec.encode(x, out, seed=self._stream(shard))
        else:
            codec.encode(np.full(x.size, NOTHING), out, seed=self._stream(shard))
            codec.decode_add(out, x)  # as every worker will: of some codecs the answer is +0.0

    def _stream(self, shard: int) -> int:
        return stream_seed(self._seed, SERVER_RANK, self._rounds[shard], shard)

    @staticmethod
    def _of(array: Floats, shard: Shard) -> Floats:
        return array[shard.offset : shard.offset + shard.numel]

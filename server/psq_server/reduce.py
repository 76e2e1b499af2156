"""The server's arithmetic: a round's payloads in, the weights moved, the answer's payload out.

    g  = mean of the decoded pushes, by ascending rank
    u  = Adam's step on g (apply "adam"), or g itself (apply "add": the learning rate is inside)

    downlink "weights"   x <- x - u;  broadcast C(x)               x is exact, workers see C(x)
    downlink "delta"     z = -u + e;  d = C(z);  e <- z - d;  x <- x + d;  broadcast d

In "delta" x is, byte for byte, what every worker holds, because each adds the same d; what the
codec has not said yet is e, and x + e is where the weights would be without a codec in the way.

State in bytes: 4 numel (1 for x; 2 for m and v where the server runs Adam, 3 with AMSGrad; 1 for e
where the downlink has error feedback), and 4 times the largest shard of scratch. No torch, no
clock, no socket. The caller guarantees checked payloads (`check`, `check_rate`), and each shard
once a round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from psq import kernels
from psq.aggregate import mean
from psq.codec import ShardCodec, get_codec
from psq.errors import RemotePayloadError, UsageError
from psq.feedback import SERVER_RANK, stream_seed
from psq.kernels import Buffer, Floats
from psq.layout import PART_NUMEL, Shard, part_count
from psq.optim import per_shard
from psq.plan import Plan

__all__ = ["Full", "Reducer"]

PIECE_NUMEL: Final = 1 << 15  # Adam and the weights go together in pieces whose vectors stay in L2


@dataclass(frozen=True, slots=True)
class Full:
    """A shard's whole weights, for a worker that has none: bodies in the codec `wire_id`."""

    wire_id: int
    parts: tuple[NDArray[np.uint8], ...]


class Reducer:
    """All of a job's weights on this server, and the optimizer that moves them.

    Args:
        plan: the job.
        seed: the job's; only a stochastic downlink codec uses it.

    Raises:
        ConfigError: the recipe's Adam settings cannot run.
    """

    def __init__(self, plan: Plan, *, seed: int = 0) -> None:
        recipe, layout = plan.recipe, plan.layout
        uplink, downlink = get_codec(recipe.uplink.codec), get_codec(recipe.downlink.codec)
        self._recipe = recipe
        self._layout = layout
        self._seed = seed
        self._uplinks = [ShardCodec(uplink, shard) for shard in layout.shards]
        self._downlinks = [ShardCodec(downlink, shard) for shard in layout.shards]
        self._rounds = [0] * len(layout.shards)
        self._missing = {(s.index, p) for s in layout.shards for p in range(part_count(s.numel))}
        self._x = np.zeros(layout.numel, np.float32)
        self._state: dict[str, Floats] = {"x": self._x}
        self._residual = None
        if recipe.downlink.kind == "delta" and recipe.downlink.error_feedback:
            self._residual = self._state["residual"] = np.zeros(layout.numel, np.float32)
        self._adams = None
        if recipe.apply.adam is not None:
            self._adams, moments = per_shard(recipe.apply.adam, layout)
            self._state |= moments
        self._scratch = np.empty(max(shard.numel for shard in layout.shards), np.float32)

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
        if not 0 <= shard < len(self._layout.shards):
            msg = f"initial weights for shard {shard}: there are {len(self._layout.shards)}"
            raise RemotePayloadError(msg)
        cut = self._layout.shards[shard]
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

        Cost: one pass over scratch per payload, one over x, m and v, one to encode.
        """
        if out is None:
            out = np.empty(self.payload_nbytes(shard), np.uint8)
        change = self._scratch[: self._layout.shards[shard].numel]
        if payloads:
            mean(self._uplinks[shard], payloads, change)
            self._direction(shard, change, lr)
        else:
            change.fill(0.0)
        self._rounds[shard] += 1
        if self._recipe.downlink.kind == "weights":
            self._answer_weights(shard, change, out)
        else:
            self._answer_delta(shard, change, out, moved=bool(payloads))
        return out

    def full(self, shard: int) -> Full:
        """A shard's weights as a worker without any needs them: what the others now hold.

        "delta": views of x itself, in parts, to be sent before the next `reduce`; "weights": the
        last broadcast, made again.
        """
        cut = self._layout.shards[shard]
        x = self._of(self._x, cut)
        if self._recipe.downlink.kind == "weights":
            payload = np.empty(self.payload_nbytes(shard), np.uint8)
            self._downlinks[shard].encode(x, payload, seed=self._stream(shard))
            return Full(get_codec(self._recipe.downlink.codec).wire_id, (payload,))
        starts = range(0, cut.numel, PART_NUMEL)
        parts = tuple(x[start : start + PART_NUMEL].view(np.uint8) for start in starts)
        return Full(get_codec("fp32").wire_id, parts)

    def weights(self) -> dict[str, Floats]:
        """The weights by parameter name, shaped; views of x, which in "delta" the workers hold."""
        return {
            tensor.name: self._x[tensor.offset : tensor.offset + tensor.numel].reshape(tensor.shape)
            for tensor in self._layout.tensors
        }

    @property
    def rounds(self) -> int:
        """Rounds the first shard has seen; between rounds all shards have the same number."""
        return self._rounds[0]

    def state_arrays(self) -> dict[str, Floats]:
        """x, moments and residual, f32[numel] by name, not copied."""
        return dict(self._state)

    def _direction(self, shard: int, change: Floats, lr: float | None) -> None:
        """Turn the mean message in `change` into u, in place."""
        if self._adams is None:
            return
        if lr is None:
            msg = "the server's Adam needs a learning rate"
            raise UsageError(msg)
        adam, x = self._adams[shard], self._of(self._x, self._layout.shards[shard])
        adam.advance(lr)
        for start in range(0, change.size, PIECE_NUMEL):
            piece = slice(start, start + PIECE_NUMEL)
            adam.write(change[piece], change[piece], start=start, x=x[piece])

    def _answer_weights(self, shard: int, change: Floats, out: NDArray[np.uint8]) -> None:
        x = self._of(self._x, self._layout.shards[shard])
        np.subtract(x, change, out=x)
        self._downlinks[shard].encode(x, out, seed=self._stream(shard))

    def _answer_delta(
        self, shard: int, change: Floats, out: NDArray[np.uint8], *, moved: bool
    ) -> None:
        cut, codec, seed = self._layout.shards[shard], self._downlinks[shard], self._stream(shard)
        if self._residual is not None and moved:
            np.negative(change, out=change)
            codec.encode_ef(change, self._of(self._residual, cut), out, seed=seed)
        else:
            np.negative(change, out=change)
            codec.encode(change, out, seed=seed)
        codec.decode_add(out, self._of(self._x, cut))

    def _stream(self, shard: int) -> int:
        return stream_seed(self._seed, SERVER_RANK, self._rounds[shard], shard)

    @staticmethod
    def _of(array: Floats, shard: Shard) -> Floats:
        return array[shard.offset : shard.offset + shard.numel]

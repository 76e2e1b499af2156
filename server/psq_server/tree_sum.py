"""An aggregator's arithmetic: the messages of its children in, one message for its parent out.

    W  = sum of the weights w_i of those that said something      (a leaf's is 1, or what it asks)
    g  = sum of w_i decode(d_i), by ascending rank, times 1/W
    e  <- e W_before / W                                           where W has changed
    d  = C(g + e) ;  e <- g + e - d ;  push d with weight W

C is the codec that the children used; the residual e is the aggregator's own, whether the recipe's
workers have one or not: a message that is coded a second time loses something a second time, and
here nothing is to be lost. What the parent does not take comes back by `restore`. So for each
shard, in units of sums (a mean times its weight), and up to float32 rounding:

    sum of the children's messages that were written
        == sum of W decode(d) that the parent applied  +  W e

and over a whole tree: what the leaves said and were told "applied" == what the root applied + the
residuals of all aggregators. Each term is counted once: a child's message is in g exactly if its
verdict says so, and a message of the aggregator is either applied above or back in e.

State: 4 bytes a parameter, which hold the initial weights on their way up before they hold e. There
is no other vector as long as the model or a shard: all passes go piece by piece (`tree_pieces`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from psq.codec import ShardCodec
from psq.errors import RemotePayloadError
from psq.kernels import Buffer, Floats
from psq.plan import Plan
from psq.rules import Said
from psq.seeds import stream_seed
from psq_proto.messages import U32_MAX
from psq_server.tree_pieces import SegmentPayload, cuts, segment_payloads

__all__ = ["PartialSum"]

AGGREGATOR_RANK: Final = 0x8000_0000
"""Added to its rank: an aggregator's place in `stream_seed`; no worker has it, nor the server."""
_SEED_STRIDE: Final = 0x9E3779B97F4A7C15  # odd: the pieces' seeds differ


@dataclass(slots=True)
class _Standing:
    """What a shard's residual is in units of, and how many messages were made of the shard."""

    weight: int = 0
    rate: float = 0.0
    messages: int = 0


class PartialSum:
    """The residual of an aggregator, and what makes one message of several.

    Args:
        plan: the job, as the aggregator's server sees it.
        rank: as which the aggregator speaks above.
        seed: the job's; only stochastic codecs use it.
        rescales: the learning rate is outside the message: e <- e rate_before / rate, where the
            rate has changed, as the workers do with theirs.
    """

    def __init__(self, plan: Plan, rank: int, *, seed: int = 0, rescales: bool = False) -> None:
        self._seed = seed
        self._rank = AGGREGATOR_RANK + rank
        self._rescales = rescales
        self._vectors: dict[int, Floats] = {}
        vector = np.zeros(sum(shard.numel for shard in plan.owned), np.float32)
        start = 0
        for shard in plan.owned:
            self._vectors[shard.index] = vector[start : start + shard.numel]
            start += shard.numel
        self._standings = {index: _Standing() for index in self._vectors}
        self._sum = self._part = np.empty(0, np.float32)

    def vector(self, shard: int) -> Floats:
        """A shard's f32[numel]: its initial weights up to `begin`, then its residual."""
        return self._vectors[shard]

    def begin(self) -> None:
        """The initial weights are where they belong: from now on the vector is the residual."""
        for vector in self._vectors.values():
            vector.fill(0.0)

    def weight(self, shard: int) -> int:
        """Of a shard's last message: the residual is in units of the mean of so much."""
        return self._standings[shard].weight

    def write(
        self, shard: int, said: Sequence[Said], rate: float, codec: ShardCodec, payload: Buffer
    ) -> int:
        """Make one message of several; the residual takes what it leaves out.

        Args:
            shard: its index.
            said: one or more, checked, by ascending rank.
            rate: the round's learning rate.
            codec: of the message.
            payload: u8[codec.nbytes], written.

        Returns:
            The message's weight.

        Raises:
            RemotePayloadError: the weights add up to more than a message can bear.

        Cost: a decode of each payload, one pass over the residual.
        """
        weight = sum(int(one.weight) for one in said)
        if weight > U32_MAX:
            msg = f"the weights of shard {shard} add up to {weight}, the limit is {U32_MAX}"
            raise RemotePayloadError(msg)
        residual, seed = self._prepare(shard, weight, rate)
        received = [segment_payloads(one.codec, one.payload) for one in said]
        weights = [one.weight for one in said]
        out = segment_payloads(codec, payload)
        for index, segment in enumerate(codec.shard.segments):
            theirs = [payloads[index] for payloads in received]
            for at in cuts(codec.codec, segment.numel):
                mean = self._mean(theirs, weights, at)
                start = segment.offset + at.start
                left = residual[start : start + mean.size]
                out[index].encode(at, mean, left, seed=seed)
                seed += _SEED_STRIDE
        return weight

    def restore(self, shard: int, codec: ShardCodec, payload: Buffer) -> bool:
        """Take a message back that the parent did not apply: residual += what it says.

        One that no server would take would come again and again: it is given up, and the shard's
        residual, of which it has left nothing but rounding errors, starts from zero.

        Returns:
            Whether the residual was kept.
        """
        residual = self._vectors[shard]
        if not codec.is_bounded(payload):
            residual.fill(0.0)
            return False
        codec.decode_add(payload, residual)
        return True

    def forget(self, shard: int) -> None:
        """Let a shard's residual start from zero."""
        self._vectors[shard].fill(0.0)

    def _prepare(self, shard: int, weight: int, rate: float) -> tuple[Floats, int]:
        """Put the residual into this message's units; returns it, and the message's seed."""
        standing, residual = self._standings[shard], self._vectors[shard]
        factor = standing.weight / weight if standing.weight else 1.0
        if self._rescales and standing.rate > 0.0 and rate > 0.0:
            factor *= standing.rate / rate
        if factor != 1.0:
            np.multiply(residual, np.float32(factor), out=residual)
        seed = stream_seed(self._seed, self._rank, standing.messages, shard)
        standing.weight = weight
        standing.rate = rate if rate > 0.0 else standing.rate
        standing.messages += 1
        return residual, seed

    def _mean(
        self, received: Sequence[SegmentPayload], weights: Sequence[float], at: slice
    ) -> Floats:
        """The weighted mean of one piece; with weights of 1 the bits of the server's own mean."""
        numel = at.stop - at.start
        if self._sum.size < numel:
            self._sum, self._part = np.empty(numel, np.float32), np.empty(numel, np.float32)
        total, part = self._sum[:numel], self._part[:numel]
        for index, (payload, weight) in enumerate(zip(received, weights, strict=True)):
            if weight == 1.0:
                payload.decode(at, total, add=index > 0)
                continue
            payload.decode(at, part, add=False)
            np.multiply(part, np.float32(weight), out=part)
            if index:
                np.add(total, part, out=total)
            else:
                total[:] = part
        np.multiply(total, np.float32(1.0 / sum(weights)), out=total)
        return total

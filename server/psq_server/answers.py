"""What a server says of a shard, and in which codecs shards are spoken of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from psq.codec import ShardCodec, get_codec
from psq.errors import UsageError
from psq.layout import Layout, Shard
from psq.plan import Plan
from psq.rules import make_choice

__all__ = ["Answer", "Bytes", "Codecs", "Full"]

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


class Codecs:
    """The codecs of a server's shards, both ways.

    Args:
        plan: the job.
        layout: the shards.
    """

    def __init__(self, plan: Plan, layout: Layout) -> None:
        shards = layout.shards
        self._uplinks = {s.index: _codecs(plan.uplink_codecs(s.index), s) for s in shards}
        self._downlinks = {s.index: _codecs(plan.downlink_codecs(s.index), s) for s in shards}
        self._choice = None
        if plan.recipe.downlink.choice.kind != "fixed":
            self._choice = make_choice(plan.recipe.downlink, layout)

    def usual(self, shard: int) -> ShardCodec:
        """What pushes of a shard are written in, if nothing else is said."""
        return self._uplinks[shard][0]

    def uplink(self, shard: int, wire_id: int) -> ShardCodec:
        """What a push of a shard is written in, by its wire id; the plan has it."""
        usual = self._uplinks[shard][0]
        if usual.codec.wire_id == wire_id:
            return usual
        return next(c for c in self._uplinks[shard] if c.codec.wire_id == wire_id)

    def downlink(self, shard: int, t: int) -> ShardCodec:
        """What the answer of a shard's round t, from 1, is written in."""
        if self._choice is None:
            return self._downlinks[shard][0]
        return self._downlinks[shard][self._choice.choose(shard, t, _no_norm)]


def _codecs(specs: Sequence[str], shard: Shard) -> tuple[ShardCodec, ...]:
    return tuple(ShardCodec(get_codec(spec), shard) for spec in specs)


def _no_norm() -> float:
    msg = "a downlink's choice of codecs decides by the round alone"
    raise UsageError(msg)

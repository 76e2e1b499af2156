"""Weights that come: payloads -> the replica, one shard at a time.

    DELTA   x <- x + decode(payload)
    FULL    x <- decode(payload), or f32 in parts; then the planes of the state that replicas share
    MEAN    m = decode(payload);  x <- x - apply(m)        the recipe's rule, here as on the server

The rule sees the same values, state, rate and round everywhere, and computes in f32 in the same
order, so replicas are equal to the bit. With the apply "return" there is no rule here: m goes to
whoever takes the steps (`Averaging`).

What comes was judged by `ReplicaVersions`: it fits the plan, and the version it is to be applied
to. Never here: which frame may be applied, and when.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

import numpy as np

from psq.codec import ShardCodec, get_codec
from psq.errors import GaveUpError
from psq.kernels import Floats
from psq.layout import PART_NUMEL, Shard, part_count
from psq.plan import Plan
from psq.rules import ApplyRule, make_apply
from psq_proto.frames import Header
from psq_proto.messages import Flags

__all__ = ["Decoder", "Replica", "TakeMean"]

_SKIP: Final = int(Flags.SKIP)
_DELTA: Final = int(Flags.DELTA)
_MEAN: Final = int(Flags.MEAN)
RETURN: Final = "return"

TakeMean = Callable[[Shard, Floats | None], None]


class Replica(Protocol):
    """Where a worker's weights lie."""

    def weights(self, shard: int) -> list[Floats]:
        """f32[segment.numel] per segment of a shard; written."""

    def write_part(self, shard: int, part: int, values: Floats) -> None:
        """Set the shard's values [part * PART_NUMEL, ...) to these."""


class Decoder:
    """See the module's docstring.

    Memory: with the downlink "mean" the rule's state, and two shards of scratch.

    Args:
        plan: the job.
        replica: where weights go.
        take_mean: with the apply "return": takes a shard's mean, None for a mean of nothing.

    Attributes:
        rule: what a mean is applied with, if there is one here.

    Raises:
        ConfigError: the recipe's rule cannot run.
    """

    def __init__(self, plan: Plan, replica: Replica, take_mean: TakeMean | None = None) -> None:
        self._plan = plan
        self._replica = replica
        self._take_mean = take_mean
        self._shards = plan.layout.shards
        self._codecs = [_codecs(plan, shard) for shard in self._shards]
        self._dense = get_codec("fp32")
        self.rule: ApplyRule | None = None
        recipe = plan.recipe
        if recipe.downlink.kind == "mean":
            if recipe.apply.kind != RETURN:
                self.rule = make_apply(recipe, layout=plan.layout, world_size=plan.world_size)
            largest = max(shard.numel for shard in self._shards)
            self._change, self._x = (np.empty(largest, np.float32) for _ in range(2))

    @property
    def shared(self) -> Mapping[str, Floats]:
        """The state that all replicas have alike, f32[layout.numel] by name, not copied."""
        return self.rule.state_arrays() if self.rule is not None else {}

    @property
    def planes(self) -> int:
        """How many vectors full weights are."""
        return 1 + len(self.shared)

    def payload_bytes(self, shard: int) -> int:
        """The length of a shard's answer in the usual codec."""
        return next(iter(self._codecs[shard].values())).nbytes

    def decode(self, header: Header, body: memoryview) -> Floats | None:
        """Take one frame in.

        Returns:
            What the shard's residual is to be multiplied by, f32[shard.numel]; None for nothing.

        Raises:
            RemotePayloadError: a payload that says NaN or Inf.
            GaveUpError: whole weights, which a server that averages only does not have.
        """
        flags, shard = int(header.flags), header.shard
        if flags & _MEAN:
            return self._step(header, body)
        if flags & _DELTA:
            codec = self._codecs[shard][header.codec]
            codec.check(body)
            codec.decode_add_segments(body, self._replica.weights(shard))
            return None
        self._check_has_weights(header)
        if header.codec == self._dense.wire_id:
            return self._write_part(shard, header.part, body)
        codec = self._codecs[shard][header.codec]
        codec.check(body)
        codec.decode_segments(body, self._replica.weights(shard))
        return None

    def _write_part(self, shard: int, number: int, body: memoryview) -> Floats | None:
        """Dense values: of the weights, or of a plane of the rule's state."""
        self._dense.check(body, body.nbytes // 4)
        values = np.frombuffer(body, "<f4").astype(np.float32, copy=False)
        plane, part = divmod(number, part_count(self._shards[shard].numel))
        if plane == 0:
            self._replica.write_part(shard, part, values)
            return None
        assert self.rule is not None  # noqa: S101 - else there is one plane
        name = list(self.shared)[plane - 1]
        state = self.rule.of(name, shard)
        start = part * PART_NUMEL
        target, factor = state[start : start + values.size], None
        if name == self.rule.units:  # rounds were missed that a residual has to follow
            factor = np.ones(state.size, np.float32)
            np.divide(target, values, out=factor[start : start + values.size], where=target > 0.0)
        target[:] = values
        return factor

    def _step(self, header: Header, body: memoryview) -> Floats | None:
        """A mean came: take the step that every replica takes."""
        shard = self._shards[header.shard]
        change = self._decoded(header, body, shard)
        if self._take_mean is not None:
            self._take_mean(shard, change)
        if change is None or self.rule is None:
            return None
        plan, rule, x = self._plan, self.rule, self._x[: shard.numel]
        lr = header.rate * plan.rate_of(shard.index)
        rule.advance(shard.index, plan.turns(shard.index, header.version), lr)
        segments = self._replica.weights(shard.index)
        np.concatenate(segments, out=x)
        rule.write(shard.index, change, x)
        for segment, values in zip(shard.segments, segments, strict=True):
            part = slice(segment.offset, segment.offset + segment.numel)
            np.subtract(values, change[part], out=values)
        return rule.rescale(shard.index)

    def _decoded(self, header: Header, body: memoryview, shard: Shard) -> Floats | None:
        if int(header.flags) & _SKIP:
            return None
        codec, change = self._codecs[shard.index][header.codec], self._change[: shard.numel]
        codec.check(body)
        codec.decode(body, change)
        return change

    def _check_has_weights(self, header: Header) -> None:
        if self._take_mean is None or header.version == 0:
            return
        msg = (
            f"recipe {self._plan.recipe.name!r}: the job is {header.version} rounds on, and its "
            "weights are where the workers' own optimizers have moved them, not in the server: a "
            "worker cannot come late, nor go on after a mean was lost; start the job again"
        )
        raise GaveUpError(msg)


def _codecs(plan: Plan, shard: Shard) -> dict[int, ShardCodec]:
    """A shard's, by their names on the wire, the usual one first."""
    codecs = [get_codec(spec) for spec in plan.downlink_codecs(shard.index)]
    return {codec.wire_id: ShardCodec(codec, shard) for codec in codecs}

"""The job: what the plan fixes for every message, so that payloads can be judged unread.

Judging is all that happens here. A payload that passes has the codec, the length and the kind of
scales that the plan says, so the reducer, which runs compiled code over it, need not look again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, cast

from psq.clock import parse_consistency
from psq.codec import get_codec
from psq.codec.shard import ShardCodec
from psq.errors import RemotePayloadError, RemotePlanError
from psq.kernels import Family
from psq.layout import PART_NUMEL, Shard, part_count
from psq.parts import load_rule
from psq.plan import Plan
from psq.rules import AggregateRule, ApplyRule
from psq_proto.frames import Header

__all__ = ["SERVER_BYTES_PER_VALUE", "Job", "check_fits"]

FLOAT_BYTES: Final = 4
MAX_NAMED_SHARDS: Final = 8
SERVER_BYTES_PER_VALUE: Final = 16  # x, m, v and the downlink's residual, each f32; at least


def check_fits(plan: Plan, memory_bytes: int | None, disk_bytes: int | None = None) -> None:
    """Refuse a plan whose weights and moments this machine cannot hold, or cannot save in the end.

    Raises:
        RemotePlanError: it needs more than `memory_bytes`, or its weights more than `disk_bytes`.
    """
    numel = sum(shard.numel for shard in plan.owned)
    needed_bytes = numel * _bytes_per_value(plan)
    if memory_bytes is not None and needed_bytes > memory_bytes:
        msg = (
            f"a model of {numel} values takes {needed_bytes / 2**30:.1f} GiB on the server, "
            f"which has {memory_bytes / 2**30:.1f} GiB: train a smaller one or use a larger machine"
        )
        raise RemotePlanError(msg)
    if disk_bytes is not None and numel * FLOAT_BYTES > disk_bytes:
        msg = (
            f"the weights of {numel} values take {numel * FLOAT_BYTES} bytes, and the server's "
            f"disk had {disk_bytes} left to --save them: make room there and restart the server"
        )
        raise RemotePlanError(msg)


def _bytes_per_value(plan: Plan) -> int:
    """What a server keeps for each value: x, a residual, and the vectors of the recipe's rules."""
    apply, aggregate = plan.recipe.apply.part, plan.recipe.aggregate.part
    vectors = 2 + 2 * apply.whole  # the next weights and the means of a server step
    vectors += len(cast("type[ApplyRule]", load_rule(apply)).state_names)
    combines = cast("type[AggregateRule]", load_rule(aggregate))
    vectors += len(combines.state_names) + combines.copies(plan.world_size)
    return max(SERVER_BYTES_PER_VALUE, FLOAT_BYTES * vectors)


class Job:
    """A plan and everything derived from it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.world_size = plan.world_size
        self.shards = {shard.index: shard for shard in plan.owned}
        self.consistency = parse_consistency(plan.consistency)
        self.judges = plan.recipe.whole
        self.is_whole = self.judges or not self.consistency.eager
        self.keeps_weights = plan.recipe.apply.part.keeps_weights
        self._codecs = {index: _codecs(plan, shard) for index, shard in self.shards.items()}
        self._dense = get_codec("fp32")
        largest = (max(c.nbytes for c in codecs.values()) for codecs in self._codecs.values())
        self.staged_bytes_limit = self.world_size * sum(largest)

    def check_push(self, header: Header, payload: memoryview) -> None:
        """Refuse a payload for one of `shards` that is not what the plan says.

        Raises:
            RemotePayloadError: its codec, length or scales are wrong, or it says more than a mean
                or a moment could hold.
        """
        codecs = self._codecs[header.shard]
        codec = codecs.get(header.codec)
        if codec is None:
            known = " or ".join(f"{wire:#06x} ({c.codec.spec})" for wire, c in codecs.items())
            msg = f"expected codec {known} by the plan, got {header.codec:#06x}"
            raise RemotePayloadError(msg)
        _check_length(payload, codec.nbytes)
        says_all_in_scales = codec.codec.format.family != Family.TOPK  # it has places as well
        if says_all_in_scales and codec.is_bounded(payload):
            return
        codec.check(payload)
        codec.check_bound(payload)

    def check_init(self, header: Header, values: memoryview) -> None:
        """Refuse a part of the initial weights that is not what the plan says.

        Raises:
            RemotePayloadError: the part does not exist, or is too long, too short or not finite.
        """
        self.check_shard(header.shard)
        numel, parts = self.shards[header.shard].numel, part_count(self.shards[header.shard].numel)
        if header.part >= parts:
            msg = f"expected part 0..{parts - 1} by the plan, got part {header.part}"
            raise RemotePayloadError(msg)
        part_numel = min(PART_NUMEL, numel - header.part * PART_NUMEL)
        _check_length(values, part_numel * FLOAT_BYTES)
        self._dense.check(values, part_numel)

    def check_shard(self, index: int) -> None:
        """Refuse a shard that this server does not hold.

        Raises:
            RemotePayloadError: it is another server's, or nobody's.
        """
        if index not in self.shards:
            held = ", ".join(map(str, list(self.shards)[:MAX_NAMED_SHARDS]))
            more = ", ..." if len(self.shards) > MAX_NAMED_SHARDS else ""
            msg = f"expected one of shards {held}{more} by the plan, got shard {index}"
            raise RemotePayloadError(msg)

    def owed(self, shards: Iterable[int]) -> tuple[int, ...]:
        """Those of these shards that workers push; the others are the server's own."""
        return tuple(shard for shard in shards if self.plan.pushes(shard))

    @property
    def init_parts(self) -> int:
        """How many INIT frames make the whole initial weights."""
        return sum(part_count(shard.numel) for shard in self.shards.values())


def _codecs(plan: Plan, shard: Shard) -> dict[int, ShardCodec]:
    """What a shard's pushes may be written in, by wire id."""
    made = [ShardCodec(get_codec(spec), shard) for spec in plan.uplink_codecs(shard.index)]
    return {codec.codec.wire_id: codec for codec in made}


def _check_length(payload: memoryview, expected_bytes: int) -> None:
    if payload.nbytes != expected_bytes:
        msg = f"expected {expected_bytes} bytes by the plan, got {payload.nbytes}"
        raise RemotePayloadError(msg)

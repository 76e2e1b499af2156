"""The job: what the plan fixes for every message, so that payloads can be judged unread.

Judging is all that happens here. A payload that passes has the codec, the length and the kind of
scales that the plan says, so the reducer, which runs compiled code over it, need not look again.
"""

from __future__ import annotations

import math
from typing import Final

from psq.codec import get_codec
from psq.codec.shard import ShardCodec
from psq.errors import RemotePayloadError, RemotePlanError
from psq.layout import PART_NUMEL, part_count
from psq.plan import Plan
from psq_proto.frames import Header

__all__ = ["SERVER_BYTES_PER_VALUE", "Job", "check_fits"]

FLOAT_BYTES: Final = 4
SERVER_BYTES_PER_VALUE: Final = 16  # x, m, v and the downlink's residual, each f32


def check_fits(plan: Plan, memory_bytes: int | None, disk_bytes: int | None = None) -> None:
    """Refuse a plan whose weights and moments this machine cannot hold, or cannot save in the end.

    Raises:
        RemotePlanError: it needs more than `memory_bytes`, or its weights more than `disk_bytes`.
    """
    numel = sum(math.prod(shape) for _, shape in plan.tensors)
    needed_bytes = numel * SERVER_BYTES_PER_VALUE
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


class Job:
    """A plan and everything derived from it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.world_size = plan.world_size
        self.shards = plan.layout.shards
        uplink = get_codec(plan.recipe.uplink.codec)
        self._uplink_id = uplink.wire_id
        self._uplink_spec = uplink.spec
        self._codecs = [ShardCodec(uplink, shard) for shard in self.shards]
        self._dense = get_codec("fp32")
        self.staged_bytes_limit = self.world_size * sum(codec.nbytes for codec in self._codecs)

    def check_push(self, header: Header, payload: memoryview) -> None:
        """Refuse a pushed shard that is not what the plan says.

        Raises:
            RemotePayloadError: the shard does not exist, its codec, length or scales are wrong, or
                it says more than a mean or a moment could hold.
        """
        self._check_index("shard", header.shard, len(self.shards))
        if header.codec != self._uplink_id:
            msg = (
                f"expected codec {self._uplink_id:#06x} ({self._uplink_spec}) by the plan, "
                f"got {header.codec:#06x}"
            )
            raise RemotePayloadError(msg)
        codec = self._codecs[header.shard]
        _check_length(payload, codec.nbytes)
        codec.check(payload)
        codec.check_bound(payload)

    def check_init(self, header: Header, values: memoryview) -> None:
        """Refuse a part of the initial weights that is not what the plan says.

        Raises:
            RemotePayloadError: the part does not exist, or is too long, too short or not finite.
        """
        self._check_index("shard", header.shard, len(self.shards))
        numel = self.shards[header.shard].numel
        self._check_index("part", header.part, part_count(numel))
        part_numel = min(PART_NUMEL, numel - header.part * PART_NUMEL)
        _check_length(values, part_numel * FLOAT_BYTES)
        self._dense.check(values, part_numel)

    @staticmethod
    def _check_index(what: str, index: int, count: int) -> None:
        if index >= count:
            msg = f"expected {what} 0..{count - 1} by the plan, got {what} {index}"
            raise RemotePayloadError(msg)

    @property
    def init_parts(self) -> int:
        """How many INIT frames make the whole initial weights."""
        return sum(part_count(shard.numel) for shard in self.shards)


def _check_length(payload: memoryview, expected_bytes: int) -> None:
    if payload.nbytes != expected_bytes:
        msg = f"expected {expected_bytes} bytes by the plan, got {payload.nbytes}"
        raise RemotePayloadError(msg)

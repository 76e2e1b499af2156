"""Which version of the weights each shard of a replica has, and which WEIGHTS frame may be applied.

A delta applied twice, or to the wrong version, is a wrong weight for ever. So every frame is judged
here before a byte of it is decoded: apply it, or leave it because the shard has it already. Pure
bookkeeping: no I/O, no arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

from psq.codec import get_codec
from psq.errors import RemotePayloadError
from psq.layout import PART_NUMEL, part_count
from psq.plan import Plan
from psq_proto.frames import Header
from psq_proto.messages import NONE, Flags

__all__ = ["ReplicaVersions"]


class ReplicaVersions:
    """The version of every shard, NONE (-1) before its first weights."""

    def __init__(self, plan: Plan) -> None:
        self._numels = [shard.numel for shard in plan.layout.shards]
        self._versions = [NONE] * len(self._numels)
        self._parts: dict[int, tuple[int, set[int]]] = {}
        downlink = plan.recipe.downlink
        self._kind = downlink.kind
        self._codec = get_codec(downlink.codec)
        self._dense_id = get_codec("fp32").wire_id
        self._sizes = [
            sum(self._codec.nbytes(segment.numel) for segment in shard.segments)
            for shard in plan.layout.shards
        ]

    @property
    def version(self) -> int:
        """The version that every shard has reached."""
        return min(self._versions)

    @property
    def versions(self) -> Sequence[int]:
        """The version of each shard."""
        return tuple(self._versions)

    def wants(self, header: Header, body_bytes: int) -> bool:
        """Whether this WEIGHTS frame is to be applied.

        False for what the shard has already, and for a delta whose base it does not have (a pull
        brings that shard in full).

        Raises:
            RemotePayloadError: the frame does not fit the plan: shard, part, codec or length.
        """
        self._check(header, body_bytes)
        have = self._versions[header.shard]
        if Flags.DELTA in header.flags:
            return have != NONE and header.version == have + 1
        version, parts = self._parts.get(header.shard, (NONE, set()))
        if version == header.version:
            return header.part not in parts
        return header.version > max(have, version)

    def took(self, header: Header) -> None:
        """Note that this frame, which `wants` allowed, is in the weights now."""
        if not self._is_dense(header):
            self._versions[header.shard] = header.version
            return
        version, parts = self._parts.get(header.shard, (NONE, set()))
        if version != header.version:
            parts = set()
        parts.add(header.part)
        self._parts[header.shard] = (header.version, parts)
        self._versions[header.shard] = NONE  # half of one version and half of another is neither
        if len(parts) == part_count(self._numels[header.shard]):
            del self._parts[header.shard]
            self._versions[header.shard] = header.version

    def _is_dense(self, header: Header) -> bool:
        return Flags.FULL in header.flags and header.codec == self._dense_id

    def _check(self, header: Header, body_bytes: int) -> None:
        if header.shard >= len(self._numels):
            msg = f"weights of shard {header.shard} came, the plan has {len(self._numels)} shards"
            raise RemotePayloadError(msg)
        delta = Flags.DELTA in header.flags
        allowed = {self._codec.wire_id} if delta == (self._kind == "delta") else set()
        if not delta:
            allowed.add(self._dense_id)
        if header.codec not in allowed:
            kind = "a delta" if delta else "weights"
            msg = (
                f"shard {header.shard} came as {kind} in codec {header.codec:#06x}, "
                f"the recipe says {self._kind} in {self._codec.spec}"
            )
            raise RemotePayloadError(msg)
        expected = self._expected_bytes(header)
        if body_bytes != expected:
            msg = (
                f"shard {header.shard} part {header.part} came with {body_bytes} bytes, "
                f"the plan says {expected}"
            )
            raise RemotePayloadError(msg)

    def _expected_bytes(self, header: Header) -> int:
        if not self._is_dense(header):
            return self._sizes[header.shard] if header.part == 0 else 0
        return 4 * max(0, min(PART_NUMEL, self._numels[header.shard] - header.part * PART_NUMEL))

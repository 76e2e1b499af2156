"""Which version of the weights each shard of a replica has, and which WEIGHTS frame may be applied.

A delta applied twice, or to the wrong version, is a wrong weight for ever, and so is a mean. So
every frame is judged here before a byte of it is decoded: apply it, or leave it because the shard
has it already. Shards move one by one: between two rounds some are a version ahead of others. A
shard that is not due in every round (`Plan.due_after`) has the same weights in several versions,
and is counted as having the last of these. Pure bookkeeping: no I/O, no arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from psq.codec import get_codec
from psq.errors import RemotePayloadError
from psq.layout import PART_NUMEL, Shard, part_count
from psq.plan import Plan
from psq_proto.frames import Header
from psq_proto.messages import NONE, Flags

__all__ = ["ReplicaVersions"]

_SKIP: Final = int(Flags.SKIP)
_MEAN: Final = int(Flags.MEAN)
_ADDED: Final = int(Flags.DELTA | Flags.MEAN)  # onto the version before
_KINDS: Final = {0: "weights", int(Flags.DELTA): "a delta", _MEAN: "a mean"}


class ReplicaVersions:
    """The version of every shard that a server owns, NONE (-1) before its first weights.

    Args:
        plan: the job, as that server sees it.
        planes: how many vectors full weights are (see `Hooks`).
    """

    def __init__(self, plan: Plan, planes: int = 1) -> None:
        self._plan = plan
        self._planes = planes
        self._numels = {shard.index: shard.numel for shard in plan.owned}
        self._versions = dict.fromkeys(self._numels, NONE)
        self._lowest, self._at_lowest = NONE, len(self._versions)
        self._parts: dict[int, tuple[int, set[int]]] = {}
        self._kind = plan.recipe.downlink.kind
        self._dense_id = get_codec("fp32").wire_id
        # By shard and codec on the wire: the length of a payload.
        self._sizes = {shard.index: _sizes(plan, shard) for shard in plan.owned}

    @property
    def version(self) -> int:
        """The version that every shard has reached."""
        return self._lowest

    @property
    def versions(self) -> dict[int, int]:
        """The version of each shard."""
        return dict(self._versions)

    def take_up(self, versions: Mapping[int, int]) -> None:
        """Begin with these shards at these versions: somebody has put their weights in place."""
        for shard, version in versions.items():
            self._versions[shard] = version
        self._lowest = min(self._versions.values())
        self._at_lowest = list(self._versions.values()).count(self._lowest)

    def wants(self, header: Header, body_bytes: int) -> bool:
        """Whether this WEIGHTS frame is to be applied.

        False for what the shard has already, and for a delta whose base it does not have (a pull
        brings that shard in full).

        Raises:
            RemotePayloadError: the frame does not fit the plan: shard, part, codec or length.
        """
        self._check(header, body_bytes)
        have = self._versions[header.shard]
        if int(header.flags) & _ADDED:
            return have != NONE and header.version == have + 1
        version, parts = self._parts.get(header.shard, (NONE, ()))
        if version == header.version:
            return header.part not in parts
        return header.version > max(have, version)

    def misses(self, header: Header) -> bool:
        """Whether this frame, which is not wanted, shows that one before it was lost."""
        have = self._versions[header.shard]
        return bool(int(header.flags) & _ADDED) and have != NONE and header.version > have + 1

    def took(self, header: Header) -> None:
        """Note that this frame, which `wants` allowed, is in the weights now."""
        shard = header.shard
        if not self._is_dense(header):
            self._parts.pop(shard, None)
            self._set(shard, header.version)
            return
        version, parts = self._parts.get(shard, (NONE, set()))
        if version != header.version:
            parts = set()
        parts.add(header.part)
        if len(parts) == self._planes * part_count(self._numels[shard]):
            self._parts.pop(shard, None)
            self._set(shard, header.version)
        else:
            self._parts[shard] = (header.version, parts)
            self._set(shard, NONE)  # half of one version and half of another is neither

    def forget_above(self, version: int) -> list[int]:
        """Have no weights of shards that are of a later version; returns which, ascending.

        Of one that some parts of a later version came of, these are forgotten too.
        """
        ahead = [
            shard
            for shard, have in self._versions.items()
            if have > self._plan.due_after(shard, version)
        ]
        halves = [shard for shard, (of, _) in self._parts.items() if of > version]
        for shard in {*ahead, *halves}:
            self._parts.pop(shard, None)
            self._set(shard, NONE)
        return sorted({*ahead, *halves})

    def _set(self, shard: int, version: int) -> None:
        """Keep the lowest version at hand: it is asked for far more often than it changes."""
        if version != NONE:
            version = self._plan.due_after(shard, version)
        before, self._versions[shard] = self._versions[shard], version
        if before == version:
            return
        if version < self._lowest:
            self._lowest, self._at_lowest = version, 1
            return
        self._at_lowest += (version == self._lowest) - (before == self._lowest)
        if not self._at_lowest:
            versions: Sequence[int] = tuple(self._versions.values())
            self._lowest = min(versions)
            self._at_lowest = versions.count(self._lowest)

    def _is_dense(self, header: Header) -> bool:
        return not int(header.flags) & _ADDED and header.codec == self._dense_id

    def _check(self, header: Header, body_bytes: int) -> None:
        if header.shard not in self._numels:
            raise RemotePayloadError(self._foreign(header.shard))
        if not self._fits(header):
            kind = _KINDS[int(header.flags) & _ADDED]
            codecs = " or ".join(self._plan.downlink_codecs(header.shard))
            msg = (
                f"shard {header.shard} came as {kind} in codec {header.codec:#06x}, "
                f"the recipe says {self._kind} in {codecs}"
            )
            raise RemotePayloadError(msg)
        expected = self._expected_bytes(header)
        if body_bytes != expected:
            msg = (
                f"shard {header.shard} part {header.part} came with {body_bytes} bytes, "
                f"the plan says {expected}"
            )
            raise RemotePayloadError(msg)

    def _foreign(self, shard: int) -> str:
        count = len(self._plan.layout.shards)
        if shard >= count:
            return f"weights of shard {shard} came, the plan has {count} shards"
        owner = self._plan.layout.owners[shard]
        return f"weights of shard {shard} came from server {self._plan.server}, {owner} owns it"

    def _fits(self, header: Header) -> bool:
        """Whether the plan has such an answer: this kind of it, and in this codec."""
        added, coded = int(header.flags) & _ADDED, header.codec in self._sizes[header.shard]
        if not added:
            return header.codec == self._dense_id or (self._kind == "weights" and coded)
        if int(header.flags) & _SKIP:
            return self._kind == "mean"  # a mean of nothing
        return coded and self._kind == ("mean" if added == _MEAN else "delta")

    def _expected_bytes(self, header: Header) -> int:
        if int(header.flags) & _SKIP:
            return 0
        if not self._is_dense(header):
            return self._sizes[header.shard][header.codec] if header.part == 0 else 0
        numel = self._numels[header.shard]
        plane, part = divmod(header.part, part_count(numel))
        if plane >= self._planes:
            return 0
        return 4 * max(0, min(PART_NUMEL, numel - part * PART_NUMEL))


def _sizes(plan: Plan, shard: Shard) -> dict[int, int]:
    codecs = [get_codec(spec) for spec in plan.downlink_codecs(shard.index)]
    return {
        codec.wire_id: sum(codec.nbytes(segment.numel) for segment in shard.segments)
        for codec in codecs
    }

"""The weights of a server's shards, one behind the other, and how they come in and are named.

Offsets are in this server's vectors, not in the job's; shards keep their index in the job. The
rules' vectors and residuals are cut in the same way. Never here: how weights move.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from psq import kernels
from psq.errors import RemotePayloadError
from psq.kernels import Buffer, Floats
from psq.layout import PART_NUMEL, Layout, Shard, part_count
from psq.plan import Plan
from psq_server.slices import slice_name

__all__ = ["Vectors"]


def _local(plan: Plan) -> Layout:
    """This server's shards, one behind the other: offsets are in its vectors, not in the job's."""
    shards: list[Shard] = []
    offset = 0
    for shard in plan.owned:
        shards.append(replace(shard, offset=offset))
        offset += shard.numel
    return replace(plan.layout, shards=tuple(shards), owners=(plan.server,) * len(shards))


class Vectors:
    """A job's weights, as far as this server has them.

    Attributes:
        layout: this server's shards.
        shards: the same by index.
        x: f32[layout.numel].

    Args:
        plan: the job.
    """

    def __init__(self, plan: Plan) -> None:
        self.layout = _local(plan)
        self.shards = {shard.index: shard for shard in self.layout.shards}
        self.x = np.zeros(self.layout.numel, np.float32)
        self._shares = plan.servers > 1
        self._missing = {(i, p) for i, s in self.shards.items() for p in range(part_count(s.numel))}

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
        cut = self.shards.get(shard)
        if cut is None:
            msg = f"initial weights for shard {shard}, which this server does not have"
            raise RemotePayloadError(msg)
        if not 0 <= part < part_count(cut.numel):
            msg = f"initial weights part {part} of shard {shard}: it has {part_count(cut.numel)}"
            raise RemotePayloadError(msg)
        target = self.of(self.x, shard)[part * PART_NUMEL : (part + 1) * PART_NUMEL]
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

    def fill(self) -> None:
        """All initial weights are there: they were copied into x."""
        self._missing.clear()

    def pieces(self) -> dict[str, tuple[tuple[int, ...], list[tuple[int, int, int]]]]:
        """Of each parameter, or slice by its name: its shape, and where its values lie, in order.

        That is (shard, first, last + 1) within the shard.
        """
        named: dict[str, tuple[tuple[int, ...], list[tuple[int, int, int]]]] = {}
        for shard in self.layout.shards:
            for segment in shard.segments:
                tensor = self.layout.tensors[segment.tensor]
                key, shape = tensor.name, tuple(tensor.shape)
                if self._shares:
                    key = slice_name(key, segment.start, segment.start + segment.numel)
                    shape = (segment.numel,)
                named.setdefault(key, (shape, []))[1].append(
                    (shard.index, segment.offset, segment.offset + segment.numel)
                )
        return named

    def of(self, vector: Floats, shard: int) -> Floats:
        """A shard's view of a vector, f32[shard.numel]."""
        cut = self.shards[shard]
        return vector[cut.offset : cut.offset + cut.numel]

    def parts(self, vector: Floats, shard: int) -> list[Floats]:
        """A shard's view of a vector in parts of PART_NUMEL values."""
        mine = self.of(vector, shard)
        return [mine[start : start + PART_NUMEL] for start in range(0, mine.size, PART_NUMEL)]

    def weights(self) -> dict[str, Floats]:
        """The weights by parameter name, shaped; views of x, which in "delta" the workers hold.

        Of a server that shares the job with others: what it has of each parameter, flat, by
        `slice_name`.
        """
        if self._shares:
            return self._slices()
        return self.named(self.x)

    def _slices(self) -> dict[str, Floats]:
        slices: dict[str, Floats] = {}
        for shard in self.layout.shards:
            x = self.of(self.x, shard.index)
            for segment in shard.segments:
                name = self.layout.tensors[segment.tensor].name
                stop = segment.offset + segment.numel
                key = slice_name(name, segment.start, segment.start + segment.numel)
                slices[key] = x[segment.offset : stop]
        return slices

    def named(self, vector: Floats, only: Collection[int] | None = None) -> dict[str, Floats]:
        """A vector's values by parameter, shaped, not copied; of those shards only."""
        chosen = self.layout.shards if only is None else [self.shards[i] for i in sorted(only)]
        tensors = {segment.tensor for shard in chosen for segment in shard.segments}
        return {
            tensor.name: vector[tensor.offset : tensor.offset + tensor.numel].reshape(tensor.shape)
            for index, tensor in enumerate(self.layout.tensors)
            if index in tensors
        }

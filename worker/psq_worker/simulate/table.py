"""A virtual worker's parameters: what `ParameterTable` is to a real one, without a torch model.

Replicas of the same version are the same bytes, so workers share them: one array for each shard and
version that anybody still has, `Replicas`. Whoever takes in a new version first decodes it into a
copy; the others find it there. So W workers hold one or two models, not W. An array goes when its
last holder lets go of it.

Where replicas carry state beside the weights (downlink "mean") each worker has its own.

Invariant: a shared array is never written to. Weights that a worker moves by itself (`local`) are
its own, but only a recipe in which workers do so has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from psq import kernels
from psq.codec import get_codec
from psq.layout import PART_NUMEL, Layout, Shard, part_count
from psq_proto.frames import Header
from psq_proto.messages import Flags

__all__ = ["Replicas", "Table"]

Floats: TypeAlias = NDArray[np.float32]


class Replicas:
    """The weights of every shard and version that some worker has.

    Args:
        initial: f32[numel] of each shard: what everybody starts from.
        shared: whether workers may share them.
    """

    def __init__(self, initial: Sequence[Floats], *, shared: bool) -> None:
        self.initial = tuple(initial)
        self.shared = shared
        self._held: WeakValueDictionary[tuple[int, int], Floats] = WeakValueDictionary()

    def get(self, shard: int, version: int) -> Floats | None:
        """That shard in that version, if anybody has it."""
        return self._held.get((shard, version))

    def put(self, shard: int, version: int, values: Floats) -> None:
        """This is it, from now on never written to."""
        self._held[shard, version] = values


class Table:
    """One worker's weights and gradients.

    Args:
        layout: the cut.
        replicas: shared with the others.
        names: of the tensors, for complaints.
        apart: whether this worker moves weights of its own between two rounds.
    """

    def __init__(self, layout: Layout, replicas: Replicas, *, apart: bool) -> None:
        self._shards = layout.shards
        self._names = [tensor.name for tensor in layout.tensors]
        self._replicas = replicas
        self._apart = apart
        self._own = [not replicas.shared] * len(self._shards)
        whole = None if replicas.shared else np.concatenate(replicas.initial)
        self.flat = list(replicas.initial) if whole is None else _cut(layout, whole)
        """f32[shard.numel] of each shard: the replica."""
        self.whole = whole
        """f32[numel] behind them, where this worker has its own."""
        self.flat_local = [values.copy() for values in self.flat] if apart else self.flat
        """f32[shard.numel] of each shard: what gradients are computed at."""
        self.tensors: list[Floats] = []
        """f32[numel] by tensor: this step's gradients."""
        self._layout = layout
        self._dense = get_codec("fp32").wire_id
        self._parts: dict[int, tuple[int, set[int]]] = {}
        self._gradients: list[list[Floats]] = [[] for _ in self._shards]

    # ---- what the simulation does

    @property
    def is_shared(self) -> bool:
        """Whether the replica's arrays are never written to."""
        return self._replicas.shared and not any(self._own)

    @property
    def is_apart(self) -> bool:
        """Whether gradients are computed at other weights than the replica's."""
        return self._apart

    def take(self, header: Header, decode: Callable[[], None]) -> None:
        """WEIGHTS came for this replica: share them, or decode them into what is its own."""
        shard, version = header.shard, header.version
        if not self._replicas.shared:
            decode()
            return
        found = self._replicas.get(shard, version)
        if found is not None:
            self._bind(shard, found)
            return
        if not self._own[shard]:
            self._bind(shard, self.flat[shard].copy())
            self._own[shard] = True
        decode()
        if self._is_whole(header):
            self._own[shard] = False
            self._replicas.put(shard, version, self.flat[shard])

    def _is_whole(self, header: Header) -> bool:
        """Whether this frame was the last that all of the shard takes."""
        shard, wanted = header.shard, part_count(self._shards[header.shard].numel)
        if header.flags & (Flags.DELTA | Flags.MEAN) or header.codec != self._dense:
            wanted = 1
        version, parts = self._parts.pop(shard, (header.version, set()))
        if version != header.version:
            parts = set()
        parts.add(header.part)
        if len(parts) < wanted:
            self._parts[shard] = (header.version, parts)
        return len(parts) >= wanted

    def _bind(self, shard: int, values: Floats) -> None:
        self.flat[shard] = values
        self._own[shard] = False

    def show_gradients(self, tensors: Sequence[Floats]) -> None:
        """Let this step's gradients be these, f32[numel] by tensor."""
        self.tensors = list(tensors)
        for shard, parts in zip(self._shards, self._gradients, strict=True):
            parts[:] = [tensors[s.tensor][s.start : s.start + s.numel] for s in shard.segments]

    def drop_gradients(self) -> None:
        """Nobody looks at them any more."""
        self.tensors = []
        for parts in self._gradients:
            parts.clear()

    def publish(self) -> None:
        """A round is over: gradients are computed at the replica again."""
        if self._apart:
            for own, values in zip(self.flat_local, self.flat, strict=True):
                own[:] = values

    def named(self) -> dict[str, Floats]:
        """A copy of the replica by tensor name, shaped."""
        named: dict[str, Floats] = {}
        for tensor in self._layout.tensors:
            named[tensor.name] = np.empty(tensor.shape, np.float32)
        rows = [values.reshape(-1) for values in named.values()]
        for shard, values in zip(self._shards, self.flat, strict=True):
            for s in shard.segments:
                part = values[s.offset : s.offset + s.numel]
                rows[s.tensor][s.start : s.start + s.numel] = part
        return named

    # ---- what `psq.torch.exchange` asks of a table

    def weights(self, shard: int) -> list[Floats]:
        """f32[segment.numel] per segment: the replica."""
        return _segments(self._shards[shard], self.flat[shard])

    def local(self, shard: int) -> list[Floats]:
        """f32[segment.numel] per segment: the weights that gradients are computed at."""
        return _segments(self._shards[shard], self.flat_local[shard])

    def gradients(self, shard: int) -> list[Floats]:
        """f32[segment.numel] per segment."""
        return self._gradients[shard]

    def may_clear(self, shard: int) -> bool:
        """Never: gradients are somebody else's memory."""
        del shard
        return False

    def note_cleared(self, shard: int) -> None:
        """Nothing was."""

    def flat_weights(self, shard: int) -> Floats:
        """A copy of a shard's weights, f32[shard.numel]."""
        return self.flat[shard].copy()

    def write_part(self, shard: int, part: int, values: Floats) -> None:
        """Set the shard's values [part * PART_NUMEL, ...) to these."""
        start = part * PART_NUMEL
        self.flat[shard][start : start + values.size] = values

    def not_finite(self, tensors: Iterable[int] | None = None) -> str:
        """The first of these tensors (of all) whose gradient holds NaN or Inf; empty if none."""
        wanted = None if tensors is None else set(tensors)
        for shard, parts in zip(self._shards, self._gradients, strict=True):
            for segment, values in zip(shard.segments, parts, strict=True):
                chosen = wanted is None or segment.tensor in wanted
                if chosen and not kernels.all_finite(values):
                    return self._names[segment.tensor]
        return ""

    def publish_local(self) -> None:
        """The local weights were changed: whoever computes with them reads them anew."""


def _cut(layout: Layout, flat: Floats) -> list[Floats]:
    return [flat[s.offset : s.offset + s.numel] for s in layout.shards]


def _segments(shard: Shard, flat: Floats) -> list[Floats]:
    return [flat[s.offset : s.offset + s.numel] for s in shard.segments]

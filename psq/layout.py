"""How the flat vector of all weights is cut: tensors, segments, shards.

    flat vector  [ conv.weight | conv.bias |     fc.weight     | fc.bias ]
    tensors        0             1           2                   3           an offset each
    segments       0             1           2       | 3         4           a slice of ONE tensor
    shards       [ 0                                 ][ 1                ]   runs of segments

A tensor is never padded in memory and never copied together with another: a codec works segment by
segment, so a scale is never shared between two tensors, and padding exists only inside payloads. A
shard is the unit of everything else: one message each way, one entry in the server's bookkeeping.
Shards are as large as the limits allow, so that there are few; no payload of a shard, in either
direction, may exceed `MAX_PAYLOAD_BYTES`.

The cut is a pure function of names, shapes and payload sizes: every process computes the same one
from the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from psq.errors import ConfigError
from psq_proto.messages import INIT_PART_NUMEL, MAX_PAYLOAD_BYTES

__all__ = [
    "MAX_SHARD_NUMEL",
    "PART_NUMEL",
    "SPLIT_NUMEL",
    "Layout",
    "PayloadSize",
    "Segment",
    "Shard",
    "Tensor",
    "cut",
    "part_count",
]

MAX_SHARD_NUMEL: Final = 1 << 20
SPLIT_NUMEL: Final = (
    8192  # a tensor is split only at multiples of this, the largest block: full blocks stay full
)
PART_NUMEL: Final = INIT_PART_NUMEL  # dense f32 weights travel in parts of this many values

PayloadSize = Callable[[int], int]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One parameter: its name, shape, and where it starts in the flat vector (in values)."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Segment:
    """Values [start, start + numel) of one tensor, at [offset, offset + numel) of the shard."""

    tensor: int
    start: int
    numel: int
    offset: int


@dataclass(frozen=True, slots=True)
class Shard:
    """Values [offset, offset + numel) of the flat vector, as a run of segments."""

    index: int
    offset: int
    numel: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """The whole cut."""

    tensors: tuple[Tensor, ...]
    shards: tuple[Shard, ...]

    @property
    def numel(self) -> int:
        """How many values the model has."""
        return sum(shard.numel for shard in self.shards)


def part_count(numel: int) -> int:
    """How many dense f32 parts a shard of `numel` values takes."""
    return -(-numel // PART_NUMEL)


def cut(specs: Sequence[tuple[str, Sequence[int]]], sizes: Sequence[PayloadSize]) -> Layout:
    """Cut a model into shards.

    Args:
        specs: (name, shape) of each parameter, in the model's order; names are unique, shapes
        positive.
        sizes: payload bytes of a segment as a function of its numel, one per direction.

    Raises:
        ConfigError: no parameters, a doubled name, or an empty tensor.
    """
    tensors = _place(specs)
    shards: list[Shard] = []
    segments: list[Segment] = []
    used = [0] * len(sizes)
    offset = 0

    def close() -> None:
        nonlocal offset
        if segments:
            numel = sum(segment.numel for segment in segments)
            shards.append(Shard(len(shards), offset, numel, tuple(segments)))
            offset += numel
            segments.clear()
            used[:] = [0] * len(sizes)

    for index, tensor in enumerate(tensors):
        start = 0
        while start < tensor.numel:
            filled = segments[-1].offset + segments[-1].numel if segments else 0
            take = _fit(tensor.numel - start, filled, used, sizes)
            if take == 0:
                close()
                continue
            segments.append(Segment(index, start, take, filled))
            used[:] = [u + size(take) for u, size in zip(used, sizes, strict=True)]
            start += take
    close()
    return Layout(tuple(tensors), tuple(shards))


def _place(specs: Sequence[tuple[str, Sequence[int]]]) -> list[Tensor]:
    tensors: list[Tensor] = []
    offset = 0
    seen: set[str] = set()
    for name, shape in specs:
        tensor = Tensor(name, tuple(int(n) for n in shape), offset)
        if name in seen:
            msg = f"two parameters are called {name!r}: names must be unique"
            raise ConfigError(msg)
        if tensor.numel <= 0:
            msg = f"parameter {name!r} of shape {list(tensor.shape)} holds no values: freeze it"
            raise ConfigError(msg)
        seen.add(name)
        tensors.append(tensor)
        offset += tensor.numel
    if not tensors:
        msg = "the model has no trainable parameters: nothing to train"
        raise ConfigError(msg)
    return tensors


def _fit(wanted: int, filled: int, used: Sequence[int], sizes: Sequence[PayloadSize]) -> int:
    """How many of `wanted` values still fit the shard: all, or a multiple of SPLIT_NUMEL."""

    def fits(numel: int) -> bool:
        room = filled + numel <= MAX_SHARD_NUMEL
        return room and all(
            u + size(numel) <= MAX_PAYLOAD_BYTES for u, size in zip(used, sizes, strict=True)
        )

    if fits(wanted):
        return wanted
    low, high = 0, min(wanted, MAX_SHARD_NUMEL) // SPLIT_NUMEL
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * SPLIT_NUMEL) else (low, middle - 1)
    return low * SPLIT_NUMEL

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

Tensors may be of several groups, with codecs or learning rates of their own. A group's tensors lie
together in the flat vector, group 0 first, and no shard holds tensors of two.

Several servers share the shards: each owns some, whole, and so many bytes of payload that no other
owns over 5 % more (MAX_SPREAD). The heaviest shard goes first, to the server with the fewest bytes
so far; that comes out even only with many shards of one size for each server, so the model is cut
at equal distances then, more finely until it is even. A model too small for that gets the most even
cut there is.

The cut is a pure function of names, shapes, groups, payload sizes and the number of servers: every
process computes the same one from the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import Final

from psq.errors import ConfigError
from psq_proto.messages import INIT_PART_NUMEL, MAX_PAYLOAD_BYTES

__all__ = [
    "MAX_SHARDS",
    "MAX_SHARD_NUMEL",
    "MAX_SPREAD",
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
MAX_SHARDS: Final = 65_536
MAX_SPREAD: Final = 1.05
"""The most payload bytes that a server owns, over the fewest that one owns."""
SHARDS_PER_SERVER: Final = 8
"""How many shards each of several servers owns, at least, if the model is large enough."""
MAX_TRIES: Final = 16
"""How many cuts are made, each with one shard more for each server, to find one that is even."""
MAX_TRIED_SHARDS: Final = 4096
"""A model of more is cut once: it comes out even, and a plan is remote input that must not cost."""
SHARDS_PER_TURN: Final = 4
"""How many of a server's shards speak in one step, at least, where shards take turns."""
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
    """Values [offset, offset + numel) of the flat vector, as a run of segments of one group."""

    index: int
    offset: int
    numel: int
    segments: tuple[Segment, ...]
    group: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """The whole cut; `owners[i]` is the server of shard i."""

    tensors: tuple[Tensor, ...]
    shards: tuple[Shard, ...]
    owners: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many values the model has."""
        return sum(shard.numel for shard in self.shards)


def part_count(numel: int) -> int:
    """How many dense f32 parts a shard of `numel` values takes."""
    return -(-numel // PART_NUMEL)


def cut(  # noqa: PLR0913 - all that a cut depends on
    specs: Sequence[tuple[str, Sequence[int]]],
    sizes: Sequence[PayloadSize],
    servers: int = 1,
    every: int = 1,
    *,
    members: Sequence[int] = (),
    others: Sequence[Sequence[PayloadSize]] = (),
) -> Layout:
    """Cut a model into shards, and spread them over servers.

    Args:
        specs: (name, shape) of each parameter, in the model's order; names are unique, shapes
        positive.
        sizes: payload bytes of a segment as a function of its numel, one per direction.
        servers: how many share the shards, 1 or more.
        every: each shard speaks in every `every`-th step, so that many more are needed.
        members: the group of each parameter; empty: all are of group 0.
        others: the sizes of groups 1, 2, ...

    Raises:
        ConfigError: no parameters, a doubled name, an empty tensor, more shards than MAX_SHARDS, or
        fewer than servers.

    Cost: one walk over the segments per cut that is tried, one if there is one server.
    """
    members = members or (0,) * len(specs)
    every_size = (sizes, *others)
    tensors = _place(specs, members)
    total = sum(tensor.numel for tensor in tensors)
    best, best_spread = None, math.inf
    shards: list[Shard] = []
    for aim in _counts_to_try(total, every_size, servers, every):
        shards = _fill(tensors, members, every_size, aim)
        owners, spread = _give_out(shards, every_size, servers)
        if spread < best_spread:
            best, best_spread = Layout(tuple(tensors), tuple(shards), owners), spread
        if spread <= MAX_SPREAD:
            break
    if best is None:
        msg = (
            f"the model makes {len(shards)} shards of {SPLIT_NUMEL} values or so, too few for "
            f"{servers} servers: start {len(shards)} or fewer"
        )
        raise ConfigError(msg)
    return best


def _counts_to_try(
    total: int, sizes: Sequence[Sequence[PayloadSize]], servers: int, every: int
) -> Sequence[int]:
    """How many shards to aim at, fewest first; 1 stands for as few as the limits allow."""
    if servers == every == 1:
        return (1,)
    most = min(_fit(MAX_SHARD_NUMEL, MAX_SHARD_NUMEL, [0] * len(own), own) for own in sizes)
    least = max(SHARDS_PER_SERVER, SHARDS_PER_TURN * every, -(-total // (most * servers)))
    tries = min(MAX_TRIES, max(1, MAX_TRIED_SHARDS // servers + 1 - least))
    return range(least * servers, (least + tries) * servers, servers)


def _fill(
    tensors: Sequence[Tensor],
    members: Sequence[int],
    sizes: Sequence[Sequence[PayloadSize]],
    aim: int,
) -> list[Shard]:
    """Shards filled in the order of the offsets, each up to the next `aim`-th part of the model."""
    total = sum(tensor.numel for tensor in tensors)
    order = _order(members)
    shards: list[Shard] = []
    segments: list[Segment] = []
    group = members[order[0]]
    used = [0] * len(sizes[group])
    offset, end = 0, _end_of_shard(0, total, aim)

    def close() -> None:
        nonlocal offset, end
        numel = segments[-1].offset + segments[-1].numel
        shards.append(Shard(len(shards), offset, numel, tuple(segments), group))
        offset += numel
        end = _end_of_shard(offset, total, aim)
        segments.clear()
        used[:] = [0] * len(used)
        if total > offset + (MAX_SHARDS - len(shards)) * MAX_SHARD_NUMEL:
            msg = f"a model of {total} values makes over {MAX_SHARDS} shards: it is too big"
            raise ConfigError(msg)

    for index in order:
        if members[index] != group:
            close()
            group = members[index]
            used = [0] * len(sizes[group])
        numel, start = tensors[index].numel, 0
        while start < numel:
            filled = segments[-1].offset + segments[-1].numel if segments else 0
            take = _fit(numel - start, end - offset - filled, used, sizes[group])
            if take == 0:
                close()
                continue
            segments.append(Segment(index, start, take, filled))
            used[:] = [u + size(take) for u, size in zip(used, sizes[group], strict=True)]
            start += take
    close()
    return shards


def _order(members: Sequence[int]) -> list[int]:
    """Indexes of the tensors as they lie in the flat vector: group by group."""
    return sorted(range(len(members)), key=lambda index: members[index])


def _end_of_shard(offset: int, total: int, aim: int) -> int:
    """Where a shard that starts at `offset` has to end: room for a split at least, if there is."""
    part = (offset + SPLIT_NUMEL) * aim // total + 1
    end = total if aim == 1 else min(total, part * total // aim)
    return min(end, offset + MAX_SHARD_NUMEL)


def _give_out(
    shards: Sequence[Shard], sizes: Sequence[Sequence[PayloadSize]], servers: int
) -> tuple[tuple[int, ...], float]:
    """The server of each shard, and the most payload bytes of a server over the fewest of one."""
    weights = [
        sum(size(segment.numel) for segment in shard.segments for size in sizes[shard.group])
        for shard in shards
    ]
    loads = [(0, server) for server in range(servers)]  # a heap: the lightest server is on top
    owners = [0] * len(shards)
    for index in sorted(range(len(shards)), key=lambda index: (-weights[index], index)):
        load, server = loads[0]
        heapreplace(loads, (load + weights[index], server))
        owners[index] = server
    fewest, most = min(loads)[0], max(loads)[0]
    return tuple(owners), most / fewest if fewest else math.inf


def _place(specs: Sequence[tuple[str, Sequence[int]]], members: Sequence[int]) -> list[Tensor]:
    """The tensors in the order of specs, with their offsets in the flat vector."""
    if not specs:
        msg = "the model has no trainable parameters: nothing to train"
        raise ConfigError(msg)
    placed: dict[int, Tensor] = {}
    offset = 0
    seen: set[str] = set()
    for index in _order(members):
        name, shape = specs[index]
        tensor = Tensor(name, tuple(int(n) for n in shape), offset)
        if name in seen:
            msg = f"two parameters are called {name!r}: names must be unique"
            raise ConfigError(msg)
        if tensor.numel <= 0:
            msg = f"parameter {name!r} of shape {list(tensor.shape)} holds no values: freeze it"
            raise ConfigError(msg)
        seen.add(name)
        placed[index] = tensor
        offset += tensor.numel
    return [placed[index] for index in range(len(specs))]


def _fit(wanted: int, room: int, used: Sequence[int], sizes: Sequence[PayloadSize]) -> int:
    """How many of `wanted` values still fit the shard: all, or a multiple of SPLIT_NUMEL."""

    def fits(numel: int) -> bool:
        return numel <= room and all(
            u + size(numel) <= MAX_PAYLOAD_BYTES for u, size in zip(used, sizes, strict=True)
        )

    if fits(wanted):
        return wanted
    low, high = 0, min(wanted, room) // SPLIT_NUMEL
    if fits(high * SPLIT_NUMEL):  # mostly, and the search below would find it last
        return high * SPLIT_NUMEL
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * SPLIT_NUMEL) else (low, middle - 1)
    return low * SPLIT_NUMEL

"""When may work go on: the consistency decisions of a job, each a pure function of a few numbers.

Synchronous training is bounded staleness with a bound of zero. A step is made from weights of some
version; with version v = the weights after v rounds, step r (the pushes of round r) is `staleness`
rounds behind. Servers and workers both ask here and nowhere else, so another rule (bounded
staleness, a quorum, elastic membership) changes this module and not the machinery around it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

__all__ = ["closes", "may_step", "members", "reducible", "staleness"]

KeyT = TypeVar("KeyT")


def staleness(step: int, have_version: int) -> int:
    """How many rounds the weights of `have_version` are behind for step `step`."""
    return max(0, step - have_version)


def may_step(step: int, have_version: int, *, max_staleness: int = 0) -> bool:
    """Whether a worker that has these weights may make step `step` (0 = synchronous)."""
    return staleness(step, have_version) <= max_staleness


def members(
    world_size: int, finished: Collection[int], contributed: Collection[int]
) -> tuple[int, ...]:
    """The ranks whose word the open round needs, ascending.

    All that have not finished, and all that have spoken. A rank that left with its work done owes
    nothing more; one that was lost is still owed, and waited for.
    """
    return tuple(rank for rank in range(world_size) if rank not in finished or rank in contributed)


def closes(ranks: Collection[int], contributed: Collection[int]) -> bool:
    """Whether the open round may close: there are members, and each has contributed."""
    return bool(ranks) and all(rank in contributed for rank in ranks)


def reducible(
    ranks: Iterable[int], staged: Mapping[int, Collection[KeyT]], shards: Sequence[KeyT]
) -> tuple[KeyT, ...]:
    """The shards that every one of `ranks` has staged, in the order of `shards`."""
    held = [staged.get(rank, ()) for rank in ranks]
    return tuple(shard for shard in shards if all(shard in owned for owned in held))

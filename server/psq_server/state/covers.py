"""Rounds of replicas: when a shard is covered, who speaks for whom, who is late and what is said.

The rules are in `replicas`; here they meet the open round and the ranks that are there.
"""

from __future__ import annotations

from psq_proto.messages import Join
from psq_server.state.replicas import NOTHING, Replicas
from psq_server.state.round import Contribution, OpenRound
from psq_server.state.world import World

__all__ = [
    "drop_unclaimed",
    "end_round",
    "is_covered",
    "log_cooled",
    "lost_group",
    "missing",
    "owing",
    "speak",
]


def is_covered(world: World, replicas: Replicas, shard: int) -> bool:
    """Whether every group has a word for this shard of the open round.

    The first round waits for all ranks: those of a group begin together, or they differ for ever.
    """
    if world.version == 0 and any(rank not in world.members for rank in world.ranks):
        return False
    return not _uncovered(world, replicas, shard) and bool(world.round.sayers(shard))


def speak(world: World, replicas: Replicas, shard: int) -> tuple[int, ...]:
    """The ranks that speak for the groups; their words stand, and others' are held against them."""
    number, sayers = world.round.number, world.round.sayers(shard)
    speakers: list[int] = []
    for group in range(len(replicas.groups)):
        rank = _spokesman(world, replicas, group, shard)
        if rank is None:
            continue  # all of the group are done
        speakers.append(rank)
        if not replicas.is_warm(rank):
            replicas.promote(rank, number)
            world.counts.resets += 1
            world.log("cold-cover", "warning", rank=rank, group=group, round=number)
        replicas.settle(rank, number, shard, _word(world.round, rank, shard))
    for rank in sayers:
        if rank not in speakers and replicas.is_warm(rank):
            replicas.compare(rank, number, shard, _word(world.round, rank, shard))
    log_cooled(world, replicas)
    return tuple(speakers)


def end_round(replicas: Replicas, closed: OpenRound) -> list[tuple[int, Contribution]]:
    """The contributions that are complete as a round ends; the others are late from now on."""
    complete: list[tuple[int, Contribution]] = []
    for rank, mine in closed.items():
        if mine.said_count == len(closed.owed):
            complete.append((rank, mine))
            replicas.said(rank, closed.number)
        else:
            replicas.late[rank] = mine
    return complete


def drop_unclaimed(world: World, replicas: Replicas, rank: int, join: Join, *, same: bool) -> None:
    """Another process is cold, but before the first round; the same one keeps what is pending."""
    if not same:
        replicas.forget(rank, "another process speaks for it")
        if world.version == 0 and not world.round.closed:
            replicas.warm(rank)
    elif rank in replicas.late and replicas.late[rank].base != join.pending:
        del replicas.late[rank]
    log_cooled(world, replicas)


def missing(world: World, replicas: Replicas, rank: int, limit: int) -> tuple[int, ...]:
    """The first shards that a rank owes of the round that it is at, late or not."""
    mine = replicas.late.get(rank) or world.round.get(rank)
    base = world.round.number if mine is None else mine.base
    owed = world.need_job().plan.pushed_shards(base)
    return tuple(shard for shard in owed if mine is None or not mine.said(shard))[:limit]


def owing(world: World, replicas: Replicas) -> tuple[int, ...]:
    """The ranks of groups that nobody has spoken for yet."""
    groups = {g for shard in world.round.owed for g in _uncovered(world, replicas, shard)}
    return tuple(rank for rank in world.ranks if replicas.group(rank) in groups)


def lost_group(world: World, replicas: Replicas) -> tuple[int, ...]:
    """The ranks of a group of which nobody is there any more, and not all are done; or none."""
    there = world.there
    for group in replicas.groups:
        came = all(rank in world.members for rank in group)
        if came and not there.intersection(group) and not world.finished.intersection(group):
            return group
    return ()


def log_cooled(world: World, replicas: Replicas) -> None:
    """Say who is cold now, and why."""
    while replicas.cooled:
        rank, reason = replicas.cooled.pop()
        world.counts.cold += 1
        world.log("cold", "warning", rank=rank, round=world.round.number, reason=reason)


def _uncovered(world: World, replicas: Replicas, shard: int) -> list[int]:
    if shard in world.round.closed:
        return []
    return [
        group
        for group, ranks in enumerate(replicas.groups)
        if not world.finished.issuperset(ranks)
        and _spokesman(world, replicas, group, shard) is None
    ]


def _spokesman(world: World, replicas: Replicas, group: int, shard: int) -> int | None:
    sayers = world.round.sayers(shard)
    return replicas.spokesman(group, world.round.number, sayers, world.there.union(sayers))


def _word(current: OpenRound, rank: int, shard: int) -> int:
    mine = current.get(rank)
    assert mine is not None, (rank, shard)
    return mine.checksums.get(shard, NOTHING)

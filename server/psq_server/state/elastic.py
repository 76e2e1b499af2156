"""Elastic jobs: which ranks a round goes on without, and when a rank that is lost is given up.

    expected    a place that has not been taken yet, while the job gathers (at most `grace_s`)
    present     joined, and neither lost nor gone: rounds wait for it
    lost        its connection ended RECONNECT_S ago, or nothing was heard of it for a lease;
                then it is evicted
    evicted     rounds go on without it, until it is heard or joins again: then it is present
    gone        it left; its place is free for whoever joins as that rank

With `Settings.min_workers` rounds need the ranks that are present, and so many of them at least;
without, every place is waited for, for ever, by name. An evicted rank's complete contribution
counts in the open round. A partial one is freed: what was reduced of it counts, the rest goes back
into its residual with its verdict, if it comes back. Whoever is lost is given up in `eviction`.

A joiner, or one that comes back, is needed from the open round on; or from the next, where shards
of the open one were reduced without it or its word of it is resolved already.

Pure functions of the `World`. The number of ranks bounds everything.
"""

from __future__ import annotations

from typing import Final

from psq import clock
from psq.clock import BSP
from psq.plan import Plan
from psq_server.state.members import Member
from psq_server.state.world import World

__all__ = [
    "RECONNECT_S",
    "absent",
    "check",
    "due_s",
    "end_gathering",
    "enough",
    "first_round",
    "gather",
    "is_lost",
    "is_nobodys",
    "is_over",
    "missing_words",
    "note_returned",
    "present",
    "refusal",
]

COUNT_HEADS: Final = frozenset({"krum", "trimmed-mean"})
"""Aggregates that refuse a round with fewer than n - f messages: who is absent is one of the f."""
RECONNECT_S: Final = 1.2
"""How long a rank whose connection ended has to come back: a network that hiccups is no death."""


def refusal(plan: Plan, min_workers: int | None) -> str:
    """Why this job cannot run with so few workers, in words; empty if it can."""
    if min_workers is None:
        return ""
    who, aggregate = f"--min-workers {min_workers}", plan.recipe.aggregate
    if min_workers > plan.world_size:
        return f"{who}: the job has {plan.world_size} workers: ask for so many at most"
    if plan.replicas > 1:
        return (
            f"{who}: with aggregate={aggregate.kind} ranks that compute the same stand in for each "
            "other already, and every group of them is needed: start the server without"
        )
    if plan.servers > 1 and plan.consistency != BSP.text:
        return (
            f"{who}: with {plan.servers} servers each finds for itself who is lost, and under "
            f"{plan.consistency} two of them may come to wait for each other: use bsp or one server"
        )
    hostile = int(dict(aggregate.options).get("f", 0))
    if aggregate.kind in COUNT_HEADS and min_workers < plan.world_size - hostile:
        return (
            f"{who}: aggregate={aggregate.kind} with f={hostile} refuses rounds with fewer than "
            f"{plan.world_size - hostile} of {plan.world_size} workers: ask for so many at least"
        )
    return ""


# ---- who is needed


def present(world: World) -> frozenset[int]:
    """The ranks that rounds wait for: joined, and neither gone nor given up."""
    return frozenset(rank for rank, m in world.members.items() if not (m.gone or m.evicted))


def absent(world: World) -> frozenset[int]:
    """The ranks that the open round goes on without, finished ones beside."""
    if not world.is_elastic:
        return frozenset(r for r, member in world.members.items() if _is_told(world, member))
    return frozenset(rank for rank in world.ranks if _is_absent(world, rank))


def is_nobodys(world: World) -> bool:
    """Whether nobody who is there may say anything of the open round any more.

    Data that they held for it went back when they were given up: what they say next is of the next
    round, so this one has to end with nothing.
    """
    said = world.round.complete
    return bool(present(world)) and not clock.members(
        world.ranks, world.finished, said, absent(world)
    )


def _is_told(world: World, member: Member) -> bool:
    """Whether a rank's word of the open round is resolved already."""
    return member.resolved is not None and member.resolved.seq >= world.round.number


def _is_absent(world: World, rank: int) -> bool:
    member = world.members.get(rank)
    if member is None:
        return not _is_awaited(world)
    return member.gone or member.evicted or member.since > world.round.number


def _is_awaited(world: World) -> bool:
    """Whether a place that nobody has taken yet is waited for."""
    return not world.gathered and world.version == 0


def enough(world: World) -> bool:
    """Whether there are so many that rounds may close.

    Who has said all of the open round counts, be it gone since; of those who are done nothing is
    expected any more.
    """
    if world.settings.min_workers is None:
        return True
    there = present(world).union(world.round.complete)
    done = len(world.finished - there)
    return len(there) >= max(1, min(world.settings.min_workers, len(world.ranks) - done))


def missing_words(world: World) -> str:
    """How many workers there are and how many there have to be, in words; empty if enough."""
    if enough(world):
        return ""
    return f"{len(present(world))} there, --min-workers {world.settings.min_workers}"


def first_round(world: World, member: Member) -> int:
    """The first round that needs a rank that joins, or is heard again, now."""
    number = world.round.number
    return number + 1 if world.round.closed or _is_told(world, member) else number


def is_over(world: World) -> bool:
    """Whether the job is done: all ranks are, or some are and nobody else is there or awaited."""
    if not world.finished:
        return False
    if len(world.finished) == len(world.ranks):
        return True
    return world.is_elastic and world.gather_until_s is None and not present(world)


# ---- coming and going


def gather(world: World) -> None:
    """Somebody joined: wait for the others a while, after the start of this server."""
    if world.is_elastic and not world.gathered and world.gather_until_s is None:
        world.gather_until_s = world.now_s + world.settings.grace_s
    end_gathering(world)


def note_returned(world: World, member: Member) -> None:
    """A rank that was given up is heard again."""
    world.changed()
    member.evicted = False
    member.since = first_round(world, member)
    world.progressed()
    world.log("returned", rank=member.rank, needed_from=member.since)


def is_lost(world: World, member: Member) -> bool:
    """Whether a rank that is present has to be given up."""
    if member.gone or member.evicted or not world.gathered:
        return False
    since_s = member.cut_s
    if member.peer is None and since_s is not None and world.now_s - since_s >= RECONNECT_S:
        return True
    return world.now_s - member.seen_s > world.settings.lease_s


def due_s(world: World) -> float | None:
    """When the next rank whose connection ended is lost; None: none is, or rounds wait for all."""
    if not world.is_elastic or not world.gathered:
        return None
    cuts = [
        member.cut_s
        for member in world.members.values()
        if member.cut_s is not None and not (member.gone or member.evicted)
    ]
    return min(cuts) + RECONNECT_S if cuts else None


def end_gathering(world: World) -> None:
    """From now on rounds go on without those that have not come."""
    if world.gathered or world.gather_until_s is None:
        return
    missing = [rank for rank in world.ranks if _is_missing(world, rank)]
    if missing and world.now_s < world.gather_until_s:
        return
    world.gathered, world.gather_until_s = True, None
    if missing:
        world.log(
            "gathered",
            "warning",
            missing=",".join(map(str, missing)),
            grace_s=world.settings.grace_s,
        )


def _is_missing(world: World, rank: int) -> bool:
    """Whether a rank that this server expects has not joined since its start."""
    member = world.members.get(rank)
    if member is None:
        return world.start_version == 0
    return member.incarnation == 0 and not (member.gone or member.evicted)


# ---- invariants


def check(world: World) -> None:
    """What must hold after every event.

    Raises:
        AssertionError: it does not.
    """
    number = world.round.number
    for rank, member in world.members.items():
        assert member.since <= number + 1, (rank, member.since, number)
        assert (member.peer is None) or member.cut_s is None, rank
        if not member.evicted:
            continue
        assert world.is_elastic, f"rank {rank} was given up, and every rank is needed"
        assert not member.gone, rank
        mine = world.round.get(rank)
        if mine is not None and not world.round.is_complete(rank):
            said = len(mine.payloads) + len(mine.nothing) + len(mine.refused)
            assert not said, f"rank {rank} was given up with {said} shards staged"
    assert world.gather_until_s is None or not world.gathered

"""Giving up ranks that are lost, so that rounds go on without them.

When, and what it means to be needed, is decided in `elastic`. What becomes of a rank's word: all of
it counts if it is complete; of a partial one what was reduced counts, and the rest is freed.
"""

from __future__ import annotations

from psq_server.state import drawing, elastic
from psq_server.state.members import Member
from psq_server.state.world import World

__all__ = ["look"]


def look(world: World) -> None:
    """Give up the ranks that are lost."""
    if not world.is_elastic or world.job is None:
        return
    elastic.end_gathering(world)
    for _, member in sorted(world.members.items()):
        if elastic.is_lost(world, member):
            _evict(world, member)


def _evict(world: World, member: Member) -> None:
    """Go on without a rank."""
    rank, staged = member.rank, "complete"
    world.changed()
    world.is_exposed = True
    member.evicted = True
    if rank not in world.round.closing and not world.round.is_complete(rank):
        staged = "partial" if world.round.drop(rank, forget=False) else "nothing"
    drawing.release(world, member, "was given up")
    world.counts.evicted += 1
    world.progressed()
    world.log(
        "evicted",
        "warning",
        rank=rank,
        round=world.round.number,
        staged=staged,
        silent_s=round(world.now_s - member.seen_s, 1),
        connected=int(member.peer is not None),
    )

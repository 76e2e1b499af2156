"""What a replica says of a round, or a shard, that its group has spoken of already.

Nothing of it is reduced. It is held against the group's word, and when all of its round is said,
the verdict is "applied", as its twin's was, and names the version after that round: the replica
goes on from there, one round after the other.
"""

from __future__ import annotations

from typing import Literal

from psq.errors import RemotePayloadError, RemoteProtocolError
from psq_proto.frames import Header
from psq_proto.messages import NO_SHARD, Flags
from psq_proto.session import Message
from psq_server.state.covers import log_cooled
from psq_server.state.members import Member
from psq_server.state.replicas import NOTHING, Replicas
from psq_server.state.round import Contribution
from psq_server.state.rounds import advance, settle
from psq_server.state.world import World

__all__ = ["is_late", "take"]

Outcome = Literal["twin", "duplicate", "rejected"]


def is_late(world: World, replicas: Replicas, member: Member, header: Header) -> bool:
    """Whether a push is of a round that is over and whose words are kept, or of a closed shard."""
    last = member.resolved
    if last is not None and header.seq <= last.seq:
        return False
    if header.seq == world.round.number:
        return header.shard in world.round.closed
    return replicas.knows(header.seq)


def take(world: World, replicas: Replicas, member: Member, message: Message) -> Outcome:
    """Hold a push against the group's word; with the last one of its round comes the verdict.

    Raises:
        RemoteProtocolError: a shard that the round does not move, or that is not pushed.
    """
    header, rank = message.header, member.rank
    plan = world.need_job().plan
    owed = plan.pushed_shards(header.seq)
    if header.shard not in owed and header.shard != NO_SHARD:
        msg = f"rank {rank} shard {header.shard} of round {header.seq}: that round does not move it"
        raise RemoteProtocolError(msg)
    is_open = header.seq == world.round.number
    if is_open:
        mine = world.round.begin(rank, header.seq)
    else:
        mine = replicas.late.setdefault(rank, Contribution(header.seq))
    shards = owed if header.shard == NO_SHARD else (header.shard,)
    outcome: Outcome = "duplicate"
    for shard in shards:
        if not mine.said(shard):
            outcome = _hear(world, replicas, rank, mine, message, shard)
    log_cooled(world, replicas)
    world.progressed()
    if is_open:
        advance(world)
    elif mine.said_count == len(owed):
        replicas.said(rank, header.seq)
        settle(world, member, mine, owed, header.seq + 1)
    return outcome


def _hear(  # noqa: PLR0913, PLR0917 - a word, whose, and of what
    world: World,
    replicas: Replicas,
    rank: int,
    mine: Contribution,
    message: Message,
    shard: int,
) -> Outcome:
    header = message.header
    if header.flags & Flags.SKIP:
        replicas.compare(rank, header.seq, shard, NOTHING)
        mine.nothing.add(shard)
        return "twin"
    assert isinstance(message.body, memoryview)
    try:
        world.need_job().check_push(header, message.body)
    except RemotePayloadError as error:
        replicas.cool(rank, "a shard that it said was refused")
        mine.refused.add(shard)
        mine.reason, mine.kind = mine.reason or str(error), mine.kind or "payload"
        return "rejected"
    replicas.compare(rank, header.seq, shard, header.body_crc)
    mine.checksums[shard] = header.body_crc
    mine.counted.add(shard)
    return "twin"

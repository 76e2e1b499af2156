"""INIT, PUSH, PULL and the commit: how weights come into being, and how rounds become versions.

A push is judged before anything is kept of it. One that does not fit (codec, length, scales, or
other bytes than before) is rejected with its whole contribution: the worker's residual takes it
back, and the worker says SKIP. One that is merely late gets the verdict it already has. One that
shows that the job itself is wrong (another learning rate than the others', a round to come) ends
the conversation.
"""

from __future__ import annotations

from psq import clock
from psq.errors import RemotePayloadError, RemoteProtocolError
from psq_proto.frames import Buffer, Header
from psq_proto.messages import NO_VERSION, ErrorCode, Flags, MessageType, Verdict, clip_text
from psq_proto.session import Message
from psq_server.state.events import Broadcast, Initialize, Reduce, SendFull, ShardReduced
from psq_server.state.job import Job
from psq_server.state.members import Member, Peer
from psq_server.state.round import Contribution, OpenRound
from psq_server.state.world import World

__all__ = [
    "abandon_round",
    "close_if_complete",
    "on_init",
    "on_pull",
    "on_push",
    "on_shard_reduced",
]


# ---- initial weights


def on_init(world: World, peer: Peer, message: Message) -> None:
    """Take one part of the initial weights from rank 0; with the last one there are weights.

    Raises:
        RemoteProtocolError: another rank sent it.
    """
    header, job = message.header, _job(world)
    if header.rank != 0:
        msg = f"rank {header.rank} sent initial weights: only rank 0 gives them"
        raise RemoteProtocolError(msg)
    if world.has_weights or (header.shard, header.part) in world.init_parts:
        return
    assert isinstance(message.body, memoryview)
    try:
        job.check_init(header, message.body)
    except RemotePayloadError as error:
        text = f"rank 0 shard {header.shard} part {header.part} of the initial weights: {error}"
        world.end_conversation(peer, ErrorCode.PAYLOAD, text)
        return
    world.out.append(Initialize(header.shard, header.part, message.body))
    world.init_parts.add((header.shard, header.part))
    world.progressed()
    if len(world.init_parts) == job.init_parts:
        world.has_weights = True
        world.log("weights", version=world.version, numel=job.plan.layout.numel)
        _serve_parked(world)


def _serve_parked(world: World) -> None:
    parked = [m for m in world.members.values() if m.pulling and m.peer is not None]
    for member in parked:
        member.pulling, member.synced = False, True
    if parked:
        peers = tuple(member.peer for member in parked if member.peer is not None)
        world.out.append(SendFull(peers, world.version))


# ---- pull


def on_pull(world: World, peer: Peer, message: Message) -> None:
    """Send what this worker lacks; park it until there are weights."""
    member, have = _member(world, peer), message.header.version
    if not world.has_weights:
        member.pulling = True
        return
    member.synced = True
    if have == world.version:
        return
    if have != NO_VERSION and have > world.version:
        text = (
            f"rank {member.rank} has version {have}, this server is at {world.version}: "
            "the server came back with an older state; start the job again"
        )
        world.end_conversation(peer, ErrorCode.PROTOCOL, text)
        return
    if world.last_frames and (have == world.version - 1 or _replaces(world)):
        world.out.append(Broadcast((peer.name,), world.version, world.last_frames))
    else:
        world.out.append(SendFull((peer.name,), world.version))


def _replaces(world: World) -> bool:
    """Whether a round's WEIGHTS replace the old ones, whatever a worker had."""
    return _job(world).plan.recipe.downlink.kind == "weights"


# ---- push


def on_push(world: World, peer: Peer, message: Message) -> None:
    """Stage one shard of a contribution, or a SKIP; close the round if it was the last missing.

    Raises:
        RemoteProtocolError: a push that cannot belong to this job as it stands.
    """
    header, member = message.header, _member(world, peer)
    if world.has_weights and header.round < world.round.number:
        _answer_late(world, member, header)
        return
    _check_job(world, member, header)
    member.synced = True
    mine = world.round.get(member.rank)
    if header.flags & Flags.SKIP:
        if world.round.is_complete(member.rank):
            _count(world, "duplicate")
            return
        world.round.skip(member.rank)
        _count(world, "skipped")
    else:
        fault = _fault_of_shard(world, mine, message)
        if fault:
            _reject(world, member, header, fault)
            return
        if mine is not None and header.shard in mine.payloads:
            _count(world, "duplicate")
            return
        _stage(world, member, message)
    world.progressed()
    if world.round.is_complete(member.rank):
        close_if_complete(world)


def _answer_late(world: World, member: Member, header: Header) -> None:
    """Say a verdict again: this push belongs to a round that is over."""
    _count(world, "late")
    verdict = Verdict("applied")
    if header.seq > member.last_applied:
        reason = (
            f"rank {member.rank} pushed round {header.round}, which was closed without it: "
            f"this server is at round {world.round.number}"
        )
        verdict = Verdict("rejected", reason)
    _tell_verdict(world, member, verdict, header.seq)


def _check_job(world: World, member: Member, header: Header) -> None:
    """Refuse a push that shows that worker and server are not at one about the job.

    Raises:
        RemoteProtocolError: no weights to push to, a round to come, a seq that is not the round's,
            or a learning rate that differs from another rank's.
    """
    who = f"rank {member.rank} shard {header.shard} of round {header.round}"
    if not world.has_weights:
        msg = f"{who}: there are no weights yet that a push could be made from"
        raise RemoteProtocolError(msg)
    if header.round > world.round.number:
        msg = (
            f"{who}: this server is at round {world.round.number}, so it came back with an older "
            "state; start the job again"
        )
        raise RemoteProtocolError(msg)
    if header.seq != header.round:
        msg = f"{who}: expected seq {header.round} (the round's number), got seq {header.seq}"
        raise RemoteProtocolError(msg)
    if header.flags & Flags.SKIP or world.round.rate is None:
        return
    other, rate = world.round.rate
    if header.rate != rate:
        msg = (
            f"{who}: learning rate {header.rate!r}, but rank {other} pushes with {rate!r}: "
            "all ranks must use the same one in the same step"
        )
        raise RemoteProtocolError(msg)


def _fault_of_shard(world: World, mine: Contribution | None, message: Message) -> str:
    """Why this shard cannot be staged, in words: what was expected, what came; empty if it can."""
    header = message.header
    assert isinstance(message.body, memoryview)
    if mine is not None and mine.skipped:
        return "expected nothing more after SKIP of this round"
    if mine is not None and mine.refused:
        return "expected SKIP, because a shard of this round was refused"
    if mine is not None and mine.checksums.get(header.shard, header.body_crc) != header.body_crc:
        return (
            f"expected the bytes that came before (CRC {mine.checksums[header.shard]:08x}), "
            f"got others (CRC {header.body_crc:08x}): a worker encodes a shard once a round"
        )
    try:
        _job(world).check_push(header, message.body)
    except RemotePayloadError as error:
        return str(error)
    return ""


def _stage(world: World, member: Member, message: Message) -> None:
    header = message.header
    assert isinstance(message.body, memoryview)
    world.round.stage(
        member.rank, header.shard, message.body, checksum=header.body_crc, rate=header.rate
    )
    _count(world, "staged")


def _reject(world: World, member: Member, header: Header, fault: str) -> None:
    """Reject the whole contribution that this shard belongs to."""
    _count(world, "rejected")
    reason = f"rank {member.rank} shard {header.shard} of round {header.round}: {fault}"
    if world.reducing is None and not world.round.is_complete(member.rank):
        world.round.refuse(member.rank)
        world.progressed()
    world.log("rejected", "warning", rank=member.rank, round=header.round, reason=reason)
    _tell_verdict(world, member, Verdict("rejected", clip_text(reason)), header.seq)


def _tell_verdict(world: World, member: Member, verdict: Verdict, seq: int) -> None:
    world.tell(member, MessageType.VERDICT, verdict, seq=seq, round=seq, version=world.version)


def _count(world: World, outcome: str) -> None:
    world.counts.pushes[outcome] += 1


# ---- the round's end


def close_if_complete(world: World) -> None:
    """Close the open round if every member has spoken: ask for its shards to be reduced."""
    if world.reducing is not None or not world.has_weights:
        return
    job, open_round = _job(world), world.round
    ranks = clock.members(job.world_size, world.finished, open_round.complete)
    if not clock.closes(ranks, open_round.complete):
        return
    rate = open_round.rate[1] if open_round.rate else 0.0
    shards = range(len(job.shards))
    world.reducing = dict.fromkeys(shards)
    world.server_s = 0.0
    for shard in clock.reducible(open_round.contributors, open_round.staged, shards):
        world.out.append(Reduce(open_round.number, shard, open_round.payloads(shard), rate))


def on_shard_reduced(world: World, event: ShardReduced) -> None:
    """One shard of the closing round is done; with the last one, the round is committed."""
    reducing = world.reducing
    assert reducing is not None, "nothing is being reduced"
    assert event.round == world.round.number, (event.round, world.round.number)
    assert reducing[event.shard] is None, event.shard
    reducing[event.shard] = event.frame
    world.server_s += event.reduce_s
    frames = tuple(reducing[shard] for shard in range(len(reducing)))
    done = [frame for frame in frames if frame is not None]
    if len(done) == len(frames):
        _commit(world, tuple(done))


def _commit(world: World, frames: tuple[Buffer, ...]) -> None:
    """Version r becomes r + 1: the only place where a verdict "applied" is born."""
    closed = world.round
    world.version += 1
    world.last_frames = frames
    world.reducing = None
    world.round = OpenRound(world.version, closed.shard_count)
    world.counts.rounds += 1
    verdict = Verdict("applied", server_s=world.server_s)
    for rank, contribution in closed.items():
        member = world.members[rank]
        member.last_applied = closed.number
        world.counts.skipped += contribution.skipped
        _tell_verdict(world, member, verdict, closed.number)
    followers = [m.peer for m in world.members.values() if m.synced and m.peer is not None]
    world.out.append(Broadcast(tuple(followers), world.version, frames))
    world.progressed()


def abandon_round(world: World, reason: str) -> None:
    """Reject what the open round holds, so that every push has its verdict."""
    abandoned = world.round
    world.round = OpenRound(abandoned.number, abandoned.shard_count)
    world.reducing = None
    for rank in abandoned.staged:
        _tell_verdict(world, world.members[rank], Verdict("rejected", reason), abandoned.number)


def _member(world: World, peer: Peer) -> Member:
    """The rank of a peer whose session has let a message of a joined worker through."""
    member = world.member_of(peer)
    assert member is not None, peer.session.rank
    return member


def _job(world: World) -> Job:
    assert world.job is not None
    return world.job

"""INIT, PUSH and PULL: how weights come into being, what a push may say, who gets which weights.

A push is judged before anything is kept of it. A shard that does not fit (codec, length, scales, or
other bytes than before), or that was reduced without it, is refused by itself: it is said, with
nothing in it, and the contribution's verdict names it, so that the worker's residual takes it back.
A push of a contribution that has its verdict gets it again. One that shows that the job itself is
wrong (a shard of another server, another learning rate than the others', a version to come) ends
the conversation.
"""

from __future__ import annotations

from psq import clock
from psq.errors import RemotePayloadError, RemoteProtocolError
from psq.rules.blocks import MAX_RATE
from psq_proto.frames import Header
from psq_proto.messages import (
    MAX_LIST_ITEMS,
    NO_SHARD,
    NO_VERSION,
    ErrorCode,
    Flags,
)
from psq_proto.session import Message
from psq_server.state import lateness
from psq_server.state.events import Broadcast, Initialize, Pushed, SendFull, Started
from psq_server.state.members import NO_LINEAGE, Member, Peer
from psq_server.state.round import Contribution
from psq_server.state.rounds import advance, reject_late, repeat_verdict
from psq_server.state.world import World

__all__ = ["on_init", "on_pull", "on_push", "on_weights_above", "serve"]


# ---- initial weights


def on_init(world: World, peer: Peer, message: Message) -> None:
    """Take one part of the initial weights from rank 0; with the last one there are weights.

    Raises:
        RemoteProtocolError: another rank sent it.
    """
    header, job = message.header, world.need_job()
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
        _have_weights(world)


def on_weights_above(world: World) -> None:
    """The server above has weights: those that wait for them may have them."""
    if world.job is not None and not world.has_weights:
        _have_weights(world)


def _have_weights(world: World) -> None:
    world.has_weights = True
    world.progressed()
    world.round.opened_s = world.now_s
    world.note_opened()
    world.log("weights", version=world.version, numel=world.need_job().plan.layout.numel)
    if world.level != "off":
        world.out.append(Started())
    _serve_parked(world)


def _serve_parked(world: World) -> None:
    parked = [m for m in world.members.values() if m.pulling and m.peer is not None]
    for member in parked:
        member.pulling, member.synced = False, True
    if parked:
        peers = tuple(member.peer for member in parked if member.peer is not None)
        world.out.append(SendFull(peers, dict(world.versions)))


# ---- pull


def on_pull(world: World, peer: Peer, message: Message) -> None:
    """Send what this worker lacks; park it until there are weights."""
    member, have = _member(world, peer), message.header.version
    if not world.has_weights:
        member.pulling = True
        return
    if have != NO_VERSION and have > world.version:
        text = (
            f"ROLLBACK: rank {member.rank} has version {have}, this server is at {world.version}: "
            "the server came back with an older state; start the job again"
        )
        world.end_conversation(peer, ErrorCode.PROTOCOL, text)
        return
    if world.collection is not None:
        world.collection.parked[member.rank] = have
        return
    serve(world, member, peer, have)


def serve(world: World, member: Member, peer: Peer, have: int) -> None:
    """Send this worker what it lacks, and all that comes from now on.

    Args:
        world: everything.
        member: the rank.
        peer: who speaks for it.
        have: the version that it has, of every shard at least; NO_VERSION: none.
    """
    member.synced = True
    _send_lacking(world, member, peer, have)


def _send_lacking(world: World, member: Member, peer: Peer, have: int) -> None:
    """Send each shard of which this worker may have an older version than this server.

    One that it lacks the last move of is repeated, for a delta meets what the worker has then.
    """
    plan = world.need_job().plan
    if have == NO_VERSION:
        member.base = world.version
    repeated: dict[int, list[int]] = {}
    whole: dict[int, int] = {}
    for shard, version in world.versions.items():
        if have != NO_VERSION and version <= have:
            continue
        last = have != NO_VERSION and version == plan.due_after(shard, have) + 1
        if shard in world.last_frames and (last or _replaces(world)):
            repeated.setdefault(version, []).append(shard)
        else:
            whole[shard] = version
    for version, shards in repeated.items():
        frames = [(shard, frame) for shard in shards for frame in world.last_frames[shard]]
        news = Broadcast(
            (peer.name,), version, tuple(f for _, f in frames), tuple(k for k, _ in frames)
        )
        world.out.append(news)
    if not world.need_job().keeps_weights and any(whole.values()):
        text = (
            f"rank {member.rank} needs weights, and this server has none: in recipe "
            f"{plan.recipe.name!r} they are the workers' own after the first step; start the job "
            "again from what rank 0 saved"
        )
        world.end_conversation(peer, ErrorCode.REFUSED, text)
    elif whole:
        world.out.append(SendFull((peer.name,), whole))


def _replaces(world: World) -> bool:
    """Whether a round's WEIGHTS replace the old ones, whatever a worker had."""
    return world.need_job().plan.recipe.downlink.kind == "weights"


# ---- push


def on_push(world: World, peer: Peer, message: Message) -> None:
    """Take one shard of a contribution, or a SKIP; reduce what everybody has said.

    Raises:
        RemoteProtocolError: a push that cannot belong to this job as it stands.
    """
    header, member = message.header, _member(world, peer)
    _check_name(world, member, header)
    member.held = False
    if member.rank in world.round.closing:
        _count(world, "duplicate")
        return
    if world.replicas is not None and lateness.is_late(world, world.replicas, member, header):
        outcome = lateness.take(world, world.replicas, member, message)
        _count(world, outcome)
        return
    if _is_over(world, member, header):
        _count(world, "late")
        return
    member.synced = member.synced or header.round == world.version
    if header.flags & Flags.SKIP:
        said = _skip(world, member, header)
    else:
        said = _take(world, member, peer, message)
    if said:
        world.progressed()
        if world.round.is_complete(member.rank):
            world.note_duration(member, header.seq)
        advance(world, said)


def _is_over(world: World, member: Member, header: Header) -> bool:
    """Whether this contribution has, or now gets, its verdict; then it is said."""
    last = member.resolved
    if last is not None and header.seq <= last.seq:
        if header.seq == last.seq:
            repeat_verdict(world, member)
        return True
    if world.round.get(member.rank) is not None:
        return False
    if clock.may_apply(header.seq, world.round.number, world.need_job().consistency):
        return False
    reject_late(world, member, header.seq)
    return True


def _check_name(world: World, member: Member, header: Header) -> None:
    """Refuse a push that shows that worker and server are not at one about the job.

    Raises:
        RemoteProtocolError: no weights to push to, a version to come, or a name that is not it.
    """
    who = _who(member, header)
    if not world.has_weights:
        msg = f"{who}: there are no weights yet that a push could be made from"
        raise RemoteProtocolError(msg)
    if header.round > world.round.number:
        msg = (
            f"ROLLBACK: {who}: this server is at round {world.round.number}, so it came back with "
            "an older state; start the job again"
        )
        raise RemoteProtocolError(msg)
    if header.seq != header.round or header.version != header.round:
        msg = (
            f"{who}: expected seq {header.round} and version {header.round} (the version it was "
            f"computed from names a contribution), got seq {header.seq}, version {header.version}"
        )
        raise RemoteProtocolError(msg)
    begun, last = _begun(world, member), member.resolved
    heard = last is not None and header.seq <= last.seq
    if begun is not None and header.seq != begun.base and not heard:
        msg = f"{who}: expected round {begun.base}, which this rank has begun and not heard of"
        raise RemoteProtocolError(msg)


def _begun(world: World, member: Member) -> Contribution | None:
    """The contribution of which this rank has said something and not heard."""
    late = world.replicas.late.get(member.rank) if world.replicas is not None else None
    return late or world.round.get(member.rank) or world.round.closing.get(member.rank)


def _skip(world: World, member: Member, header: Header) -> tuple[int, ...]:
    """Note that a rank says nothing to a shard, or to the rest; returns what it had not said."""
    every = header.shard == NO_SHARD
    if not every:
        _check_shard(world, member, header)
    shards = world.round.owed if every else (header.shard,)
    mine = world.round.get(member.rank)
    fresh = tuple(shard for shard in shards if mine is None or not mine.said(shard))
    if not fresh:
        _count(world, "duplicate")
        return ()
    world.round.skip(member.rank, header.seq, fresh)
    _count(world, "skipped")
    return fresh


def _take(world: World, member: Member, peer: Peer, message: Message) -> tuple[int, ...]:
    """Stage one shard, or refuse it; returns it if it had not been said."""
    header = message.header
    assert isinstance(message.body, memoryview)
    _check_shard(world, member, header)
    mine = world.round.get(member.rank)
    if mine is not None and _repeats(member, mine, header):
        _count(world, "duplicate")
        return ()
    _check_rate(world, member, header)
    fault = _fault_of_shard(world, mine, message)
    if not fault:
        world.round.stage(
            header.shard,
            Pushed(member.rank, message.body, header.codec, header.part or 1),
            base=header.seq,
            checksum=header.body_crc,
            rate=header.rate,
        )
        _count(world, "staged")
    elif not _refuse(world, member, peer, header, fault):
        return ()
    return (header.shard,)


def _check_shard(world: World, member: Member, header: Header) -> None:
    try:
        world.need_job().check_shard(header.shard)
    except RemotePayloadError as error:
        msg = f"{_who(member, header)}: {error}"
        raise RemoteProtocolError(msg) from error
    if not world.need_job().plan.pushes(header.shard):
        msg = f"{_who(member, header)}: nobody pushes it by the plan, it is the server's own"
        raise RemoteProtocolError(msg)
    due = world.need_job().plan.due_after(header.shard, header.round)
    if due != header.round:
        msg = f"{_who(member, header)}: it is not due before round {due} by the plan"
        raise RemoteProtocolError(msg)


def _repeats(member: Member, mine: Contribution, header: Header) -> bool:
    """Whether this shard's word is known already.

    Raises:
        RemoteProtocolError: other bytes count already.
    """
    if header.shard in mine.refused:
        return True
    before = mine.checksums.get(header.shard)
    if before is None or before == header.body_crc:
        return before is not None
    if header.shard in mine.counted:
        msg = f"{_who(member, header)}: {_other_bytes(before, header)}, and those count already"
        raise RemoteProtocolError(msg)
    return False


def _check_rate(world: World, member: Member, header: Header) -> None:
    """Refuse a learning rate that is not the contribution's, or the round's where it has one.

    Raises:
        RemoteProtocolError: another rank, or this one before, has named another one; or it is so
            large that weights would be no numbers any more.
    """
    if header.rate > MAX_RATE:
        msg = (
            f"{_who(member, header)}: learning rate {header.rate!r}, expected {MAX_RATE:g} or less"
        )
        raise RemoteProtocolError(msg)
    mine, named = world.round.get(member.rank), world.round.rate
    if mine is not None and mine.rate is not None:
        named = (member.rank, mine.rate)
    elif world.need_job().consistency.max_staleness != 0:
        return
    if named is not None and header.rate != named[1]:
        other, rate = named
        msg = (
            f"{_who(member, header)}: learning rate {header.rate!r}, but rank {other} pushes with "
            f"{rate!r}: all ranks must use the same one in the same step"
        )
        raise RemoteProtocolError(msg)


def _fault_of_shard(world: World, mine: Contribution | None, message: Message) -> str:
    """Why this shard cannot be staged, in words: what was expected, what came; empty if it can."""
    header = message.header
    assert isinstance(message.body, memoryview)
    if world.round.is_shut(header.shard):
        return "this shard was reduced before it came"
    if mine is not None and header.shard in mine.nothing:
        return "expected nothing more after SKIP of this shard"
    if mine is not None and header.shard in mine.checksums:
        return _other_bytes(mine.checksums[header.shard], header)
    try:
        world.need_job().check_push(header, message.body)
    except RemotePayloadError as error:
        return str(error)
    return ""


def _other_bytes(before: int, header: Header) -> str:
    return (
        f"expected the bytes that came before (CRC {before:08x}), got others "
        f"(CRC {header.body_crc:08x}): a worker encodes a shard once a round"
    )


def _refuse(world: World, member: Member, peer: Peer, header: Header, fault: str) -> bool:
    """Take nothing of this shard; False if the contribution has too many of these."""
    _count(world, "rejected")
    reason = f"{_who(member, header)}: {fault}"
    if world.replicas is not None:
        world.replicas.cool(member.rank, "a shard that it said was refused")
    late = world.round.is_shut(header.shard)
    kind = "late" if late else "payload"
    world.round.refuse(member.rank, header.seq, header.shard, reason, kind=kind)
    world.log_rejected(member.rank, header.round, reason)
    mine = world.round.get(member.rank)
    if mine is None or len(mine.refused) <= MAX_LIST_ITEMS:
        return True
    text = f"{reason}; it is one of over {MAX_LIST_ITEMS} of this round: start this worker again"
    world.round.drop(member.rank)
    member.lineage = NO_LINEAGE
    world.end_conversation(peer, ErrorCode.PAYLOAD, text)
    return False


def _who(member: Member, header: Header) -> str:
    return f"rank {member.rank} shard {header.shard} of round {header.round}"


def _member(world: World, peer: Peer) -> Member:
    """The rank of a peer whose session has let a message of a joined worker through."""
    member = world.member_of(peer)
    assert member is not None, peer.session.rank
    return member


def _count(world: World, outcome: str) -> None:
    world.counts.pushes[outcome] += 1

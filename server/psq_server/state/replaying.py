"""A server that came back at level `replay`: it asks for what was said, and makes its rounds again.

    start     newest checkpoint V, records up to version R: rounds V .. R - 1 are owed
    JOIN      as at version R; RECALL names what the rank is to say again, a window at a time
    AGAIN     held against length and digest of its record; a whole round goes to the reducer
    R         reached: weights are served, rounds close, and nothing reminds of the crash

Until then no weights leave and no round closes (contributions to the open one are staged), and that
wait has a name. Workers have the verdicts and weights of these rounds: none are said again, but to
who asks. A payload that was asked for and does not come is asked for again at a later heartbeat of
its rank, ever more rarely: a worker that computes looks at nothing.

If a rank cannot say its part again (its process was another one, its bytes differ, it has left or
was given up, and is silent), the rounds cannot be had: that is said loudly, and the server goes
back to the version before them (`GoBack`). Workers that were further stop, and name both rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from psq.errors import RemotePayloadError
from psq_proto.messages import MAX_LIST_ITEMS, Flags, MessageType, Recall
from psq_proto.session import Message
from psq_server.state.events import GoBack, Retake, Retaken
from psq_server.state.members import Member, Peer
from psq_server.state.past import Word
from psq_server.state.rounds import advance
from psq_server.state.training import serve
from psq_server.state.world import World

__all__ = ["ask", "look", "on_again", "on_beat", "on_retaken"]

FIRST_BEAT: Final = 2
"""Heartbeats of a rank, without a payload of it between, until it is asked again: one may have been
under way when it was asked."""


def ask(world: World, member: Member, owed: Mapping[int, list[int]] | None = None) -> None:
    """Ask a rank for payloads, by contribution; for all that is wanted of it unless they are given.

    Args:
        world: everything.
        member: of whom.
        owed: shards by contribution.
    """
    collection = world.collection
    if collection is None:
        return
    collection.beats[member.rank] = 0
    for seq, shards in (collection.owes(member.rank) if owed is None else owed).items():
        for at in range(0, len(shards), MAX_LIST_ITEMS):
            body = Recall(tuple(shards[at : at + MAX_LIST_ITEMS]))
            number, version = world.round.number, world.version
            world.tell(member, MessageType.RECALL, body, seq=seq, round=number, version=version)


def on_beat(world: World, member: Member) -> None:
    """A heartbeat of a rank: if nothing came since some of these, what was asked may be lost."""
    collection = world.collection
    if collection is None:
        return
    beats = collection.beats[member.rank] = collection.beats.get(member.rank, 0) + 1
    if beats >= FIRST_BEAT and not beats & (beats - 1):
        ask(world, member)
        collection.beats[member.rank] = beats


def on_again(world: World, peer: Peer, message: Message) -> None:
    """A rank says a payload again, or that it cannot; what nobody waits for is passed over."""
    collection, member, header = world.collection, world.member_of(peer), message.header
    assert member is not None, peer.session.rank
    if collection is None:
        return
    if header.flags & Flags.SKIP:
        if header.seq in collection.owes(member.rank):
            _lose(world, member.rank, "its process is not the one that said it")
        return
    key = (member.rank, header.seq, header.shard)
    word = collection.word_of(key)
    if word is None:
        return
    assert isinstance(message.body, memoryview)
    fault = _fault(world, word, message)
    if fault:
        _lose(world, member.rank, fault)
        return
    collection.take(key, message.body)
    collection.beats[member.rank] = 0
    world.progressed()
    _go_on(world)


def _fault(world: World, word: Word, message: Message) -> str:
    """Why these are not the bytes that were said, in words; empty if they are."""
    header, payload = message.header, message.body
    assert isinstance(payload, memoryview)
    if header.codec != word.codec or not word.is_of(payload):
        return (
            f"shard {header.shard} of its contribution {header.seq} came with other bytes than the "
            f"{word.nbytes} that count"
        )
    try:  # equal digests are not equal bytes, if somebody wants it so: compiled code comes next
        world.need_job().check_push(header, payload)
    except RemotePayloadError as error:
        return str(error)
    return ""


def _go_on(world: World) -> None:
    """Hand the oldest round to the reducer if it is whole, and ask for what comes into view."""
    assert world.collection is not None
    past = world.collection.next()
    if past is None:
        return
    for rank, owed in world.collection.news().items():
        ask(world, world.members[rank], owed)
    world.out.append(Retake(past))


def on_retaken(world: World, event: Retaken) -> None:
    """A round is made again; after the last one the job goes on."""
    collection = world.collection
    assert collection is not None, event.round
    assert collection.busy, event.round
    collection.busy = False
    collection.frames |= {shard: (frame,) for shard, frame in event.frames.items()}
    world.progressed()
    if not collection.over:
        _go_on(world)
        return
    world.collection = None
    world.last_frames |= collection.frames
    world.checkpoint_due_s = world.now_s  # before it, another crash costs the same again
    rounds = collection.last + 1 - collection.base
    world.log("replayed", version=world.version, rounds=rounds, bytes=collection.taken_bytes)
    for rank, have in collection.parked.items():
        member = world.members[rank]
        peer = world.peers.get(member.peer) if member.peer is not None else None
        if peer is not None:
            serve(world, member, peer, have)
    advance(world)


def look(world: World) -> None:
    """At a tick: begin, and notice who will not come."""
    collection = world.collection
    if collection is None:
        return
    _go_on(world)
    for rank in collection.ranks:
        member = world.members[rank]
        silent_s = world.now_s - member.seen_s
        if (member.gone or member.evicted) and silent_s > world.settings.lease_s:
            how = "has left" if member.gone else "was given up"
            _lose(world, rank, f"it {how}, and was last heard {silent_s:.1f} s ago")
            return


def _lose(world: World, rank: int, why: str) -> None:
    """Go back to before the rounds that cannot be had again."""
    collection = world.collection
    assert collection is not None, rank
    first, last = collection.rounds_of(rank) or (collection.base, collection.last)
    text = (
        f"rank {rank} cannot say again what it said in rounds {first} to {last}: {why}; rounds "
        f"{collection.base} to {collection.last} are lost, the job goes on from version "
        f"{collection.base}, and workers that were further stop"
    )
    world.log("lost", "error", rank=rank, first=collection.base, last=collection.last, text=text)
    world.out.append(GoBack(collection.base, text))
    world.stopped = True

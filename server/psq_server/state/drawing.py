"""DRAW: which data a contribution is to be computed from, and who keeps it if its rank does not.

The books are `ledger`'s; here is what a DRAW may ask, and what becomes of a rank's range when the
rank goes: it stays bound to what the rank has said of the open round, as far as that may count;
else it goes back, and the contribution that the rank may still be computing from it is rejected at
once. Otherwise the same data could count twice.

Server 0 hands out. Where ranks compute the same (coded), or one speaks for others (a tree), a
contribution is not one rank's, and DRAW is refused.
"""

from __future__ import annotations

from psq import clock
from psq.errors import RemoteProtocolError
from psq_proto.messages import Draw, MessageType, Range, Verdict, clip_text
from psq_proto.session import Message
from psq_server.state import elastic
from psq_server.state.ledger import Spans, Terms
from psq_server.state.members import Member, Peer
from psq_server.state.rounds import resolve
from psq_server.state.world import World

__all__ = ["check", "on_draw", "release", "replace"]


def on_draw(world: World, peer: Peer, message: Message) -> None:
    """Answer with the range of a contribution, or why there is none.

    Raises:
        RemoteProtocolError: this job or server hands out no data, or the ranks do not agree on it.
    """
    draw, member = message.body, world.member_of(peer)
    assert isinstance(draw, Draw)
    assert member is not None, peer.session.rank
    _check_terms(world, member, draw)
    answer = _answer(world, member, draw)
    world.say(peer, MessageType.RANGE, answer)


def _check_terms(world: World, member: Member, draw: Draw) -> None:
    plan, ledger = world.need_job().plan, world.ledger
    fault = ""
    if plan.server != 0:
        fault = f"this is server {plan.server}, and server 0 hands out the data: ask that one"
    elif plan.replicas > 1:
        fault = "ranks that compute the same (aggregate=coded) need the same data: draw none"
    elif world.settings.branches is not None:
        fault = "in a tree one message is of several ranks: draw no data, split them by rank"
    elif draw.seq > world.round.number:
        fault = f"contribution {draw.seq}, but this server is at round {world.round.number}"
    terms = Terms(draw.size, draw.batch, draw.seed)
    if not fault and ledger.terms not in (None, terms):
        fault = f"{terms}, but this job draws {ledger.terms}: all ranks must name the same"
    if fault:
        msg = f"rank {member.rank} draws data: {fault}"
        raise RemoteProtocolError(msg)
    if ledger.terms is None:
        ledger.begin(terms)
        world.log("data", size=draw.size, batch=draw.batch, seed=draw.seed)


def _answer(world: World, member: Member, draw: Draw) -> Range:
    ledger, rank = world.ledger, member.rank
    if _is_late(world, member, draw.seq):
        return Range(draw.seq, "late", ledger.epoch, (), ledger.left)
    if draw.epoch < ledger.epoch:
        return Range(draw.seq, "end", ledger.epoch, (), ledger.left)
    spans: Spans = ()
    if draw.epoch == ledger.epoch:  # else the others have to end this one first
        spans = ledger.draw(rank, draw.seq, _peers_of(world, draw.seq))
        world.changed()
    if not spans:
        return Range(draw.seq, "wait", ledger.epoch, (), ledger.left)
    return Range(draw.seq, "drawn", ledger.epoch, spans, ledger.left)


def _is_late(world: World, member: Member, seq: int) -> bool:
    last = member.resolved
    if last is not None and seq <= last.seq:
        return True
    if world.round.get(member.rank) is not None or member.rank in world.round.closing:
        return False
    return not clock.may_apply(seq, world.round.number, world.need_job().consistency)


def _peers_of(world: World, seq: int) -> tuple[int, ...]:
    """The ranks for whose contribution to the same round a range is cut at the same time."""
    if world.need_job().consistency.max_staleness != 0 or seq != world.round.number:
        return ()
    needed = set(world.ranks) - world.finished - elastic.absent(world)
    members = ((rank, world.members.get(rank)) for rank in needed)
    return tuple(r for r, member in members if member is None or not _is_late(world, member, seq))


# ---- who goes


def release(world: World, member: Member, why: str) -> None:
    """A rank is given up, or leaves: its range goes back, unless what it said may still count."""
    rank = member.rank
    if world.round.get(rank) is not None or rank in world.round.closing:
        return
    seq = world.ledger.release(rank)
    if seq is None:
        return
    reason = f"rank {rank} held data for round {seq} and {why}: others compute from these"
    world.note_rejected(rank, "data")
    resolve(world, member, Verdict("rejected", clip_text(reason)), seq, world.version)


def replace(world: World, rank: int) -> None:
    """Another process joins as this rank; before what the old one said is dropped.

    What is reduced of that counts, so its data are visited; but its verdict is nobody's.
    """
    mine, held = world.round.get(rank), world.ledger.held.get(rank)
    if held is not None and not held.drawn:
        return  # cut for whoever would come
    if rank in world.round.closing or (mine is not None and mine.counted):
        world.ledger.disown(rank)
    else:
        world.ledger.release(rank)
    world.changed()


# ---- invariants


def check(world: World) -> None:
    """Every position is in one place, and who is not there holds none that it may not have.

    Raises:
        AssertionError: it is not so.
    """
    world.ledger.check()
    for rank, held in world.ledger.held.items():
        member = world.members.get(rank)
        if member is None:
            assert not held.drawn, rank
            continue
        assert member.resolved is None or member.resolved.seq < held.seq, (rank, held.seq)
        if member.evicted or member.gone:
            mine = world.round.get(rank) or world.round.closing.get(rank)
            assert mine is not None, f"rank {rank} is gone and holds data for round {held.seq}"

"""HEARTBEAT, LEAVE, PROBE, silence and the end: who is there, who is waited for, and for how long.

Every wait has a name (`describe`) and a bound (`give_up_after_s`). A worker that computes for long
says so by heartbeat; a job is called stalled only when a rank that is waited for is silent, lost or
never came.
"""

from __future__ import annotations

from typing import Final, Literal

from psq import clock
from psq.errors import EXIT_GAVE_UP
from psq_proto.messages import (
    MAX_LIST_ITEMS,
    NONE,
    Bye,
    Heartbeat,
    Leave,
    MessageType,
    Status,
    clip_text,
)
from psq_proto.session import HeaderFields, Message
from psq_server.state import covers, drawing, elastic, eviction, keeping, replaying
from psq_server.state.events import Echo, PeerBehind, PeerGone, Save, Send, Stop
from psq_server.state.members import Member, Peer, standing
from psq_server.state.replicas import Replicas
from psq_server.state.rounds import abandon_round, advance
from psq_server.state.waits import Wait, describe
from psq_server.state.world import World

__all__ = [
    "NOTE_WAIT_S",
    "STOP_ROUND_S",
    "STRANGER_S",
    "current_wait",
    "end_if_due",
    "fail",
    "finish",
    "is_stalled",
    "note_seen",
    "on_heartbeat",
    "on_leave",
    "on_peer_behind",
    "on_peer_gone",
    "on_probe",
    "on_stop_requested",
    "on_tick",
    "wait_text",
]

NOTE_WAIT_S: Final = 5.0
"""How old a wait is when it is first logged, and how often it is logged then."""
STRANGER_S: Final = 30.0
"""A connection that has not joined is forgotten after so much silence."""

BACK_S: Final = 60.0
"""How long after a server's start ranks may take to be back, once others are known to be done."""
STOP_ROUND_S: Final = 2.0
"""How long a server that is told to stop waits for the end of a round that is half reduced."""

EndReason = Literal["done", "stopped", "gave-up", "failed"]


def on_heartbeat(world: World, peer: Peer, message: Message) -> None:
    """Answer with STATUS: what this rank still owes, and who is waited for."""
    beat, member = message.body, world.member_of(peer)
    assert isinstance(beat, Heartbeat)
    assert member is not None, peer.session.rank
    replaying.on_beat(world, member)
    if member.gone and keeping.holds_goodbye(world, member):
        return  # it stays until it is answered
    if world.has_weights and beat.have_version == world.version:
        member.synced = True
    wait = current_wait(world)
    waiting = tuple(
        (rank, max(0.0, world.now_s - _seen_s(world, rank)))
        for rank in (wait.ranks[:MAX_LIST_ITEMS] if wait else ())
    )
    resolved = NONE if member.resolved is None else member.resolved.seq
    before = keeping.resolved_before(world, member.rank)
    version = keeping.durable_version(world)
    status = Status(
        round=version,
        version=version,
        missing=_missing(world, member.rank) if before is None else (),
        waiting=waiting,
        text=clip_text(wait_text(world)),
        resolved=resolved if before is None else before,
        clock_s=max(0.0, world.now_s),
    )
    early = not member.gone
    fields = HeaderFields(round=version, version=version, seq=keeping.mark(world))
    world.say(peer, MessageType.STATUS, status, early=early, **fields)
    member.held = beat.held
    if beat.held:
        advance(world)


def _missing(world: World, rank: int) -> tuple[int, ...]:
    if world.replicas is not None and world.has_weights:
        return covers.missing(world, world.replicas, rank, MAX_LIST_ITEMS)
    return world.round.missing(rank, MAX_LIST_ITEMS)


def on_probe(world: World, peer: Peer, message: Message) -> None:
    """Send back what was asked for, if this peer's line is free: it measures the line."""
    world.out.append(Echo(peer.name, peer.session.send_echo(message)))


def on_leave(world: World, peer: Peer, message: Message) -> None:
    """Note that a rank has ended its part; when all are done, so is the job."""
    leave, member = message.body, world.member_of(peer)
    assert isinstance(leave, Leave)
    assert member is not None, peer.session.rank
    if member.gone:
        return
    member.left = leave
    world.is_exposed = True
    world.changed()
    world.progressed()
    level: Literal["info", "warning"] = "info" if leave.reason == "done" else "warning"
    world.log("left", level, rank=member.rank, reason=leave.reason, text=leave.text)
    if not world.round.is_complete(member.rank):
        world.round.drop(member.rank, forget=False)
    drawing.release(world, member, f"left ({leave.reason})")
    if leave.reason != "done" and _is_aggregator(world, member.rank):
        _end_without(world, member, f"left ({leave.reason}: {leave.text})")
        return
    _go_on(world)


def _go_on(world: World) -> None:
    """Somebody is not there any more: the job is done, or its rounds may be."""
    if world.job is None or world.collection is not None or not elastic.is_over(world):
        advance(world)
        return
    left = len(world.ranks) - len(world.finished)
    words = f"every worker that is there is done, {left} did not come back" if left else ""
    finish(world, 0, "done", words or "every worker is done")


def on_peer_gone(world: World, event: PeerGone) -> None:
    """A connection is gone; its rank is silent until it joins again."""
    peer = world.peers.get(event.peer)
    if peer is None:
        return
    member = world.member_of(peer)
    if member is not None and not member.gone:
        world.log("disconnected", rank=member.rank)
    world.release(peer)
    world.peers.forget(event.peer)


def on_peer_behind(world: World, event: PeerBehind) -> None:
    """A slow reader lost what was queued for it: it gets nothing more before it pulls."""
    peer = world.peers.get(event.peer)
    member = world.member_of(peer) if peer is not None else None
    if member is not None:
        member.synced = False
        world.log("behind", "warning", rank=member.rank, version=world.version)


def on_stop_requested(world: World, reason: str) -> None:
    """End in order: what is half reduced may end, the rest of the open round is given back.

    Then the weights are saved and everybody is told.
    """
    if world.ending is not None:
        return
    world.ending = (f"the server was told to stop ({reason})", world.now_s + STOP_ROUND_S)
    if not _is_amid(world):
        end_now(world)


def _is_amid(world: World) -> bool:
    """Whether something is under way that is to end before the process does."""
    return bool(world.round.closed) or world.collection is not None


def end_now(world: World) -> None:
    """End as was wished: nothing is half done any more, or it takes too long."""
    assert world.ending is not None
    text, _ = world.ending
    ahead = _shards_ahead(world)
    if ahead:
        world.log("half-round", "warning", version=world.version, shards_ahead=ahead)
    if world.level == "off":
        abandon_round(world, text)  # else who waits for a verdict says it again after a restart
    finish(world, 0, "stopped", text)


def _shards_ahead(world: World) -> int:
    return sum(version > world.version for version in world.versions.values())


def end_if_due(world: World) -> None:
    """End if that was wished, and the open round is whole again, or nobody is left to end it."""
    if world.ending is None or world.stopped:
        return
    nobody = all(member.gone or member.peer is None for member in world.members.values())
    if not _is_amid(world) or nobody or world.now_s >= world.ending[1]:
        end_now(world)


def note_seen(world: World, peer: Peer) -> None:
    """A whole frame came from this peer just now."""
    peer.seen_s = world.now_s
    member = world.member_of(peer)
    if member is not None:
        member.seen_s = world.now_s
        if member.noted_silent:
            member.noted_silent = False
            world.log("heard-again", rank=member.rank)
        if member.evicted:
            elastic.note_returned(world, member)


def on_tick(world: World) -> None:
    """Notice silence: forget strangers, name lost ranks and waits, give up in the end."""
    world.peers.forget_silent(world.now_s - STRANGER_S)
    eviction.look(world)
    replaying.look(world)
    keeping.try_again(world)
    _go_on(world)  # perhaps all were done already when this server went down
    if world.stopped:
        return
    for member in world.members.values():
        silent = standing(member, world.now_s, world.settings.lease_s) == "silent"
        if silent and not member.noted_silent:
            member.noted_silent = True
            away_s = round(world.now_s - member.seen_s, 1)
            world.log("silent", "warning", rank=member.rank, silent_s=away_s)
        silent_s = world.now_s - member.seen_s
        if silent and silent_s > world.settings.lease_s and _is_aggregator(world, member.rank):
            _end_without(world, member, f"was last seen {silent_s:.1f} s ago")
            return
    if world.replicas is not None and _end_of_replicas(world, world.replicas):
        return
    if _are_done_unheard(world):
        return
    wait = current_wait(world)
    if wait is None:
        return
    if wait.age_s(world.now_s) > world.settings.give_up_after_s:
        finish(world, EXIT_GAVE_UP, "gave-up", f"gave up {wait_text(world)}")
    elif _worth_noting(world, wait):
        world.noted_wait_s = world.now_s
        world.log("waiting", need=wait.need, round=wait.round, text=wait_text(world))


def _are_done_unheard(world: World) -> bool:
    """End if ranks are done, and the others have not been heard since this server's start.

    It was killed while they said goodbye: a worker that has done so and finds no server ends. One
    that is not done looks for its server twice a second; one that was killed too has BACK_S.
    """
    if world.is_elastic or world.replicas is not None or not world.finished:
        return False
    if world.collection is not None:
        return False  # the weights are not whole
    patience_s = max(BACK_S, world.settings.lease_s)
    others = [world.members.get(rank) for rank in world.ranks if rank not in world.finished]
    for member in others:
        if member is None or member.gone or member.incarnation:
            return False
        if world.now_s - member.seen_s <= patience_s:
            return False
    done = ", ".join(map(str, sorted(world.finished)))
    text = (
        f"rank {done} was done when this server was killed, and of the others none was heard in "
        f"the {patience_s:g} s since its start: they are taken for done too; one that is not may "
        "go on with a server that is started again"
    )
    finish(world, 0, "done", text)
    return True


def _end_of_replicas(world: World, replicas: Replicas) -> bool:
    """End if a group has nobody left; or if all that matter are done, and the others are silent."""
    lost = covers.lost_group(world, replicas)
    if lost:
        ranks = " and ".join(map(str, lost))
        text = (
            f"ranks {ranks} compute the same, and none of them was heard for "
            f"{world.settings.lease_s:g} s: nobody has their share of the data; start the job again"
        )
        finish(world, EXIT_GAVE_UP, "gave-up", text)
    elif _is_done(world):
        finish(world, 0, "done", "every group of workers is done")
    return world.stopped


def _is_done(world: World) -> bool:
    """Whether each group has a member that is done, and nobody who is not is there."""
    assert world.replicas is not None
    every = all(world.finished.intersection(group) for group in world.replicas.groups)
    return every and not world.there


def _is_aggregator(world: World, rank: int) -> bool:
    branches = world.settings.branches
    branch = branches.of(rank) if branches is not None else None
    return branch is not None and branch.is_aggregator


def _end_without(world: World, member: Member, how: str) -> None:
    """End the job: what an aggregator had not said yet is lost with it, and nobody can go on."""
    branches = world.settings.branches
    branch = branches.of(member.rank) if branches is not None else None
    assert branch is not None, member.rank
    text = (
        f"rank {member.rank}, the aggregator of ranks {branch.text}, {how}: it cannot be replaced "
        "while a job runs; start the job again"
    )
    finish(world, EXIT_GAVE_UP, "gave-up", text)


def finish(world: World, exit_code: int, reason: EndReason, text: str) -> None:
    """Save, say BYE to everybody, stop."""
    if world.collection is not None:
        why = "not all rounds are made again: the next start needs what these workers have kept"
        world.log("not-saved", "error", version=world.version, text=why)
    elif world.has_weights:
        is_whole = not _shards_ahead(world)
        if world.level != "off" and is_whole:
            keeping.announce(world, last=True)
        if world.level == "off" or is_whole:
            world.out.append(Save(world.version))
        else:
            why = (
                "half a round was made: start again on this --state-dir to go on; psq ckpt export "
                "has the weights of the newest checkpoint"
            )
            world.log("not-saved", "warning", version=world.version, text=why)
    byes = _say_bye(world, reason, text)
    world.out.extend(bye for bye, _ in byes)
    waited_for = tuple(bye for bye, member in byes if member is not None and not member.gone)
    world.out.append(Stop(exit_code, reason, text, waited_for))
    world.stopped = True


def fail(world: World, text: str) -> list[Send]:
    """Say BYE to everybody, because this process cannot go on; nothing else can be relied on."""
    world.stopped = True
    return [bye for bye, _ in _say_bye(world, "failed", text)]


def _say_bye(world: World, reason: EndReason, text: str) -> list[tuple[Send, Member | None]]:
    """A BYE for each peer that speaks for a rank, and that rank."""
    byes: list[tuple[Send, Member | None]] = []
    for peer in world.peers.joined():
        bye = Bye(reason, clip_text(text))
        if peer.session.may_send(MessageType.BYE):
            frame = peer.session.send(MessageType.BYE, bye)
            byes.append((Send(peer.name, frame), world.member_of(peer)))
    return byes


# ---- waits


def current_wait(world: World) -> Wait | None:
    """What the job stands still for, if anything: workers, initial weights, pushes, the disk."""
    closed = world.round.all_closed or world.round.judging
    if world.stopped or (world.job is not None and closed):
        return None
    number, since_s = world.round.number, world.progress_s
    if world.collection is not None or keeping.is_full(world):
        return _wait_of_replay(world)
    size = world.world_size
    if size is None:
        return Wait("join", (), number, since_s)
    absent = _not_come(world)
    if world.replicas is not None and world.version > 0:
        absent = ()  # what matters is whether anybody of a group is there
    if absent:
        return Wait("join", absent, number, since_s)
    if not world.has_weights:
        return Wait("weights", (0,), number, since_s)
    complete = frozenset(world.round.complete)
    owing = clock.members(world.ranks, world.finished, complete, elastic.absent(world))
    owing = tuple(rank for rank in owing if rank not in complete)
    if world.replicas is not None:
        open_groups = covers.owing(world, world.replicas)
        owing = tuple(rank for rank in owing if rank in open_groups)
    return Wait("push", owing, number, since_s) if owing else None


def _wait_of_replay(world: World) -> Wait | None:
    """For what workers have kept for a server that came back; or for room to keep more."""
    if world.collection is None:
        return Wait("disk", (), world.round.number, world.progress_s)
    owing = world.collection.ranks
    return Wait("payloads", owing, world.collection.first, world.progress_s) if owing else None


def _not_come(world: World) -> tuple[int, ...]:
    """The ranks that have to join before anything goes on."""
    there = {rank for rank, m in world.members.items() if not m.gone or m.finished}
    if not world.is_elastic:
        return tuple(rank for rank in world.ranks if rank not in there)
    there -= {rank for rank, m in world.members.items() if m.evicted}
    if not elastic.enough(world):
        return tuple(rank for rank in world.ranks if rank not in there)
    if not world.has_weights and 0 not in there:
        return (0,)  # whose weights the job begins with
    needless = elastic.absent(world)
    return tuple(rank for rank in world.ranks if rank not in there and rank not in needless)


def wait_text(world: World) -> str:
    """The present wait in words; empty when there is none."""
    if world.disk:
        return world.disk
    wait = current_wait(world)
    if wait is None:
        return world.above if world.job is not None and world.round.all_closed else ""
    if wait.need == "disk":
        return f"{keeping.full_words(world)}, for {wait.age_s(world.now_s):.0f} s"
    words = describe(
        wait,
        world_size=world.world_size,
        now_s=world.now_s,
        seen_s={rank: member.seen_s for rank, member in world.members.items()},
        others_left=bool(world.finished),
        branches=world.settings.branches,
        few=elastic.missing_words(world),
    )
    is_known = world.has_weights and bool(world.members) and world.collection is None
    if is_known and not any(member.incarnation for member in world.members.values()):
        words += (
            "; nobody has come since this server's start: if the job is done, stop it (SIGTERM), "
            "its weights are whole"
        )
    return words


def is_stalled(world: World) -> bool:
    """Whether the job has stood still for longer than a lease because of a rank that is not there.

    A server that nobody has joined yet is idle, not stalled; ranks that compute for long and say so
    hold up nobody unduly.
    """
    wait = current_wait(world)
    if wait is None or not world.members or wait.age_s(world.now_s) <= world.settings.lease_s:
        return False
    return any(_is_away(world, rank) for rank in wait.ranks)


def _is_away(world: World, rank: int) -> bool:
    member = world.members.get(rank)
    return standing(member, world.now_s, world.settings.lease_s) != "joined"


def _worth_noting(world: World, wait: Wait) -> bool:
    """Whether this wait belongs in the log now: it is old, and somebody is held up or away."""
    if wait.age_s(world.now_s) < NOTE_WAIT_S or world.now_s - world.noted_wait_s < NOTE_WAIT_S:
        return False
    return (
        wait.need != "push"
        or bool(world.round.complete)
        or any(_is_away(world, rank) for rank in wait.ranks)
    )


def _seen_s(world: World, rank: int) -> float:
    member = world.members.get(rank)
    return member.seen_s if member is not None else world.progress_s

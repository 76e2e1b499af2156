"""How rounds end: shards are reduced, the round commits, every contribution has its one verdict.

    eager (bsp without quorum)     a shard closes as soon as every member has said it; the round
                                   commits with its last shard
    whole (every other rule)       all shards close together, for the contributions that are
                                   complete then; the others wait for a later round, while they may
    judged (recipes that look at   as whole, and what was taken waits for a judgement: refused ranks
    whole rounds, under any rule)  have said nothing, and are told so; the others' shards close

Which ranks are members, when a round closes and what may still be applied are `psq.clock`'s
decisions. A commit is the only place where a verdict "applied" is born, but for the end of a server
that is told to stop: what was reduced by then counts, and is said to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from psq import clock
from psq_proto.messages import MAX_LIST_ITEMS, ErrorCode, MessageType, Verdict, clip_text
from psq_server.state import covers, elastic, keeping
from psq_server.state.events import (
    Broadcast,
    Checkpoint,
    Committed,
    Judge,
    Judged,
    Pushed,
    Reduce,
    ShardReduced,
)
from psq_server.state.members import NO_LINEAGE, Member, Resolved
from psq_server.state.round import Contribution
from psq_server.state.world import World

__all__ = [
    "abandon_round",
    "advance",
    "on_reducer",
    "reject_late",
    "repeat_verdict",
    "settle",
]


def advance(world: World, shards: Iterable[int] | None = None) -> None:
    """Give the reducer what may be reduced now.

    Args:
        world: everything.
        shards: the shards about which something was said; None: all.
    """
    if not _may_close(world):
        return
    if elastic.is_nobodys(world):
        _close_empty(world)
        return
    if world.need_job().is_whole:
        _close_whole(world)
        return
    for shard in world.round.owed if shards is None else shards:
        if shard not in world.round.closed and _is_said(world, shard):
            _close(world, shard)
    if 0 < len(world.round.owed) == len(world.round.closed):
        for shard in world.round.shards:  # those that nobody pushes
            if shard not in world.round.closed:
                _close(world, shard)


def _may_close(world: World) -> bool:
    """Whether anything may be reduced now, if enough is said."""
    if world.job is None or not world.has_weights or not elastic.enough(world):
        return False
    if world.round.all_closed or world.round.judging:
        return False
    return world.collection is None and not keeping.is_full(world)


def _close_empty(world: World) -> None:
    """Close what is open without a word."""
    if world.need_job().is_whole:
        world.round.take(())
        _close_taken(world)
        return
    for shard in world.round.shards:
        if shard not in world.round.closed:
            _close(world, shard)


def _close(world: World, shard: int) -> None:
    rate = world.round.rate[1] if world.round.rate else 0.0
    if world.replicas is not None and shard in world.round.owed:
        said = world.round.close_for(shard, covers.speak(world, world.replicas, shard))
    else:
        said = world.round.close(shard)
    _reduce(world, shard, said, rate)


def _is_said(world: World, shard: int) -> bool:
    """Whether every member has said this shard, or somebody has for each group of replicas."""
    if world.replicas is not None:
        return covers.is_covered(world, world.replicas, shard)
    said = world.round.sayers(shard)
    ranks = clock.members(world.ranks, world.finished, said, elastic.absent(world))
    return clock.closes(ranks, said)


def _reduce(world: World, shard: int, said: tuple[Pushed, ...], rate: float) -> None:
    world.out.append(Reduce(world.round.number, shard, said, rate))


def _close_whole(world: World) -> None:
    """Close all shards for the contributions that are complete, if it is time to."""
    world.due_s = None
    complete = world.round.complete
    if not complete or not _is_time(world, complete):
        return
    world.round.take(complete)
    if world.need_job().judges:
        world.round.judging = True
        rate = _newest_rate(world.round.closing)
        world.out.append(Judge(world.round.number, world.round.taken(), rate))
    else:
        _close_taken(world)


def _close_taken(world: World) -> None:
    rate = _newest_rate(world.round.closing)
    for shard in world.round.shards:
        _reduce(world, shard, world.round.close_taken(shard), rate)


def _on_judged(world: World, event: Judged) -> None:
    """Close all shards, for the contributions that were not refused."""
    assert event.round == world.round.number, (event.round, world.round.number)
    assert world.round.judging, event.round
    world.round.apply_judgement(event.weights, event.refused)
    for rank, reason in sorted(event.refused.items()):
        world.log_rejected(rank, event.round, reason)
    _close_taken(world)


def _is_time(world: World, complete: tuple[int, ...]) -> bool:
    """Whether the round may close now; if only its deadline is in the way, `due_s` becomes that."""
    job = world.need_job()
    patience_s = clock.deadline(world.durations_s, job.consistency.deadline_mads)
    closes = partial(
        clock.closes,
        clock.members(world.ranks, world.finished | _held(world), complete, elastic.absent(world)),
        complete,
        _bases(world),
        round=world.round.number,
        consistency=job.consistency,
        late=_late(world, patience_s),
    )
    if closes(overdue=False):
        return True
    if patience_s is None or not closes(overdue=True):
        return False
    due_s = world.round.opened_s + patience_s
    if world.now_s < due_s:
        world.due_s = due_s
    return world.now_s >= due_s


def _held(world: World) -> frozenset[int]:
    """The ranks that wait for another server of the job: nothing can come of them before.

    That server may wait for one whose contribution waits here. What it says next it computes from
    the newest weights that it has then.
    """
    return frozenset(rank for rank, member in world.members.items() if member.held)


def _late(world: World, patience_s: float | None) -> tuple[int, ...]:
    """The ranks whose last contribution took longer than a round waits."""
    if patience_s is None:
        return ()
    return tuple(rank for rank, member in world.members.items() if member.took_s > patience_s)


def _bases(world: World) -> dict[int, int]:
    """The version that each rank computes from at least.

    A rank that has left, or was given up, is not among them: who comes in its place gets the newest
    weights.
    """
    begun = {rank: mine.base for rank, mine in world.round.items()}
    there = elastic.present(world)
    at_least = {rank: member.base for rank, member in world.members.items() if rank in there}
    return at_least | begun


def _newest_rate(taken: Mapping[int, Contribution]) -> float:
    """The learning rate of whoever computed from the newest weights; of several, the first."""
    named = [(-mine.base, rank, mine.rate) for rank, mine in taken.items() if mine.rate is not None]
    return min(named)[2] if named else 0.0


# ---- commit


def on_reducer(world: World, event: ShardReduced | Judged) -> None:
    """Take what the reducer answers: to a round, or to a shard of it."""
    if isinstance(event, Judged):
        _on_judged(world, event)
    else:
        _on_shard_reduced(world, event)


def _on_shard_reduced(world: World, event: ShardReduced) -> None:
    """One shard has its next version: everybody gets it; with the last one the round commits."""
    open_round = world.round
    assert event.round == open_round.number, (event.round, open_round.number)
    assert open_round.closed.get(event.shard, event.frame) is None, event.shard
    open_round.closed[event.shard] = event.frame
    world.versions[event.shard] = event.round + 1
    frames = world.last_frames[event.shard] = (event.frame, *event.more)
    world.server_s += event.reduce_s
    committed = open_round.is_reduced
    if committed:
        _commit(world)
    followers = tuple(
        m.peer for m in world.members.values() if m.synced and m.peer is not None and not m.gone
    )
    if followers:
        news = Broadcast(followers, event.round + 1, frames, (event.shard,) * len(frames))
        world.out.append(news)
    if committed:
        advance(world)


def _commit(world: World) -> None:
    """Version r becomes r + 1."""
    closed = world.round
    world.version += 1
    due = world.need_job().plan.due_shards(world.version)
    world.round = closed.following(due, world.now_s, world.need_job().owed(due))
    world.counts.rounds += 1
    world.replay_s += world.server_s
    is_checkpoint = keeping.announce_if_due(world)
    staleness: list[int] = []
    contributions = sorted(closed.closing.items()) if closed.whole else closed.items()
    if world.replicas is not None:
        contributions = covers.end_round(world.replicas, closed)
    contributions = list(contributions)
    keeping.begin_flight(world, {rank: world.members[rank] for rank, _ in contributions})
    for rank, mine in contributions:
        if mine.counts:
            staleness.append(closed.number - mine.base)
        settle(world, world.members[rank], mine, closed.owed, world.version)
    world.ledger.commit(closed.number)
    world.counts.max_staleness = max([world.counts.max_staleness, *staleness])
    world.server_s = 0.0
    world.note_opened()
    world.out.append(Committed(world.version, tuple(staleness)))
    if is_checkpoint:
        world.out.append(Checkpoint(world.version))
    world.progressed()
    if world.replicas is None:
        _reject_stale(world)
        return
    for rank in world.replicas.begin_round(world.version):
        reject_late(world, world.members[rank], world.replicas.late.pop(rank).base)
    covers.log_cooled(world, world.replicas)


def _reject_stale(world: World) -> None:
    """Reject what waited for a round that may take it, and waited in vain."""
    consistency = world.need_job().consistency
    for rank, mine in list(world.round.items()):
        if clock.may_apply(mine.base, world.version, consistency):
            continue
        world.round.drop(rank)
        world.counts.pushes["late"] += 1
        reject_late(world, world.members[rank], mine.base)


def reject_late(world: World, member: Member, seq: int) -> None:
    """Tell a rank that rounds went on without this contribution, and may not take it any more."""
    reason = (
        f"rank {member.rank} pushed round {seq}, which was closed without it: "
        f"this server is at round {world.round.number}"
    )
    world.note_rejected(member.rank, "late")
    resolve(world, member, Verdict("rejected", reason), seq, world.version)


def settle(
    world: World, member: Member, mine: Contribution, shards: tuple[int, ...], version: int
) -> None:
    """Resolve a contribution as what it came to: all of it counts, or some, or nothing."""
    rejected = mine.uncounted(shards)
    if rejected:
        world.note_rejected(member.rank, mine.kind or "late")
    if not mine.counts:
        resolve(world, member, Verdict("rejected", clip_text(mine.reason)), mine.base, version)
        return
    member.last_applied = mine.base
    world.counts.skipped += not (mine.counted or rejected)
    if len(rejected) > MAX_LIST_ITEMS:
        _refuse_too_many(world, member, len(rejected))
        return
    late = f"rank {member.rank} had not said shards {rejected} when they were reduced"
    reason = (mine.reason or late) if rejected else ""
    verdict = Verdict("applied", clip_text(reason), world.server_s, rejected)
    resolve(world, member, verdict, mine.base, version)


def _refuse_too_many(world: World, member: Member, count: int) -> None:
    """A verdict cannot name so many shards: the worker must begin a new residual."""
    member.lineage = NO_LINEAGE
    peer = world.peers.get(member.peer) if member.peer is not None else None
    if peer is not None:
        text = (
            f"{count} shards of rank {member.rank} do not count, a verdict names "
            f"{MAX_LIST_ITEMS} at most: start this worker again"
        )
        world.end_conversation(peer, ErrorCode.PAYLOAD, text)


def resolve(world: World, member: Member, verdict: Verdict, seq: int, version: int) -> None:
    """Say what became of a contribution, and remember it to say it again."""
    world.changed()
    world.ledger.settle(member.rank, seq, applied=verdict.outcome == "applied")
    member.resolved = Resolved(seq, verdict, version)
    member.base = max(member.base, version)
    repeat_verdict(world, member)


def repeat_verdict(world: World, member: Member) -> None:
    """Say this rank's last verdict (again)."""
    last = member.resolved
    assert last is not None, member.rank
    world.tell(
        member,
        MessageType.VERDICT,
        last.verdict,
        seq=last.seq,
        round=last.seq,
        version=last.version,
    )


def abandon_round(world: World, reason: str) -> None:
    """Resolve what the open round holds: what was reduced counts, the rest does not."""
    abandoned = world.round
    owed = abandoned.owed
    world.round = type(abandoned)(abandoned.number, abandoned.shards, world.now_s, owed)
    for rank, mine in (*abandoned.items(), *sorted(abandoned.closing.items())):
        if not mine.reason:
            mine.reason, mine.kind = reason, "stopped"
        version = abandoned.number + 1 if mine.counted else abandoned.number
        if not mine.counted:
            mine.nothing.clear()
        settle(world, world.members[rank], mine, owed, version)

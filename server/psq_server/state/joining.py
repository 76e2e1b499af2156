"""HELLO, PLAN, JOIN: how a connection becomes a rank.

Three ways, because a HELLO may be old: it binds nobody and is answered with a COOKIE, an
incarnation larger than all before it. Only the JOIN that bears it takes the rank over, and fences
whoever had it. The first JOIN's plan is the job.
"""

from __future__ import annotations

from typing import Final, Literal

from psq.errors import FencedError, LocalError, RefusedError, RemotePlanError
from psq.keys import Ranks
from psq.plan import Plan
from psq_proto.messages import U32_MAX, ErrorCode, Join, MessageType, Welcome
from psq_proto.session import HeaderFields, Message
from psq_server.state import covers, drawing, elastic, keeping, replaying
from psq_server.state.events import Adopt, Send
from psq_server.state.job import Job, check_fits
from psq_server.state.members import Member, Peer, may_continue
from psq_server.state.replicas import Replicas, groups_of
from psq_server.state.round import OpenRound
from psq_server.state.tree_fit import refusal, split_group
from psq_server.state.world import Settings, World

__all__ = ["MAX_OFFERS", "adopt", "on_hello", "on_join", "on_plan"]

MAX_OFFERS: Final = 8
"""Different plans kept before the first JOIN decides; the oldest gives way."""


def on_hello(world: World, peer: Peer, message: Message) -> None:
    """Answer with a COOKIE; a peer that was joined begins again and speaks for nobody meanwhile.

    Raises:
        RefusedError: this server has handed out all the incarnations there are.
    """
    member = next((m for m in world.members.values() if m.peer == peer.name), None)
    if member is not None:
        member.cut(world.now_s)
        world.peers.demote(peer)
    rank = message.header.rank
    if not _may_speak_for(world, peer, rank) or not _rank_exists(world, peer, rank):
        return
    if world.incarnation == U32_MAX:
        msg = "this server has no incarnation left to hand out: restart it"
        raise RefusedError(msg)
    world.incarnation += 1
    # Early: an incarnation is worth nothing beyond this server's life, and anybody may ask for one.
    cookie = peer.session.send_cookie(world.incarnation)
    world.out.append(Send(peer.name, cookie, early=True, stranger=True))


def on_plan(world: World, peer: Peer, message: Message) -> None:
    """Accept the job's own plan, or, before there is a job, one that could become it.

    A PLAN without a body asks what the job is; the answer comes as soon as there is one.

    Raises:
        RemotePlanError: the plan is another one, cannot be run here, or is not what this server was
            pinned to.
    """
    if isinstance(message.body, memoryview) and not message.body.nbytes:
        peer.wants_job = True
        _tell_job(world, peer)
        return
    digest, body = peer.session.plan, peer.session.plan_body
    peer.session.plan_body = b""  # up to 1 MiB a peer, not needed again
    if world.job is not None:
        if digest != world.job.plan.digest:
            raise _another_job(peer, world.job.plan, Plan.parse(body, cuttable=False))
        return
    if digest not in world.offers:
        plan = Plan.parse(body)
        _check_offer(world, plan)
        if len(world.offers) >= MAX_OFFERS:
            del world.offers[next(iter(world.offers))]
        world.offers[digest] = plan


def on_join(world: World, peer: Peer, message: Message) -> None:
    """Put this peer in its rank's place and welcome it.

    Raises:
        FencedError: a newer process has this rank already.
        RemotePlanError: another rank's plan became the job meanwhile.
    """
    join = message.body
    assert isinstance(join, Join)
    session, rank = peer.session, peer.session.rank
    if not _may_speak_for(world, peer, rank) or not _take_plan(world, peer):
        return
    old = world.members.get(rank)
    if old is not None and old.incarnation > session.incarnation:
        msg = f"rank {rank} is held by a newer process (incarnation {old.incarnation})"
        raise FencedError(msg)
    if _comes_too_late(world, old, peer, join):
        return
    _take_over(world, old, peer)
    member, mode = _admit(world, old, peer, join)
    elastic.gather(world)
    world.counts.joins += 1
    world.progressed()
    assert world.job is not None
    welcome = Welcome(
        mode=mode,
        last_applied=member.last_applied,
        lease_s=world.settings.lease_s,
        init_wanted=rank == 0 and not world.has_weights,
        world_size=world.job.world_size,
        has_weights=world.has_weights,
        since=keeping.since(world, join.epoch),
    )
    fields = HeaderFields(round=world.round.number, version=world.version, seq=keeping.mark(world))
    world.say(peer, MessageType.WELCOME, welcome, **fields)
    if world.collection is not None:
        world.collection.parked.pop(rank, None)
        replaying.ask(world, member)
    world.log(
        "joined",
        rank=rank,
        world_size=world.job.world_size,
        incarnation=session.incarnation,
        mode=mode,
        host=join.host,
        pid=join.pid,
    )


def _may_speak_for(world: World, peer: Peer, rank: int) -> bool:
    """Whether a peer's key is that of this rank, and of all below it; if not, the peer is told."""
    branches = world.settings.branches
    branch = next((b for b in branches.items if b.rank == rank), None) if branches else None
    last = rank if branch is None else branch.last
    if peer.key is None or peer.key.ranks.covers(rank, last):
        return True
    text = (
        f"the key {peer.key.name!r} may speak for {peer.key.ranks.words}, not for "
        f"{Ranks(rank, last).words}: give each worker its own, see psq keys list"
    )
    world.end_conversation(peer, ErrorCode.REFUSED, text)
    return False


def _rank_exists(world: World, peer: Peer, rank: int) -> bool:
    """Whether the job has this rank, as far as anybody knows yet; if not, the peer is told."""
    size, branches = world.world_size, world.settings.branches
    if (size is None and branches is None) or rank in world.ranks:
        return True
    if branches is not None:
        text = f"rank {rank} does not belong here: this server's --children are {branches.text}"
    else:
        last = len(world.ranks) - 1
        text = f"rank {rank} does not exist: this job has ranks 0..{last} (world_size {size})"
    world.end_conversation(peer, ErrorCode.RANK, text)
    return False


def _check_offer(world: World, plan: Plan) -> None:
    pinned_size, pinned_recipe = world.settings.world_size, world.settings.recipe
    if pinned_size not in (None, plan.world_size):
        msg = (
            f"world_size: this server was started for {pinned_size} workers, "
            f"the plan says {plan.world_size}: make --world-size agree"
        )
        raise RemotePlanError(msg)
    if pinned_recipe not in (None, plan.recipe.name):
        msg = (
            f"recipe: this server was started for {pinned_recipe!r}, "
            f"the plan says {plan.recipe.name!r}: make --recipe agree"
        )
        raise RemotePlanError(msg)
    _check_branches(plan, world.settings)
    fault = elastic.refusal(plan, world.settings.min_workers)
    fault = fault or keeping.refusal(plan, world.settings.durability)
    if fault:
        raise RemotePlanError(fault)
    if world.settings.saves and not plan.recipe.apply.part.keeps_weights:
        msg = (
            f"recipe {plan.recipe.name!r}: this server was started with --save, but the weights "
            "are the workers' own: start it without, rank 0 saves them"
        )
        raise RemotePlanError(msg)
    check_fits(plan, world.settings.memory_bytes, world.settings.disk_bytes)
    try:
        plan.layout  # noqa: B018 - made here, where its errors are the peer's
    except LocalError as error:
        msg = f"the plan that came cannot be cut into shards: {error}"
        raise RemotePlanError(msg) from error


def _check_branches(plan: Plan, settings: Settings) -> None:
    if settings.branches is None:
        return
    fault = settings.branches.misfit(plan.world_size, is_root=settings.is_root)
    if not settings.is_root or any(branch.is_aggregator for branch in settings.branches.items):
        fault = fault or refusal(plan)
    fault = fault or split_group(plan, settings.branches)
    if fault:
        raise RemotePlanError(fault)


def _another_job(peer: Peer, mine: Plan, theirs: Plan) -> RemotePlanError:
    return RemotePlanError(
        f"rank {peer.session.rank} brings another plan: {mine.difference(theirs)}; "
        "start every rank with the same model, recipe and world size, or restart the server"
    )


def _take_plan(world: World, peer: Peer) -> bool:
    """Make the joiner's plan the job if there is none yet; False if it has no such rank."""
    plan = _plan_of(world, peer)
    if peer.session.rank >= plan.world_size:
        text = (
            f"rank {peer.session.rank} does not exist: its plan has ranks 0..{plan.world_size - 1}"
        )
        world.end_conversation(peer, ErrorCode.RANK, text)
        return False
    if world.job is None:
        adopt(world, plan)
    return True


def _plan_of(world: World, peer: Peer) -> Plan:
    """The plan that a joiner sent before, if it is, or may become, the job's."""
    digest = peer.session.plan
    if world.job is not None and digest == world.job.plan.digest:
        return world.job.plan
    plan = world.offers.get(digest)
    if plan is None:
        msg = "the plan was forgotten, because too many different ones came: join again"
        raise RemotePlanError(msg)
    if world.job is not None:
        raise _another_job(peer, world.job.plan, plan)
    return plan


def adopt(world: World, plan: Plan) -> None:
    """Make this plan the job; there is none yet."""
    world.job = Job(plan)
    world.level = keeping.level_of(world.settings, world.job)
    due = plan.due_shards(0)
    world.round = OpenRound(0, due, world.now_s, world.job.owed(due))
    if plan.replicas > 1:
        branches = world.settings.branches
        world.replicas = Replicas(groups_of(plan.world_size, plan.replicas, branches))
    world.versions = dict.fromkeys(world.job.shards, 0)
    world.job.is_whole = world.job.is_whole or keeping.closes_whole(plan, world.level)
    world.out.append(Adopt(plan, world.level, world.job.is_whole))
    world.log(
        "job",
        plan=f"{plan.digest:016x}",
        recipe=plan.recipe.name,
        world_size=plan.world_size,
        numel=plan.layout.numel,
        shards=len(world.job.shards),
        durability=world.level,
    )
    for peer in world.peers.strangers():
        _tell_job(world, peer)


def _tell_job(world: World, peer: Peer) -> None:
    """Answer a peer that asked what the job is, if there is one."""
    if world.job is None or not peer.wants_job or not peer.session.may_send(MessageType.JOB):
        return
    peer.wants_job = False
    job = peer.session.send_job(world.job.plan.body)
    world.out.append(Send(peer.name, job, early=True, stranger=True))


def _comes_too_late(world: World, old: Member | None, peer: Peer, join: Join) -> bool:
    """Whether this process would need weights that only the workers have; then it is told."""
    if world.need_job().keeps_weights or not any(world.versions.values()):
        return False
    if old is not None and may_continue(old, join) and _is_same(old, join):
        return False
    recipe = world.need_job().plan.recipe.name
    text = (
        f"rank {peer.session.rank} joins at round {world.round.number}, and this server has no "
        f"weights to give: in recipe {recipe!r} they are the workers' own after the first step; "
        "start the job again from what rank 0 saved"
    )
    world.end_conversation(peer, ErrorCode.REFUSED, text)
    return True


def _take_over(world: World, old: Member | None, peer: Peer) -> None:
    """Fence whoever spoke for this rank."""
    if old is None or old.peer in (None, peer.name):
        return
    assert old.peer is not None
    before = world.peers.get(old.peer)
    if before is not None:
        world.fence(before, f"rank {old.rank} was taken over by a process that joined later")
        world.log("fenced", "warning", rank=old.rank, incarnation=old.incarnation)


def _drop_unclaimed(world: World, rank: int, join: Join, *, same: bool) -> None:
    """Drop what is staged of this rank, unless the joiner says that it is its own."""
    mine = world.round.get(rank)
    if world.replicas is not None:
        covers.drop_unclaimed(world, world.replicas, rank, join, same=same)
    if not same:
        drawing.replace(world, rank)
        world.round.disown(rank)  # it counts, but its verdict is not this process's
    if mine is None or (same and join.pending == mine.base):
        return
    if world.round.drop(rank, forget=not same):
        world.log("dropped", "warning", rank=rank, round=world.round.number)


def _counts_already(world: World, old: Member | None, rank: int, join: Join) -> bool:
    """Whether something of the open round counts that the joiner has not said yet.

    It goes on from a copy that is older than that: to say it again would make it count twice.
    """
    closing = world.round.closing.get(rank)
    mine = closing or world.round.get(rank)
    if old is None or mine is None or not _is_same(old, join) or join.pending == mine.base:
        return False
    return closing is not None or bool(mine.counted)


def _is_same(old: Member, join: Join) -> bool:
    """Whether the joiner is the very process that spoke for the rank before."""
    return old.lineage == join.lineage


def _admit(
    world: World, old: Member | None, peer: Peer, join: Join
) -> tuple[Member, Literal["continue", "reset"]]:
    """The rank's new standing, and "continue" or "reset"."""
    rank, incarnation = peer.session.rank, peer.session.incarnation
    resumes = may_continue(old, join) and not _counts_already(world, old, rank, join)
    same = resumes and old is not None and _is_same(old, join)
    _drop_unclaimed(world, rank, join, same=same)
    if rank == 0 and not world.has_weights:
        world.init_parts.clear()  # another process's values: all of them, or none
    member = Member(
        rank=rank,
        incarnation=incarnation,
        seen_s=world.now_s,
        peer=peer.name,
        lineage=join.lineage if resumes else peer.session.fresh_lineage,
        base=world.version,
        process=(join.host, join.pid),
    )
    if old is not None and old.process not in {None, member.process}:
        world.is_exposed = True  # what that one had kept is gone
    if same and old is not None:
        member.last_applied, member.resolved = old.last_applied, old.resolved
        member.base = old.base
    member.since = elastic.first_round(world, member)
    world.members[rank] = member
    world.changed()
    world.peers.promote(peer)
    peer.complaints = 0
    if not resumes:
        world.counts.resets += 1
    return member, "continue" if resumes else "reset"

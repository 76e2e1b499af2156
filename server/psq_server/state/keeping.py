"""What of a job outlives its server: which versions become checkpoints, what waits for the disk.

    level         is kept                          who hears of a commit
    off           nothing                          everybody, at once
    checkpoint    version 0, and some versions     everybody, at once: what came after the last of
                                                   them is lost with the process
    journal       these, and each round between    nobody before the round is durable

Decided here: the level, when a checkpoint is due, what a STATUS may say while a commit is in
flight. What is held back until the disk has answered is the gate's to know (`psq_server.gate`).
"""

from __future__ import annotations

from typing import Final

from psq.plan import Plan
from psq_proto.messages import NONE, Kept, MessageType
from psq_proto.session import Message
from psq_server.state.events import (
    Blocked,
    Checkpoint,
    Checkpointed,
    DurabilityLevel,
    Durable,
)
from psq_server.state.job import Job
from psq_server.state.members import Member, Peer
from psq_server.state.world import Settings, World

__all__ = [
    "JOURNAL_ROUND_BYTES",
    "REPLAY_S",
    "announce",
    "announce_if_due",
    "begin_flight",
    "closes_whole",
    "durable_version",
    "level_of",
    "note_start",
    "on_disk",
    "on_kept",
    "resolved_before",
    "since",
]

JOURNAL_ROUND_BYTES: Final = 16_000_000
"""A round of more payload than this is not journaled unless that is asked for."""
REPLAY_S: Final = 1.0
"""A checkpoint is due when to reduce what came since the last took so long: a restart does it."""
MAX_STARTS: Final = 64
REPLAY_PAUSE_S: Final = 10.0
"""But no sooner than so long after the one before."""


def level_of(settings: Settings, job: Job) -> DurabilityLevel:
    """What of this job outlives the process."""
    if settings.durability != "auto":
        return settings.durability
    return "journal" if job.staged_bytes_limit <= JOURNAL_ROUND_BYTES else "checkpoint"


def closes_whole(plan: Plan, level: DurabilityLevel) -> bool:
    """Whether shards that could go out one by one must not.

    A shard may where a crash brings the same bytes again, or where a worker can go back and take
    the shard whole. With a mean it cannot: its residual has changed units, or no server has the
    weights. (Where ranks compute the same, a round is covered shard by shard, and closes so.)
    """
    return level == "journal" and plan.recipe.downlink.kind == "mean" and plan.replicas == 1


def announce_if_due(world: World) -> bool:
    """Tell the workers that the present version becomes a checkpoint, if it is time for one."""
    if world.level == "off" or world.is_writing or not _is_due(world):
        return False
    announce(world)
    return True


def announce(world: World, *, last: bool = False) -> None:
    """Make the present version a checkpoint, and tell the workers before anything that follows."""
    for member in world.members.values():
        if not member.gone:
            world.tell(member, MessageType.CKPT, b"", round=world.version, version=world.version)
    world.is_writing = True
    world.checkpoint_at_s = world.now_s
    world.checkpoint_due_s = world.now_s + world.settings.checkpoint_s
    world.checkpoint_version, world.replay_s = world.version, 0.0
    world.log("checkpoint", version=world.version)
    if last:
        world.out.append(Checkpoint(world.version, last=True))


def _is_due(world: World) -> bool:
    every = world.settings.checkpoint_every
    if every is not None and world.version - world.checkpoint_version >= every:
        return True
    if world.level == "journal" and world.replay_s >= REPLAY_S:
        return world.now_s >= min(world.checkpoint_due_s, world.checkpoint_at_s + REPLAY_PAUSE_S)
    return world.now_s >= world.checkpoint_due_s


# ---- what was lost between two processes


def note_start(world: World) -> None:
    """This process goes on from a version: what an earlier one made beyond it never happened.

    Of an earlier start at a later version nobody need know any more. Beyond MAX_STARTS the oldest
    are taken together, as if they had lost as much as the worst.
    """
    kept = [start for start in world.starts if start[1] < world.version]
    if len(kept) >= MAX_STARTS:
        kept[:2] = [(kept[1][0], kept[0][1])]
    world.starts = (*kept, (world.settings.epoch, world.version))


def since(world: World, epoch: int) -> int:
    """The newest version that is still what a worker knew in this epoch; NONE: all are."""
    if epoch > world.settings.epoch:  # an old copy of the directory was put back
        return world.start_version
    return min((v for e, v in world.starts if NONE < epoch < e), default=NONE)


# ---- while a commit is in flight


def begin_flight(world: World, ranks: dict[int, Member]) -> None:
    """The present version is not durable yet; these ranks get a verdict with it."""
    if world.is_logged:
        world.in_flight[world.version] = {
            rank: NONE if member.resolved is None else member.resolved.seq
            for rank, member in ranks.items()
        }


def durable_version(world: World) -> int:
    """The newest version that a crash does not take back."""
    return min(world.in_flight, default=world.version + 1) - 1


def resolved_before(world: World, rank: int) -> int | None:
    """What was resolved of a rank before the commits in flight; None if they say nothing of it."""
    return next((before[rank] for before in world.in_flight.values() if rank in before), None)


def on_disk(world: World, event: Durable | Blocked | Checkpointed) -> None:
    """What the disk answers: rounds are there, a checkpoint is or cannot be, or it refuses."""
    match event:
        case Durable():
            for version in [version for version in world.in_flight if version <= event.version]:
                del world.in_flight[version]
        case Blocked():
            world.disk = event.text
        case Checkpointed():
            if event.version == world.checkpoint_version:  # and not of the initial weights, late
                world.is_writing = False
            if event.text:  # there is another one in its time
                world.log("no-checkpoint", "error", version=event.version, text=event.text)


def on_kept(world: World, peer: Peer, message: Message) -> None:
    """A worker has a copy of its own that goes with a checkpoint."""
    member, kept = world.member_of(peer), message.body
    assert isinstance(kept, Kept)
    assert member is not None, peer.session.rank
    if message.header.version <= world.version:
        member.kept = max(member.kept, message.header.version)

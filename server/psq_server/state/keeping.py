"""What of a job outlives its server: which versions become checkpoints, what waits for the disk.

    level         is kept                          who hears of a commit
    off           nothing                          everybody, at once
    checkpoint    version 0, and some versions     everybody, at once: what came after the last of
                                                   them is lost with the process
    replay        these, and of each round         nobody before that is durable
                  between who said what; the
                  workers keep the payloads
    journal       these, and each round between    nobody before the round is durable

Decided here: the level, when a checkpoint is due, what workers have to keep, what a STATUS may say
while a commit is in flight. What is held back until the disk has answered is the gate's to know
(`psq_server.gate`).
"""

from __future__ import annotations

from typing import Final

from psq.plan import Plan
from psq_proto.messages import NONE, Kept, MessageType
from psq_proto.session import HeaderFields, Message
from psq_server.state.events import (
    LOGGED,
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
    "full_words",
    "holds_goodbye",
    "is_full",
    "kept_rounds",
    "level_of",
    "mark",
    "note_start",
    "on_disk",
    "on_kept",
    "refusal",
    "resolved_before",
    "since",
    "try_again",
]

JOURNAL_ROUND_BYTES: Final = 16_000_000
"""A round of more payload than this is not journaled unless that is asked for."""
REPLAY_S: Final = 1.0
"""A checkpoint is due when to reduce what came since the last took so long: a restart does it."""
MAX_STARTS: Final = 64
REPLAY_PAUSE_S: Final = 10.0
"""But no sooner than so long after the one before."""
RETRY_S: Final = 1.0
"""When rounds wait for a checkpoint, and one has failed, the next is tried after so long."""
MIN_KEPT_ROUNDS: Final = 2
"""Workers keep so many rounds, whatever these take: one while the other becomes a checkpoint."""


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
    return level in LOGGED and plan.recipe.downlink.kind == "mean" and plan.replicas == 1


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
            fields = HeaderFields(round=world.version, version=world.version, seq=mark(world))
            world.tell(member, MessageType.CKPT, b"", **fields)
    world.is_writing, world.is_exposed = True, False
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
    if world.level == "replay":
        since = world.version - world.checkpoint_version
        if world.is_exposed or since >= kept_rounds(world) // 2:
            return True
    if world.level in LOGGED and world.replay_s >= REPLAY_S:
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


# ---- what the workers keep


def refusal(plan: Plan, durability: str) -> str:
    """Why this job cannot run at this level, in words; empty if it can."""
    if durability != "replay" or plan.replicas == 1:
        return ""
    return (
        f"--durability replay: with aggregate={plan.recipe.aggregate.kind} what ranks that compute "
        "the same say late belongs to rounds that are over: choose journal or checkpoint"
    )


def mark(world: World) -> int:
    """What WELCOME, STATUS and CKPT say of the disk: workers let go what is older than that.

    0: they need keep nothing.
    """
    keeps = world.level == "replay" or world.collection is not None
    return world.written_version + 1 if keeps else 0


def kept_rounds(world: World) -> int:
    """Of how many rounds workers keep what they said, at most."""
    job = world.need_job()
    round_bytes = max(1, job.staged_bytes_limit // job.world_size)
    return max(MIN_KEPT_ROUNDS, world.settings.kept_bytes // round_bytes)


def is_full(world: World) -> bool:
    """Whether rounds wait for a checkpoint, so that workers need not keep more than they may."""
    if world.level != "replay" or not world.has_weights:
        return False
    return world.version - world.written_version >= kept_rounds(world)


def full_words(world: World) -> str:
    """That wait in words."""
    return (
        f"waiting for a checkpoint on disk: workers keep what they said in "
        f"{kept_rounds(world)} rounds at most, since version {world.written_version}"
    )


def try_again(world: World) -> None:
    """Begin the checkpoint anew that rounds wait for, if it could not be written.

    Workers are not told: their own copies would come too late.
    """
    if world.is_writing or not is_full(world) or world.round.closed or world.ending is not None:
        return
    if world.now_s - world.checkpoint_at_s >= RETRY_S:
        world.is_writing, world.checkpoint_at_s = True, world.now_s
        world.checkpoint_version = world.version
        world.out.append(Checkpoint(world.version))


def holds_goodbye(world: World, member: Member) -> bool:
    """Whether a rank that has left is to stay a while: what it said is on no disk yet."""
    if world.collection is not None:
        return True
    is_said = member.resolved is not None and member.resolved.version > world.written_version
    return world.level == "replay" and is_said


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
            if not event.text:
                world.written_version = max(world.written_version, event.version)
            if event.text:  # there is another one in its time
                if world.level == "replay":  # workers cannot let go what they keep
                    soon_s = world.now_s + REPLAY_PAUSE_S
                    world.checkpoint_due_s = min(world.checkpoint_due_s, soon_s)
                world.log("no-checkpoint", "error", version=event.version, text=event.text)


def on_kept(world: World, peer: Peer, message: Message) -> None:
    """A worker has a copy of its own that goes with a checkpoint."""
    member, kept = world.member_of(peer), message.body
    assert isinstance(kept, Kept)
    assert member is not None, peer.session.rank
    if message.header.version <= world.version:
        member.kept = max(member.kept, message.header.version)

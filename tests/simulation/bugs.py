# ruff: noqa: ARG005, FBT003 - a patch has the arguments of what it replaces
"""Mistakes made on purpose, one function each: a simulator that misses one of them lacks something.

Each is a patch of the product (of the disk, where the real one is files) and a case that gives it
room to do harm. `test_bugs` shows that each is found within so many seeds, and that the very seed
that finds it has no violation without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final
from unittest.mock import patch

from psq import clock
from psq.client import held
from psq.client.epochs import Epochs
from psq.client.machine import Machine
from psq.client.replica import ReplicaVersions
from psq.client.said import Said
from psq.client.speech import Speech
from psq_proto.frames import Header
from psq_proto.messages import NONE, Flags, MessageType
from psq_server import gate, recovery
from psq_server.commits import Commits
from psq_server.state import durable, joining, keeping, presence, training
from psq_server.state.ledger import Ledger
from psq_server.state.members import Member
from psq_server.state.round import Contribution, OpenRound
from psq_server.state.world import World

from . import disk
from .arithmetic import GRAIN, numbers, pack

__all__ = ["PLANTED", "Planted"]

KEPT: Final[Mapping[str, Any]] = {"durability": "journal", "server_crashes": 2}
SET_BACK: Final[Mapping[str, Any]] = {
    "durability": "checkpoint",
    "checkpoint_every": 2,
    "copies": 1.0,
    "server_crashes": 2,
    "worker_crashes": 2,
}
RECALLS: Final[Mapping[str, Any]] = {"durability": "replay", "server_crashes": 3}
SEEDS: Final = 60
ROUND: Final = gate.RecordKind.ROUND


@dataclass(frozen=True, slots=True)
class Planted:
    """One mistake.

    Attributes:
        what: it comes to.
        plant: makes it, while the context lasts.
        given: choices of the case.
        seeds: within so many it is found.
        start: the first of them.
    """

    what: str
    plant: Callable[[], AbstractContextManager[object]]
    given: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = SEEDS
    start: int = 0


def _around(owner: object, name: str, make: Callable[[Any], Any]) -> Callable[[], Any]:
    """A patch of a function by one that is made of it."""
    return lambda: patch.object(owner, name, make(getattr(owner, name)))


def _instead(owner: object, name: str, value: object) -> Callable[[], Any]:
    return lambda: patch.object(owner, name, value)


# ---- the mistakes that take more than a line


def _recompress(say_again: Callable[..., None]) -> Callable[..., None]:
    def again(speech: Speech, current: Any, missing: Any) -> None:
        for shard in current.pushed:
            payload = speech._frames.said(shard)
            value, ticket = numbers(payload.data)
            payload[:] = bytearray(pack(value + GRAIN, ticket))
        say_again(speech, current, missing)

    return again


def _restore_without_verdicts(restore: Callable[..., None]) -> Callable[..., None]:
    def restored(world: World, *args: Any) -> None:
        restore(world, *args)
        for member in world.members.values():
            member.resolved = None

    return restored


def _restore_without_lineages(restore: Callable[..., None]) -> Callable[..., None]:
    def restored(world: World, *args: Any) -> None:
        restore(world, *args)
        for member in world.members.values():
            member.lineage = 0

    return restored


def _sync_first(admit: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    def admitted(self: gate.Gate, *args: Any) -> list[Any]:
        steps = admit(self, *args)
        rounds = [s for s in steps if isinstance(s, gate.Append) and s.kind == ROUND]
        return [step for step in steps if step not in rounds] + rounds

    return admitted


def _stage_twice(repeats: Callable[..., bool]) -> Callable[..., bool]:
    def told(member: Member, mine: Any, header: Header) -> bool:
        if header.shard in mine.counted:
            mine.counted.discard(header.shard)
            mine.checksums.pop(header.shard)
            return False
        return repeats(member, mine, header)

    return told


def _reuse_payloads(reduce: Callable[..., Any]) -> Callable[..., Any]:
    """The shards of an open round that a crash left are taken for those of the next."""

    def taken(self: Any, records: Any) -> Any:
        with patch.object(type(self), "_forget_round", lambda _: None):
            return reduce(self, records)

    return taken


def _forget_counted(drop: Callable[..., None]) -> Callable[..., None]:
    def dropped(world: World, rank: int, join: Any, *, same: bool) -> None:
        drop(world, rank, join, same=same)
        mine = world.round.get(rank)
        if mine is not None:
            for shard in mine.counted:
                mine.checksums.pop(shard)
            mine.counted.clear()

    return dropped


def _keep_partial(drop: Callable[..., bool]) -> Callable[..., bool]:
    return lambda self, rank, *, forget=True: drop(self, rank) if forget else False


def _apply_again(wants: Callable[..., bool]) -> Callable[..., bool]:
    def wanted(self: ReplicaVersions, header: Header, body_bytes: int) -> bool:
        if wants(self, header, body_bytes):
            return True
        delta = bool(header.flags & Flags.DELTA)
        return delta and header.version == self.versions[header.shard]

    return wanted


def _restore_nothing(self: Machine) -> Any:
    current, self.round = self._open(), None
    return current


def _always_early(say: Callable[..., None]) -> Callable[..., None]:
    def said(self: World, *args: Any, early: bool = False, **fields: Any) -> None:
        del early
        say(self, *args, early=True, **fields)

    return said


def _drop_at_announcement(hear: Callable[..., None]) -> Callable[..., None]:
    def heard(self: Said, header: Header, body: Any) -> None:
        hear(self, header, body)
        if header.type is MessageType.CKPT and header.seq:
            self.told(header.version + 1)

    return heard


def _keep_views(note: Callable[..., None]) -> Callable[..., None]:
    def noted(self: Said, ended: Any) -> None:
        note(self, ended)
        kept = self._kept.get(ended.number)
        if kept is not None:
            for shard in kept.shards:
                kept.shards[shard] = (kept.shards[shard][0], self._frames.said(shard).data)

    return noted


def _always_applied(settle: Callable[..., None]) -> Callable[..., None]:
    def settled(self: Ledger, rank: int, seq: int, *, applied: bool) -> None:
        del applied
        settle(self, rank, seq, applied=True)

    return settled


def _restore_unvisited(restore: Callable[..., None]) -> Callable[..., None]:
    return lambda self, plain: restore(self, {**plain, "visited": []})


def _nothing(*_: Any, **__: Any) -> None:
    return None


PLANTED: Final[Mapping[str, Planted]] = {
    "recompress-on-retry": Planted(
        "a shard that is sent again is encoded again",
        _around(Speech, "again", _recompress),
        {"cuts": 2, "flips": 2},
    ),
    "drop-rejected": Planted(
        "what a server refused is not folded back",
        _instead(Machine, "end_round", _restore_nothing),
        {"judged": True, "servers": 1, "every": 1},
    ),
    "never-say-again": Planted(
        "what was lost on the way is not sent again",
        _instead(Speech, "again", _nothing),
        {"cuts": 2},
    ),
    "apply-delta-twice": Planted(
        "weights that come again are added again",
        _around(ReplicaVersions, "wants", _apply_again),
        {"downlink": "delta", "doubles": 2},
    ),
    "keep-uncommitted-weights": Planted(
        "a worker keeps shards of a round that a crash took back",
        _instead(Epochs, "enter", lambda self, epoch, version, **_: False),
        {**KEPT, "consistency": "bsp", "judged": False},
        seeds=300,
    ),
    "keep-stale-stage": Planted(
        "what the process before had staged is taken for the new one's",
        _instead(joining, "_drop_unclaimed", _nothing),
        {"worker_crashes": 3, "keeps": 0.0, "slow": 0, "consistency": "bsp", "judged": False},
    ),
    "forget-fencing": Planted(
        "who had the rank before is not sent away",
        _instead(joining, "_take_over", _nothing),
        {"worker_crashes": 2},
    ),
    "verdict-not-repeated": Planted(
        "a worker that lost its verdict never gets it",
        _instead(training, "repeat_verdict", _nothing),
        {"cuts": 2, "flips": 2},
        seeds=300,
    ),
    "told-refused-what-counts": Planted(
        "a verdict names shards that count",
        _instead(Contribution, "uncounted", lambda self, shards: tuple(sorted(self.counted))),
        {"judged": False},
    ),
    "counted-shards-forgotten": Planted(
        "what was reduced of a rank is said again, and refused",
        _around(joining, "_drop_unclaimed", _forget_counted),
        {"cuts": 4, "say_s": 0.3, "shards": 3, "consistency": "bsp", "judged": False},
        seeds=300,
    ),
    "count-twice": Planted(
        "a shard that comes again counts again",
        _around(training, "_repeats", _stage_twice),
        {"doubles": 12, "consistency": "bsp"},
    ),
    "late-counts": Planted(
        "a contribution counts however stale it is",
        _instead(clock, "may_apply", lambda *_, **__: True),
        {"consistency": "bsp,quorum=1,mads=1", "slow": 0, "rounds": 12},
        seeds=300,
    ),
    "ack-before-fsync": Planted(
        "verdicts leave before the disk has answered",
        _instead(gate.Gate, "_pass", lambda self, action, steps: steps.append(action)),
        KEPT,
    ),
    "all-is-early": Planted(
        "control messages do not wait for the disk",
        _around(World, "say", _always_early),
        KEPT,
    ),
    "fsync-before-append": Planted(
        "the record of a round is appended after the sync that it waits for",
        _around(gate.Gate, "admit", _sync_first),
        KEPT,
        seeds=200,
    ),
    "status-of-what-is-not-durable": Planted(
        "STATUS says what a crash may take back",
        _instead(keeping, "durable_version", lambda world: world.version),
        KEPT,
    ),
    "whole-weights-too-early": Planted(
        "whole shards are made while a commit is in flight",
        _instead(Commits, "is_busy", False),
        {**KEPT, "cuts": 2, "slow_disks": 2, "consistency": "asp"},
        seeds=300,
    ),
    "verdicts-lost-in-recovery": Planted(
        "a server that comes back does not know what it had resolved",
        _around(durable, "restore", _restore_without_verdicts),
        KEPT,
        seeds=300,
    ),
    "lineages-lost-in-recovery": Planted(
        "a server that comes back takes every residual for a stranger's",
        _around(durable, "restore", _restore_without_lineages),
        KEPT,
    ),
    "membership-not-recorded": Planted(
        "what changes between two commits is not in the journal",
        _instead(World, "changed", _nothing),
        {**KEPT, "rounds": 4},
        seeds=300,
    ),
    "open-round-replayed": Planted(
        "shards of a round that a crash cut short are replayed into the next",
        _around(recovery._Replay, "take", _reuse_payloads),
        {**KEPT, "server_crashes": 3, "checkpoint_every": 0, "skips": True, "say_s": 0.2},
        seeds=300,
    ),
    "torn-tail-believed": Planted(
        "a record is read without its checksum",
        _instead(disk, "is_whole", lambda header, body: True),
        KEPT,
        seeds=200,
    ),
    "pruned-too-early": Planted(
        "the journal goes on from the newest checkpoint only",
        _instead(disk, "pruned_to", lambda images: images[-1].journal_from),
        {**KEPT, "checkpoint_every": 1, "rot": 1.0},
        seeds=200,
    ),
    "kept-payloads-dropped-too-early": Planted(
        "a worker lets go what it said before a checkpoint that is not on the server's disk yet",
        _around(Said, "hear", _drop_at_announcement),
        {**RECALLS, "checkpoint_every": 2},
        seeds=200,
    ),
    "kept-payloads-not-copied": Planted(
        "a worker keeps buffers that it encodes the next round into",
        _around(Said, "note", _keep_views),
        RECALLS,
    ),
    "not-asked-again": Planted(
        "what a server asked for once, and did not get, it waits for for ever",
        _instead(presence.replaying, "on_beat", _nothing),
        {**RECALLS, "flips": 30, "checkpoint_every": 0, "data": 0},
        seeds=300,
    ),
    "evicted-and-counted": Planted(
        "what a rank that was given up had said in part stays in the round",
        _around(OpenRound, "drop", _keep_partial),
        {"min_workers": 1, "servers": 1, "worker_crashes": 3, "say_s": 0.3, "shards": 3},
        seeds=200,
    ),
    "held-not-told": Planted(
        "servers wait in a ring, one for the worker that the other holds",
        _instead(held, "tell", _nothing),
        start=319_704,
        seeds=1,
    ),
    "set-back-and-overtaken": Planted(
        "a server does not say that it was set back, and is further by now",
        _instead(keeping, "since", lambda world, epoch: NONE),
        SET_BACK,
        seeds=300,
    ),
    "older-copy-believed": Planted(
        "a worker goes on from a copy, although later contributions of its rank count",
        _instead(joining, "may_continue", lambda old, join: True),
        {**SET_BACK, "durability": "journal", "keeps": 0.0, "worker_crashes": 3},
    ),
    "copy-before-what-counts": Planted(
        "a worker goes on from a copy, although a shard of its open contribution counts",
        _instead(joining, "_counts_already", lambda *_: False),
        {
            **KEPT,
            "server_crashes": 0,
            "consistency": "bsp",
            "judged": False,
            "copies": 1.0,
            "checkpoint_every": 1,
            "worker_crashes": 3,
            "keeps": 0.0,
            "say_s": 0.3,
        },
    ),
    "rejected-data-visited": Planted(
        "the data of a contribution that does not count are not handed out again",
        _around(Ledger, "settle", _always_applied),
        {"data": 7, "judged": True, "servers": 1, "every": 1, "skips": False},
    ),
    "visited-forgotten": Planted(
        "a server that comes back hands out again what was visited",
        _around(Ledger, "restore", _restore_unvisited),
        {**KEPT, "data": 12, "every": 1, "skips": False, "rounds": 6},
    ),
    "verdict-settled-twice": Planted(
        "a contribution stays open after its round",
        _around(
            OpenRound,
            "following",
            lambda following: lambda self, *args: _with_contributions(self, following(self, *args)),
        ),
        {"consistency": "asp"},
    ),
}


def _with_contributions(before: OpenRound, after: OpenRound) -> OpenRound:
    after._contributions = {**before.closing, **after._contributions}
    return after

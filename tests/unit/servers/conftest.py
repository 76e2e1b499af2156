"""Servers that keep books: a model of the rules, and the real one's state machine.

`world` is whatever carries their frames: `world.down(peer, frame)`, `world.next_incarnation()` and
`world.now_s` are all they ask of it.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from psq.clock import may_apply, parse_consistency
from psq.codec import get_codec
from psq.errors import PsqError
from psq.plan import Plan
from psq_proto.frames import Header, encode_frame
from psq_proto.messages import NO_SHARD, NONE, Fenced, Flags, MessageType, Status, Verdict, Welcome
from psq_proto.session import ServerSession, State
from psq_server import state

RUN_ID = b"r" * 16
FP32 = get_codec("fp32").wire_id


@pytest.fixture(scope="session")
def books() -> dict[str, type]:
    """The kinds of servers."""
    return {"model": Book, "real": RealBook}


@dataclass
class Said:
    """A contribution as a server has it: an array, or None for nothing."""

    base: int
    lineage: int
    shards: dict[int, np.ndarray | None] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)


class Book:
    """One server: its weights, its rounds, and every payload that counted."""

    def __init__(self, plan: Plan, world: Any) -> None:
        self.plan, self.world = plan, world
        self.rule = parse_consistency(plan.consistency)
        self.owned = [shard.index for shard in plan.owned]
        numels = {shard.index: shard.numel for shard in plan.owned}
        self.x = {k: np.zeros(numel, np.float32) for k, numel in numels.items()}
        self.versions = dict.fromkeys(self.owned, 0)
        self.round = 0
        self.sessions: dict[bytes, ServerSession] = {}
        self.holder: dict[int, bytes] = {}
        self.said: dict[int, Said] = {}
        self.bases: dict[int, int] = {}
        self.last: dict[int, tuple[int, Verdict, int]] = {}
        self.applied: Counter[tuple[int, ...]] = Counter()
        self.finished: set[int] = set()
        self.stalest = 0
        self.history = {(k, 0): self.x[k].tobytes() for k in self.owned}

    # ---- frames in

    def hear(self, peer: bytes, frame: bytes) -> None:
        session = self.sessions.setdefault(peer, ServerSession(run_id=RUN_ID, epoch=1))
        try:
            header, body = session.receive(frame)
        except PsqError as error:
            self.world.down(peer, session.answer(error))
            return
        getattr(self, f"on_{header.type.name.lower()}")(peer, session, header, body)

    def on_hello(self, peer, session, *_) -> None:
        self.world.down(peer, session.send_cookie(self.world.next_incarnation()))

    def on_plan(self, *_) -> None:
        pass

    def on_join(self, peer, session, _, body) -> None:
        rank, before = session.rank, self.holder.get(session.rank)
        if before not in (None, peer):
            old = self.sessions[before]
            if old.may_send(MessageType.FENCED):
                fenced = old.send(MessageType.FENCED, Fenced("a newer process"))
                self.world.down(before, fenced)
        self.holder[rank] = peer
        self.bases.setdefault(rank, self.round)
        said = self.said.get(rank)
        if said is not None and (said.lineage, said.base) != (body.lineage, body.pending):
            for shard in [k for k in said.shards if self.versions[k] == said.base]:
                del said.shards[shard]
            said.lineage = body.lineage
            said.refused = set(said.shards)  # reduced already, with what was said before
            if not self.rule.eager:
                del self.said[rank]
        welcome = Welcome(
            mode="continue",
            last_applied=NONE,
            lease_s=10.0,
            init_wanted=False,
            world_size=self.plan.world_size,
            has_weights=True,
        )
        self.world.down(peer, session.send(MessageType.WELCOME, welcome, version=self.round))

    def on_pull(self, peer, session, *_) -> None:
        for shard in self.owned:
            self.world.down(peer, self.weights(shard, self.x[shard], Flags.FULL))
        self.bases[session.rank] = max(self.bases[session.rank], self.round)

    def on_leave(self, _, session, *__) -> None:
        self.finished.add(session.rank)

    def on_heartbeat(self, peer, session, *_) -> None:
        said = self.said.get(session.rank)
        missing = [k for k in self.owned if said is None or k not in said.shards]
        resolved = self.last[session.rank][0] if session.rank in self.last else NONE
        status = Status(
            self.round, min(self.versions.values()), missing=tuple(missing), resolved=resolved
        )
        self.world.down(peer, session.send(MessageType.STATUS, status))

    def on_push(self, _, session, header, body) -> None:
        rank = session.rank
        seq, verdict, version = self.last.get(rank, (NONE, None, 0))
        if header.seq <= seq:
            if header.seq == seq:
                self.tell(rank, seq, verdict, version)
            return
        if not may_apply(header.seq, self.round, self.rule):
            self.reject(rank, header.seq)
            return
        said = self.said.setdefault(rank, Said(header.seq, session.lineage))
        assert said.base == header.seq, "a second contribution before the verdict of the first"
        if header.shard == NO_SHARD:
            for shard in self.owned:
                said.shards.setdefault(shard, None)
        else:
            self.take(said, header, body)
        if self.rule.eager:
            self.reduce()

    def take(self, said: Said, header: Header, body: memoryview) -> None:
        shard = header.shard
        if shard in said.shards:
            return
        said.shards[shard] = None
        if Flags.SKIP in header.flags:
            return
        values = np.frombuffer(bytes(body), "<f4")
        if not np.isfinite(values).all():
            said.refused.add(shard)
        else:
            said.shards[shard] = values

    # ---- rounds

    def reduce(self) -> None:
        """Eager: each shard as soon as every rank has said it."""
        ranks = range(self.plan.world_size)
        for shard in self.owned:
            ready = all(rank in self.said and shard in self.said[rank].shards for rank in ranks)
            if ready and self.versions[shard] == self.round:
                self.step(shard, list(self.said.values()))
        if all(version > self.round for version in self.versions.values()):
            self.commit(tuple(ranks))

    def close(self) -> None:
        """Lazy: the whole round, once somebody is complete and nobody would become too stale."""
        done = [r for r, s in self.said.items() if len(s.shards) == len(self.owned)]
        busy = set(range(self.plan.world_size)) - self.finished
        missing = busy.difference(done)
        bound = self.rule.max_staleness
        if not done or (
            self.rule.kind == "ssp"
            and any(self.round + 1 - self.bases.get(r, self.round) > bound for r in missing)
        ):
            return
        self.stalest = max(self.stalest, *(self.round - self.said[rank].base for rank in done))
        for shard in self.owned:
            self.step(shard, [self.said[rank] for rank in done])
        self.commit(tuple(done))
        for rank, said in list(self.said.items()):
            if not may_apply(said.base, self.round, self.rule):
                self.reject(rank, said.base)

    def step(self, shard: int, contributions: list[Said]) -> None:
        delta = np.zeros_like(self.x[shard])
        for said in contributions:
            values = said.shards[shard]
            if values is not None:
                count(self.applied, delta, values)
        self.x[shard] += delta
        self.versions[shard] += 1
        self.history[shard, self.versions[shard]] = self.x[shard].tobytes()
        frame = self.weights(shard, delta, Flags.DELTA)
        for peer, session in self.sessions.items():
            if session.state is State.JOINED and self.holder.get(session.rank) == peer:
                self.world.down(peer, frame)

    def commit(self, ranks: tuple[int, ...]) -> None:
        self.round += 1
        for rank in ranks:
            said = self.said.pop(rank)
            refused = tuple(sorted(said.refused))
            verdict = Verdict("applied", "odd" if refused else "", 0.0, refused)
            self.resolve(rank, said.base, verdict)

    def reject(self, rank: int, seq: int) -> None:
        self.said.pop(rank, None)
        self.resolve(rank, seq, Verdict("rejected", "too stale"))

    def resolve(self, rank: int, seq: int, verdict: Verdict) -> None:
        self.last[rank] = (seq, verdict, self.round)
        self.bases[rank] = self.round
        self.tell(rank, seq, verdict, self.round)

    def tell(self, rank: int, seq: int, verdict: Verdict, version: int) -> None:
        session = self.sessions[self.holder[rank]]
        if session.may_send(MessageType.VERDICT):
            frame = session.send(MessageType.VERDICT, verdict, seq=seq, version=version)
            self.world.down(self.holder[rank], frame)

    def weights(self, shard: int, values: np.ndarray, flags: Flags) -> bytearray:
        return weights_frame(self.plan, shard, self.versions[shard], values, flags)

    def tick(self) -> None:
        if not self.rule.eager:
            self.close()


class RealBook:
    """The server's own state machine, with a reducer that adds up and keeps book."""

    def __init__(self, plan: Plan, world: Any) -> None:
        self.plan, self.world = plan, world
        self.owned = [shard.index for shard in plan.owned]
        self.x = {shard.index: np.zeros(shard.numel, np.float32) for shard in plan.owned}
        self.versions = dict.fromkeys(self.owned, 0)
        self.history = {(k, 0): self.x[k].tobytes() for k in self.owned}
        self.applied: Counter[tuple[int, ...]] = Counter()
        self.stalest = 0
        self.state = state.ServerState(state.Settings(run_id=RUN_ID), 0.0)
        self.stopped = False

    def hear(self, peer: bytes, frame: bytes) -> None:
        self.handle(state.FrameReceived(peer, frame))

    def tick(self) -> None:
        self.handle(state.Tick())

    def gone(self, peer: bytes) -> None:
        self.handle(state.PeerGone(peer))

    def handle(self, event: state.Event) -> None:
        events = deque([event])
        while events and not self.stopped:
            for action in self.state.handle(events.popleft(), self.world.now_s):
                self.do(action, events)
            if not self.stopped:
                self.state.validate()

    def do(self, action: state.Action, events: deque) -> None:  # noqa: C901 - a case an action
        match action:
            case state.Send(peer, frame) | state.Echo(peer, frame):
                self.world.down(peer, frame)
            case state.Broadcast(peers, _, frames, _):
                for peer in peers:
                    for frame in frames:
                        self.world.down(peer, frame)
            case state.SendFull(peers, versions):
                for shard in versions:
                    frame = self.weights(shard, self.x[shard], Flags.FULL)
                    for peer in peers:
                        self.world.down(peer, frame)
            case state.Reduce(round_, shard, said, _):
                delta = np.zeros_like(self.x[shard])
                for one in said:
                    count(self.applied, delta, np.frombuffer(bytes(one.payload), "<f4"))
                self.x[shard] += delta
                self.versions[shard] = round_ + 1
                self.history[shard, round_ + 1] = self.x[shard].tobytes()
                frame = self.weights(shard, delta, Flags.DELTA)
                events.append(state.ShardReduced(round_, shard, frame, 0.001))
            case state.Committed(_, staleness):
                self.stalest = max(self.stalest, *staleness, 0)
            case state.Stop():
                self.stopped = True

    def weights(self, shard: int, values: np.ndarray, flags: Flags) -> bytearray:
        return weights_frame(self.plan, shard, self.versions[shard], values, flags)


NAME = 3  # the first values of a payload: whose it is, of which step, which shard


def count(applied: Counter, delta: np.ndarray, values: np.ndarray) -> None:
    """Add a payload up, and write down its name."""
    delta[NAME:] += values[NAME:]
    applied[tuple(int(value) for value in values[:NAME])] += 1


def weights_frame(
    plan: Plan, shard: int, version: int, values: np.ndarray, flags: Flags
) -> bytearray:
    header = Header(
        MessageType.WEIGHTS, run_id=RUN_ID, epoch=1, plan=plan.digest, codec=FP32,
        flags=flags, version=version, shard=shard,
    )  # fmt: skip
    return encode_frame(header, values.tobytes())

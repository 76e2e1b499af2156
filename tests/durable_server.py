"""A server without sockets, on a real disk, with scripted workers: for tests that end it early.

The state machine, the gate, the store and the weights are the real ones; what the loop does with
actions is done here. Workers say random values, the same in every run of the same seed.
"""

from __future__ import annotations

import io
import select
from collections import deque
from pathlib import Path

import numpy as np

from psq.codec import ShardCodec, get_codec
from psq.durable import StateDirectory
from psq.layout import PART_NUMEL, part_count
from psq.plan import Plan
from psq.rules import make_choice
from psq_proto.messages import (
    NO_VERSION,
    NONE,
    Flags,
    Hello,
    Join,
    Leave,
    MessageType,
    Recall,
    Verdict,
)
from psq_proto.session import WorkerSession
from psq_server.commits import Answer, Commits
from psq_server.line_log import LineLog
from psq_server.recovery import recover
from psq_server.retaking import retake
from psq_server.state import (
    Adopt,
    Broadcast,
    FrameReceived,
    GoBack,
    Initialize,
    Judge,
    Log,
    Reduce,
    Retake,
    Retaken,
    Save,
    Send,
    SendFull,
    ServerState,
    Settings,
    ShardReduced,
    Stop,
)
from psq_server.state.durable import Rest
from psq_server.state.events import LOGGED
from psq_server.store import Store
from psq_server.weights import Weights

END_S = 30.0


def values(numel, *seed, scale=0.1):
    return np.random.default_rng(seed).normal(0, scale, numel).astype(np.float32)


class Speaker:
    """One rank: says what it is told to, and keeps what it hears."""

    def __init__(self, server, rank, lineage=None):
        self.server, self.plan, self.rank = server, server.plan, rank
        self.lineage = 100 + rank if lineage is None else lineage
        self.name = b"peer-%d-%d" % (rank, server.connections)
        server.connections += 1
        server.peers[self.name] = self
        self.session = WorkerSession(rank=rank, plan_body=self.plan.body)
        self.heard = []
        self.verdicts = {}
        self.said = {}  # (contribution, shard) -> codec, payload
        self.forgets = False
        self.recalls = []

    def send(self, kind, body=b"", **fields):
        frame = self.session.send(kind, body, **fields)
        self.server.happen(FrameReceived(self.name, memoryview(bytes(frame))))

    def deliver(self, frame):
        message = self.session.receive(memoryview(bytes(frame)))
        self.heard.append(message)
        if isinstance(message.body, Verdict):
            self.verdicts[message.header.seq] = message.body
        if isinstance(message.body, Recall):
            self.recalls.append((message.header.seq, message.body.shards))
            self.server.replies.extend(self.again(*self.recalls[-1]))

    def again(self, seq, shards):
        """What this rank says when it is asked for what it said."""
        if self.forgets:
            return [self._later(MessageType.AGAIN, flags=Flags.SKIP, seq=seq)]
        said = [(shard, *self.said[seq, shard]) for shard in shards]
        return [self._later(MessageType.AGAIN, p, codec=c, shard=s, seq=seq) for s, c, p in said]

    def _later(self, kind, body=b"", **fields):
        return FrameReceived(self.name, memoryview(bytes(self.session.send(kind, body, **fields))))

    def join(self, resolved=NONE, pending=NONE):
        self.send(MessageType.HELLO, Hello(self.rank + 1))
        self.server.settle()
        self.send(MessageType.PLAN, self.plan.body)
        self.send(MessageType.JOIN, Join(self.lineage, resolved, pending))
        self.server.settle()
        return self

    def init(self):
        for shard in self.plan.owned:
            x = values(shard.numel, 9, shard.index)
            for part in range(part_count(shard.numel)):
                body = x[part * PART_NUMEL : (part + 1) * PART_NUMEL].tobytes()
                self.send(MessageType.INIT, body, shard=shard.index, part=part)
        self.server.settle()

    def push(self, base, shards=None, *, rate=0.01):
        """Say these shards of a contribution from this version; all that are due if None."""
        due = [s for s in self.plan.due_shards(base) if self.plan.pushes(s)]
        for index in due if shards is None else shards:
            shard = self.plan.layout.shards[index]
            specs = self.plan.uplink_codecs(index)
            number = self.server.choose(index, base + 1)
            codec = ShardCodec(get_codec(specs[number]), shard)
            payload = bytearray(codec.nbytes)
            codec.encode(values(shard.numel, 3, base, self.rank, index), payload, seed=7)
            self.said[base, index] = (codec.codec.wire_id, bytes(payload))
            self.send(
                MessageType.PUSH,
                bytes(payload),
                codec=codec.codec.wire_id,
                shard=index,
                rate=rate,
                seq=base,
                round=base,
                version=base,
            )

    def skip(self, base):
        shard = 0xFFFFFFFF
        fields = {"seq": base, "round": base, "version": base}
        self.send(MessageType.PUSH, flags=Flags.SKIP, shard=shard, rate=0.01, **fields)

    def leave(self):
        self.send(MessageType.LEAVE, Leave("done"))


class Server:
    """One life of a server on a directory."""

    def __init__(self, path: Path, plan: Plan, *, copy=None, goes_back=False, **settings):
        self.plan, self.now_s, self.connections = plan, 100.0, 0
        self.peers: dict[bytes, Speaker] = {}
        self.replies = deque()
        self.went_back: GoBack | None = None
        self.stopped: Stop | None = None
        self.saved: int | None = None
        self.log = io.StringIO()
        self.directory = StateDirectory.open(path, create=True)
        self.notes: list[tuple[str, str]] = []
        note = lambda event, text: self.notes.append((event, text))  # noqa: E731 - shorter
        found = recover(self.directory, note, goes_back=goes_back)
        settings = {"durability": "journal", "checkpoint_s": 1e9, **settings}
        told = Settings(self.directory.run_id, self.directory.epoch, **settings)
        self.store = Store(self.directory, copy=copy)
        self.found = found
        self.weights = None if found is None else found.weights
        if found is None:
            self.state = ServerState(told, self.now_s)
        else:
            self.state = ServerState.restore(
                told,
                found.captured,
                self.now_s,
                shards=found.weights.versions,
                frames=found.weights.last_frames,
                rest=Rest(found.recovered.owed, found.checkpoint),
            )
            self.store.version = found.checkpoint
            if self.state.level in LOGGED or goes_back:
                last = found.recovered.last_number
                self.store.open_journal(self.version, reader=found.reader, drop_after=last)
        self.commits = Commits(
            self.state, self.store, lambda: self.weights, LineLog(self.log), clock=self.clock
        )
        self._events = deque()
        layout = plan.layout
        self._choices = make_choice(plan.recipe.uplink, layout)

    def clock(self):
        return self.now_s

    def choose(self, shard, t):
        if self.plan.recipe.uplink.choice.kind == "dq":
            return t % len(self.plan.uplink_codecs(shard))
        return self._choices.choose(shard, t, lambda: 0.0)

    @property
    def version(self):
        return self.state._world.version

    def happen(self, event):
        self._events.append(event)
        while self._events:
            self.now_s += 0.001
            actions = self.state.handle(self._events.popleft(), self.now_s)
            self.state.validate()
            for action in self.commits.admit(actions):
                self._do(action)
            if not self._events and self.replies:
                self._events.append(self.replies.popleft())

    def settle(self):
        """Wait until the disk has answered all that was asked of it."""
        while True:
            self._hear()
            if self.replies:
                self.happen(self.replies.popleft())
                continue
            is_writing = self.state._world.is_writing and not self.state.stopped
            if not (self.commits._gate.waiting or is_writing):
                return
            ready, _, _ = select.select([self.store.fd], [], [], END_S)
            assert ready, "the disk did not answer"

    def crash(self):
        """End as a killed process would, for all that is on disk: nothing more is handed over."""
        if self.store._journal is not None:
            journal = self.store._journal
            with journal._ready:
                journal._given_up = True
                journal._ready.notify()
            journal._thread.join(END_S)
        self.store._jobs.put(None)
        self.store._thread.join(END_S)
        self.directory.close()

    def _hear(self):
        for news in self.commits.hear():
            if isinstance(news, Answer):
                self.happen(news)
            else:
                self._do(news)

    def _do(self, action):  # noqa: C901, PLR0912 - a case for each kind of action
        match action:
            case Adopt():
                held = Weights(
                    action.plan, self.directory.run_id, self.directory.epoch, lambda _: False
                )
                self.weights = held
            case Initialize():
                self.weights.reducer.init(action.shard, action.part, action.values)
            case Reduce():
                frame = self.weights.reduce(action)
                self._events.append(ShardReduced(action.round, action.shard, frame, 0.001))
            case Judge():
                self._events.append(self.weights.judge(action))
            case Retake():
                frames = retake(action.past, self.weights)
                self._events.append(Retaken(action.past.number, frames))
            case GoBack():
                self.went_back = action
            case Send():
                self._deliver(action.peer, action.frame)
            case Broadcast():
                for peer in action.peers:
                    for frame in action.frames:
                        self._deliver(peer, frame)
            case SendFull():
                for peer in action.peers:
                    for shard in action.versions:
                        for frame in self.weights.full(shard)[1]:
                            self._deliver(peer, frame)
            case Save():
                self.saved = action.version
            case Log():
                self.log.write(f"event={action.event}\n")
            case Stop():
                self.stopped = action

    def _deliver(self, peer, frame):
        if peer in self.peers:
            self.peers[peer].deliver(frame)

    # ---- what it is, for comparison

    def everything(self):
        """All that must be the same after a crash, as comparable values."""
        arrays = {name: array.tobytes() for name, array in self.weights.still().items()}
        bodies = {name: body[100:] for name, body in arrays.items() if name.startswith("frame.")}
        captured = self.state.capture()
        del captured["world"]["starts"]  # of which one that came back has one more
        return arrays | bodies, self.weights.facts()[0], captured


def begun(path, plan, **settings):
    """A server with weights, and every rank joined."""
    server = Server(path, plan, **settings)
    speakers = [Speaker(server, rank).join() for rank in range(plan.world_size)]
    speakers[0].init()
    for speaker in speakers:
        speaker.send(MessageType.PULL, version=NO_VERSION)
    server.settle()
    return server, speakers


def again(path, plan, resolved=NONE, said=None, **settings):
    """The next life of it, every rank joined with what it knows, and has kept of what it said."""
    server = Server(path, plan, **settings)
    speakers = [Speaker(server, rank) for rank in range(plan.world_size)]
    for speaker, kept in zip(speakers, said or [{}] * plan.world_size, strict=True):
        speaker.said = kept
        speaker.join(resolved)
    return server, speakers

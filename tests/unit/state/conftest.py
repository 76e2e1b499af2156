"""A server's state machine with scripted workers around it: no socket, no clock but a number.

`cluster` makes a `Cluster`. Its workers speak through real `WorkerSession`s, so every frame is one
that could have been on a wire, and the invariants are checked after every event. Reductions are
answered with stand-in frames at once, unless `hold_reductions` is set; so are judgements, by
`judgement`, unless `hold_judgements` is.
"""

from __future__ import annotations

import pytest

from psq.codec import get_codec
from psq.codec.shard import ShardCodec
from psq.errors import RemoteError, StaleFrameError
from psq.layout import PART_NUMEL, part_count
from psq.plan import Plan
from psq.presets import preset
from psq_proto.frames import HEADER_BYTES
from psq_proto.messages import (
    NO_SHARD,
    NO_VERSION,
    Draw,
    Flags,
    Heartbeat,
    Hello,
    Join,
    Leave,
    MessageType,
    Range,
)
from psq_proto.session import WorkerSession
from psq_server.state import (
    Broadcast,
    FrameReceived,
    Judge,
    Judged,
    Log,
    Reduce,
    Send,
    SendFull,
    ServerState,
    Settings,
    ShardReduced,
    Stop,
    StopRequested,
    Tick,
)

RUN_ID = bytes(range(16))
# Two shards: the first is full, so the second tensor starts another one.
SPECS = [("big", (1 << 20,)), ("small", (10,))]
RECIPE = preset("server-adam").with_codecs(uplink="sign")


def make_plan(world_size=2, *, specs=SPECS, recipe=RECIPE, **settings):
    return Plan.of(specs, recipe, world_size, **settings)


def named(number):
    """The header fields that name a contribution."""
    return {"seq": number, "round": number, "version": number}


class Worker:
    """One scripted connection."""

    def __init__(self, cluster, name, rank, plan):
        self.cluster, self.name, self.rank, self.plan = cluster, name, rank, plan
        self.session = WorkerSession(rank=rank, plan_body=plan.body)
        self.inbox = []
        self.heard = []  # every message, with its header
        self.errors = []
        self.weights = []  # ("full" | "round", version, shard)
        self.nonce = 0

    def deliver(self, frame):
        try:
            message = self.session.receive(frame)
        except StaleFrameError:
            return
        except RemoteError as error:
            self.errors.append(error)
            return
        self.inbox.append(message.body)
        self.heard.append(message)

    def take(self, kind):
        """Every body of this class that came so far; they are taken out."""
        found = [body for body in self.inbox if isinstance(body, kind)]
        self.inbox = [body for body in self.inbox if not isinstance(body, kind)]
        return found

    def send(self, kind, body=b"", **fields):
        return self.cluster.frame(self.name, self.session.send(kind, body, **fields))

    def hello(self, nonce=None):
        self.nonce += 1
        return self.send(MessageType.HELLO, Hello(self.nonce if nonce is None else nonce))

    def join(self, lineage=7, last_resolved=-1, pending=-1):
        """The whole conversation up to WELCOME, or to whatever refuses it."""
        self.hello()
        for kind, body in (
            (MessageType.PLAN, self.plan.body),
            (MessageType.JOIN, Join(lineage, last_resolved, pending)),
        ):
            if not self.errors:
                self.send(kind, body)
        return self

    def init(self, *, values=None):
        for shard in self.plan.owned:
            for part in range(part_count(shard.numel)):
                numel = min(PART_NUMEL, shard.numel - part * PART_NUMEL)
                body = bytes(4 * numel) if values is None else values
                self.send(MessageType.INIT, body, shard=shard.index, part=part)
        return self

    def pull(self, have=NO_VERSION):
        return self.send(MessageType.PULL, version=have)

    def payload(self, shard, variant=0):
        codec = ShardCodec(get_codec(self.plan.recipe.uplink.codec), self.plan.layout.shards[shard])
        payload = bytearray(codec.nbytes)
        payload[-1] = variant
        return payload

    def push(self, shard, round_=None, *, rate=0.1, variant=0, **fields):
        number = self.cluster.version if round_ is None else round_
        codec = get_codec(self.plan.recipe.uplink.codec).wire_id
        header = {"codec": codec, "rate": rate, "shard": shard, **named(number)}
        body = fields.pop("body", None) or self.payload(shard, variant)
        return self.send(MessageType.PUSH, body, **{**header, **fields})

    def push_all(self, round_=None, **fields):
        for shard in self.plan.due_shards(self.cluster.version if round_ is None else round_):
            self.push(shard, round_, **fields)

    def skip(self, round_=None, *, shard=NO_SHARD):
        number = self.cluster.version if round_ is None else round_
        self.send(MessageType.PUSH, flags=Flags.SKIP, shard=shard, **named(number))

    def beat(self, have=-1, *, held=False):
        self.send(MessageType.HEARTBEAT, Heartbeat(have, held=held))
        return self.inbox[-1]

    def draw(self, seq=None, *, epoch=0, size=100, batch=10, seed=3):
        """Ask for the data of a contribution; returns the answer, None if there is none."""
        number = self.cluster.version if seq is None else seq
        self.take(Range)
        self.send(MessageType.DRAW, Draw(number, epoch, size, batch, seed))
        return next(iter(self.take(Range)), None)

    def leave(self, reason="done", text=""):
        self.send(MessageType.LEAVE, Leave(reason, text))


class Cluster:
    """The machine, the time, and everything it did."""

    def __init__(self, plan=None, **settings):
        self.plan = plan or make_plan()
        self.now_s = 100.0
        self.state = ServerState(Settings(RUN_ID, **settings), self.now_s)
        self.done = []
        self.peers = {}
        self.hold_reductions = False
        self.hold_judgements = False
        self.judgement = ({}, {})  # weights, and reasons to refuse, by rank
        self.unjudged = []
        self.held = []

    @property
    def version(self):
        return self.state._world.version

    @property
    def world(self):
        return self.state._world

    def connect(self, rank, plan=None):
        name = b"peer-%d" % len(self.peers)
        self.peers[name] = Worker(self, name, rank, plan or self.plan)
        return self.peers[name]

    def started(self):
        """Connect every rank, with weights at version 0 in everybody's hands."""
        workers = [self.connect(rank) for rank in range(self.plan.world_size)]
        for worker in workers:
            worker.join(lineage=10 + worker.rank)
        workers[0].init()
        for worker in workers:
            worker.pull()
        return workers

    def frame(self, name, frame):
        return self.handle(FrameReceived(name, memoryview(bytes(frame))))

    def handle(self, event):
        actions = self.state.handle(event, self.now_s)
        self.state.validate()
        self.done.extend(actions)
        for action in actions:
            self._do(action)
        return actions

    def tick(self, seconds=0.0):
        self.now_s += seconds
        return self.handle(Tick())

    def stop(self):
        return self.handle(StopRequested("SIGTERM"))

    def reduce(self, action):
        return self.handle(ShardReduced(action.round, action.shard, b"w", 0.25))

    def judge(self, action):
        weights, refused = self.judgement
        return self.handle(Judged(action.round, weights, refused))

    def logged(self, event):
        return [a.fields for a in self.done if isinstance(a, Log) and a.event == event]

    def of(self, kind):
        return [action for action in self.done if isinstance(action, kind)]

    @property
    def stop_action(self):
        return next(iter(self.of(Stop)), None)

    def _do(self, action):
        match action:
            case Send():
                if action.peer in self.peers:
                    self.peers[action.peer].deliver(action.frame)
            case Broadcast():
                for name in action.peers:
                    told = [("round", action.version, shard) for shard in action.shards]
                    self.peers[name].weights.extend(told)
            case SendFull():
                for name in action.peers:
                    told = [("full", version, shard) for shard, version in action.versions.items()]
                    self.peers[name].weights.extend(told)
            case Judge() | Reduce():
                self._work(action)

    def _work(self, action):
        held, is_held, answer = (
            (self.unjudged, self.hold_judgements, self.judge)
            if isinstance(action, Judge)
            else (self.held, self.hold_reductions, self.reduce)
        )
        if is_held:
            held.append(action)
        else:
            answer(action)


@pytest.fixture(scope="session")
def cluster():
    return Cluster


@pytest.fixture(scope="session")
def plan_of():
    return make_plan


@pytest.fixture(scope="session")
def frame_bytes():
    return HEADER_BYTES


@pytest.fixture(scope="session")
def worker_kind():
    return Worker

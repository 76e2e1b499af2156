"""A scripted worker for a real server: psq's own sessions over a bare ZeroMQ socket.

Nothing of the real client is used, so that the server is seen as the wire specification promises
it. Every wait is a poll with a deadline.
"""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
import zmq

from psq.codec import get_codec
from psq.codec.shard import ShardCodec
from psq.errors import RemoteError
from psq.layout import PART_NUMEL, part_count
from psq.plan import Plan
from psq.presets import preset
from psq_proto.messages import NO_VERSION, Flags, Hello, Join, Leave, MessageType, Verdict
from psq_proto.session import WorkerSession

DEADLINE_S = 30.0
LOOK_S = 0.02
SPECS = [("weight", (40, 30)), ("bias", (7,))]


def make_plan(world_size=1, *, specs=SPECS, recipe="server-adam", servers=1, **codecs):
    return Plan.of(specs, preset(recipe).with_codecs(**codecs), world_size, servers=servers)


class Raw:
    """One connection; `plan`, `rank` and everything it says are up to the test."""

    def __init__(self, context, endpoint, plan, rank=0, **options):
        self.plan, self.rank = plan, rank
        self.session = WorkerSession(rank=rank, plan_body=plan.body)
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        for name, value in options.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        self.socket.connect(endpoint)
        self.uplink = get_codec(plan.recipe.uplink.codec)

    def close(self):
        self.socket.close()

    def send(self, kind, body=b"", **fields):
        self.socket.send(self.session.send(kind, body, **fields))

    def receive(self):
        """The next message; what the session makes of a refusal is raised."""
        assert self.socket.poll(DEADLINE_S * 1000), "the server said nothing"
        return self.session.receive(self.socket.recv())

    def wait_for(self, kind):
        """The next message of this type, past all others."""
        while True:
            message = self.receive()
            if message.header.type is kind:
                return message

    def refusal(self):
        """What the server refuses this worker with."""
        while True:
            try:
                self.receive()
            except RemoteError as error:
                return error

    def hello(self, **fields):
        self.send(MessageType.HELLO, Hello(1, **fields))

    def join(self, lineage=5, pending=-1):
        self.hello()
        self.wait_for(MessageType.COOKIE)
        self.send(MessageType.PLAN, self.plan.body)
        self.send(MessageType.JOIN, Join(lineage, pending=pending))
        self.welcome = self.wait_for(MessageType.WELCOME).body
        return self

    def init(self, weights):
        """Send initial weights, f32[numel]."""
        for shard in self.plan.layout.shards:
            values = weights[shard.offset : shard.offset + shard.numel]
            for part in range(part_count(shard.numel)):
                body = values[part * PART_NUMEL : (part + 1) * PART_NUMEL].tobytes()
                self.send(MessageType.INIT, body, shard=shard.index, part=part)
        return self

    def pull(self, have=NO_VERSION):
        self.send(MessageType.PULL, version=have)
        return self

    def frames(self, version):
        """All WEIGHTS of a version: {(shard, part): (header, bytes)}."""
        found = {}
        while True:
            header, body = self.wait_for(MessageType.WEIGHTS)
            assert header.version == version
            found[header.shard, header.part] = (header, bytes(body))
            dense = Flags.FULL in header.flags and header.codec == get_codec("fp32").wire_id
            parts = [part_count(s.numel) if dense else 1 for s in self.plan.layout.shards]
            if len(found) == sum(parts):
                return found

    def encode(self, gradient):
        """The payload of each shard of a gradient, f32[numel]."""
        payloads = []
        for shard in self.plan.layout.shards:
            codec = ShardCodec(self.uplink, shard)
            payload = np.empty(codec.nbytes, np.uint8)
            codec.encode(gradient[shard.offset : shard.offset + shard.numel], payload)
            payloads.append(payload)
        return payloads

    def push(self, shard, payload, round_=0, *, rate=0.01, **fields):
        named = {"seq": round_, "round": round_, "version": round_}
        header = {"codec": self.uplink.wire_id, **named}
        self.send(
            MessageType.PUSH, bytes(payload), **{**header, "shard": shard, **fields}, rate=rate
        )

    def push_all(self, gradient, round_=0):
        for shard, payload in enumerate(self.encode(gradient)):
            self.push(shard, payload, round_)

    def verdict(self):
        body = self.wait_for(MessageType.VERDICT).body
        assert isinstance(body, Verdict)
        return body

    def leave(self):
        self.send(MessageType.LEAVE, Leave("done"))
        return self.wait_for(MessageType.BYE).body


@pytest.fixture
def raw():
    """Make scripted workers; their sockets are closed when the test is over."""
    context = zmq.Context()
    made = []

    def make(endpoint, plan=None, rank=0, **options):
        made.append(Raw(context, endpoint, plan or make_plan(), rank, **options))
        return made[-1]

    make.context = context
    yield make
    for each in made:
        each.close()
    context.destroy(linger=0)


@pytest.fixture(scope="session")
def until():
    """Look again and again until something is true, at most DEADLINE_S."""

    def look(condition, what):
        pause = threading.Event()
        for _ in range(int(DEADLINE_S / LOOK_S)):
            if condition():
                return
            pause.wait(LOOK_S)
        pytest.fail(f"{what} did not happen")

    return look


@pytest.fixture(scope="session")
def plan_of():
    return make_plan


@pytest.fixture(scope="session")
def get():
    def fetch(url):
        try:
            with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:  # noqa: S310 - loopback
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return fetch


@pytest.fixture(scope="session")
def summary_of():
    def last_line(server):
        return json.loads(server.out().splitlines()[-1])

    return last_line

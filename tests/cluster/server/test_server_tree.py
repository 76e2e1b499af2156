"""A tree of real processes: a root, aggregators, and scripted leaves, once a scripted root."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import zmq

from psq.codec import get_codec
from psq.codec.shard import ShardCodec
from psq.errors import GaveUpError, RemotePlanError
from psq.plan import Plan
from psq.presets import preset
from psq_proto.frames import Header, encode_frame
from psq_proto.messages import (
    NO_SHARD,
    Bye,
    Flags,
    Heartbeat,
    Leave,
    MessageType,
    Status,
    Verdict,
    Welcome,
)
from psq_proto.session import ServerSession
from psq_server.reduce import Reducer

LEAVES = 4


class Tree:
    """A root, two aggregators, four leaves with the weights of version 0."""

    def __init__(self, cluster, raw, plan, *options, above=lambda endpoint: endpoint):
        self.plan = plan
        self.root = cluster.server("--children", "0-1,2-3", "--json", *options)
        parent = above(self.root.endpoint)
        self.aggregators = [
            cluster.server("--parent", parent, "--children", children, "--json", *options)
            for children in ("0,1", "2,3")
        ]
        self.raw = raw
        self.leaves = [self.join(rank) for rank in range(LEAVES)]
        self.leaves[0].init(whole(plan, 0))
        for leaf in self.leaves:
            leaf.pull().frames(0)

    def join(self, rank):
        return self.raw(self.aggregators[rank // 2].endpoint, self.plan, rank).join()

    def push(self, number, gradients, ranks=range(LEAVES), **fields):
        for rank in ranks:
            leaf = self.leaves[rank]
            for shard, payload in enumerate(leaf.encode(gradients[rank])):
                leaf.push(shard, payload, number, **fields)

    def skip(self, number, rank):
        named = {"seq": number, "round": number, "version": number}
        self.leaves[rank].send(MessageType.PUSH, flags=Flags.SKIP, shard=NO_SHARD, **named)

    def answers(self, number):
        """What every leaf got for this round: the same bytes, by shard, and a verdict."""
        found = [self.answer(leaf, number) for leaf in self.leaves]
        assert all(each == found[0] for each in found)
        return [found[0][shard] for shard in range(len(self.plan.owned))]

    def answer(self, leaf, number):
        """A round's weights by shard, once the verdict has come as well."""
        weights, verdicts = {}, []
        while len(weights) < len(self.plan.owned) or not verdicts:
            header, body = leaf.receive()
            if header.type is MessageType.WEIGHTS:
                assert header.version == number + 1
                weights[header.shard] = bytes(body)
            elif header.type is MessageType.VERDICT:
                verdicts.append(body)
        assert [(one.outcome, one.rejected) for one in verdicts] == [("applied", ())]
        return weights

    def leave(self):
        for leaf in self.leaves:
            leaf.send(MessageType.LEAVE, Leave("done"))
        for program in (*self.aggregators, self.root):
            assert program.wait() == 0


def whole(plan, seed):
    """Small whole numbers: sums of a few, and their quarters, are exact in float32."""
    return np.random.default_rng(seed).integers(-64, 64, plan.layout.numel).astype(np.float32)


def expect(reducer, plan, mean, number):
    """What one server makes of this one message."""
    codec = get_codec("fp32")
    answers = []
    for shard in plan.layout.shards:
        payload = np.empty(4 * shard.numel, np.uint8)
        values = mean[shard.offset : shard.offset + shard.numel].astype(np.float32)
        ShardCodec(codec, shard).encode(values, payload)
        answers.append(reducer.reduce(shard.index, [payload], 0.01).tobytes())
    assert number >= 0
    return answers


def reducer_of(plan):
    reducer, x = Reducer(plan), whole(plan, 0)
    for shard in plan.layout.shards:
        values = x[shard.offset : shard.offset + shard.numel]
        reducer.init(shard.index, 0, memoryview(values).cast("B"))
    return reducer


SPECS = [("first", (40, 30)), ("second", (8192, 40)), ("third", (500,))]


@pytest.fixture
def plan(plan_of):
    made = plan_of(LEAVES, specs=SPECS, recipe="fp32")
    assert len(made.owned) > 1
    return made


def test_the_roots_mean_is_the_mean_over_the_leaves(cluster, raw, plan):
    tree, reducer = Tree(cluster, raw, plan), reducer_of(plan)
    for number in range(3):
        gradients = [whole(plan, 10 * number + rank) for rank in range(LEAVES)]
        tree.push(number, gradients)
        assert tree.answers(number) == expect(reducer, plan, sum(gradients) / 4, number)
    tree.leave()


def test_leaves_may_push_before_the_weights_have_come_down(cluster, raw, plan_of):
    """Rank 0 knows the weights that it gave, so it needs none to compute its first gradient."""
    plan = plan_of(LEAVES, specs=[("w", (512,))], uplink="fp32", downlink="delta:fp32")
    root = ScriptedRoot(raw.context)
    aggregator = cluster.server("--parent", root.endpoint, "--children", "0,1")
    leaves = [raw(aggregator.endpoint, plan, rank).join() for rank in (0, 1)]
    leaves[0].init(whole(plan, 0)).push_all(whole(plan, 1), 0)
    aggregator.wait_line("event=weights", err=True)  # the leaves' frames come by two connections
    leaves[1].pull()
    leaves[1].push_all(whole(plan, 2), 0)
    root.start(plan)
    said = np.frombuffer(bytes(root.wait_for(MessageType.PUSH).body), "<f4")
    assert np.array_equal(said, (whole(plan, 1) + whole(plan, 2)) / 2)
    root.socket.close()


def test_leaves_that_say_nothing_are_not_counted_and_weights_are(cluster, raw, plan):
    """One leaf of two is silent, then a whole aggregator is; then one counts three times."""
    tree, reducer = Tree(cluster, raw, plan), reducer_of(plan)
    first = [whole(plan, rank) for rank in range(LEAVES)]
    tree.push(0, first, (0, 2, 3))
    tree.skip(0, 1)
    messages = (first[0], (first[2] + first[3]) / 2)  # of weights 1 and 2
    mean = (messages[0] + 2 * messages[1]) * np.float32(1 / 3)
    assert tree.answers(0) == expect(reducer, plan, mean, 0)

    tree.push(1, first, (0, 1))
    tree.skip(1, 2)
    tree.skip(1, 3)
    assert tree.answers(1) == expect(reducer, plan, (first[0] + first[1]) / 2, 1)

    tree.push(2, first, (0,), part=5)
    tree.push(2, first, (1,), part=3)
    tree.push(2, first, (2, 3), part=4)
    weighted = (5 * first[0] + 3 * first[1] + 4 * first[2] + 4 * first[3]) / 16
    assert tree.answers(2) == expect(reducer, plan, weighted, 2)

    for rank in range(LEAVES):
        tree.skip(3, rank)
    assert tree.answers(3) == tree_repeat(reducer, plan)
    tree.leave()


def tree_repeat(reducer, plan):
    return [reducer.reduce(shard.index, [], 0.01).tobytes() for shard in plan.layout.shards]


def test_a_leaf_that_joins_late_gets_the_weights_of_the_others(cluster, raw, plan_of):
    """By deltas: whole weights are asked of the root, while the round goes on."""
    plan = plan_of(LEAVES, specs=SPECS, recipe="server-adam", uplink="fp32", downlink="delta:fp32")
    tree = Tree(cluster, raw, plan)
    x = whole(plan, 0)
    for number in range(2):
        tree.push(number, [whole(plan, 7 * number + rank) for rank in range(LEAVES)])
        x += np.concatenate([np.frombuffer(one, "<f4") for one in tree.answers(number)])
    tree.leaves[3].close()
    tree.push(2, [whole(plan, 50 + rank) for rank in range(LEAVES)], (0, 1, 2))
    late = tree.leaves[3] = tree.join(3)
    frames = late.pull().frames(2)
    came = np.concatenate([np.frombuffer(frames[k][1], "<f4") for k in sorted(frames)])
    assert all(header.flags == Flags.FULL for header, _ in frames.values())
    assert came.tobytes() == x.tobytes()
    tree.push(2, [whole(plan, 50 + rank) for rank in range(LEAVES)], (3,))
    tree.answers(2)
    tree.leave()


def test_a_broken_connection_between_aggregators_and_root_changes_nothing(cluster, raw, plan):
    """Cut in the middle of a push, and again in the middle of the weights."""
    proxies = []

    def above(endpoint):
        proxies.append(cluster.proxy(endpoint))
        return proxies[0].endpoint

    tree, reducer = Tree(cluster, raw, plan, above=above), reducer_of(plan)
    message_bytes = 4 * plan.layout.numel
    for number, fuse_bytes in enumerate((message_bytes // 2, 2 * message_bytes - 200, 10)):
        gradients = [whole(plan, 10 * number + rank) for rank in range(LEAVES)]
        proxies[0].reset_after(fuse_bytes)
        tree.push(number, gradients)
        assert tree.answers(number) == expect(reducer, plan, sum(gradients) / 4, number)
        assert proxies[0].struck == number + 1
    tree.leave()


class ScriptedRoot:
    """The server above an aggregator, message by message."""

    def __init__(self, context):
        self.socket = context.socket(zmq.ROUTER)
        self.endpoint = f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"
        self.session = ServerSession(run_id=b"r" * 16, epoch=1)
        self.peer = b""

    def wait_for(self, kind):
        """The next message of this type; heartbeats before it are answered."""
        while True:
            assert self.socket.poll(30_000), f"no {kind.name} came"
            self.peer, frame = self.socket.recv_multipart()
            message = self.session.receive(frame)
            if message.header.type is kind:
                return message
            if message.header.type is MessageType.HEARTBEAT:
                self.say(MessageType.STATUS, Status(0, 0))

    def say(self, kind, body=b"", **fields):
        self.send(self.session.send(kind, body, **fields))

    def send(self, frame):
        self.socket.send_multipart([self.peer, bytes(frame)])

    def weights(self, plan, version, values, flags):
        [shard] = plan.owned
        codec = get_codec("fp32").wire_id
        header = Header(
            MessageType.WEIGHTS, run_id=b"r" * 16, epoch=1, plan=plan.digest, codec=codec,
            flags=flags, version=version, shard=shard.index,
        )  # fmt: skip
        self.send(encode_frame(header, values.tobytes()))

    def start(self, plan):
        """From HELLO to the first weights."""
        self.wait_for(MessageType.HELLO)
        self.send(self.session.send_cookie(1))
        join = self.wait_for(MessageType.JOIN).body
        welcome = Welcome(
            "continue", -1, 10.0, init_wanted=True, world_size=LEAVES, has_weights=False
        )
        self.say(MessageType.WELCOME, welcome)
        initial = np.frombuffer(bytes(self.wait_for(MessageType.INIT).body), "<f4")
        self.wait_for(MessageType.PULL)
        self.weights(plan, 0, initial, Flags.FULL)
        assert join.pending == -1
        return initial


def test_what_the_root_refuses_is_said_again_once_and_the_leaves_know_nothing_of_it(
    cluster, raw, plan_of
):
    plan = plan_of(LEAVES, specs=[("w", (512,))], uplink="fp32", downlink="delta:fp32")
    root = ScriptedRoot(raw.context)
    aggregator = cluster.server("--parent", root.endpoint, "--children", "0,1")
    leaves = [raw(aggregator.endpoint, plan, rank).join() for rank in (0, 1)]
    leaves[0].init(whole(plan, 0))
    for leaf in leaves:
        leaf.pull()
    assert root.start(plan).tobytes() == whole(plan, 0).tobytes()
    said, zeros = [], np.zeros(512, np.float32)
    for number in range(3):
        mine = [whole(plan, 10 * number + rank) for rank in (1, 2)]
        for leaf, gradient in zip(leaves, mine, strict=True):
            leaf.push_all(gradient, number)
        header, body = root.wait_for(MessageType.PUSH)
        assert (header.part, header.round, header.rank) == (2, number, 0)
        said.append((np.frombuffer(bytes(body), "<f4"), sum(mine) / 2))
        verdict = Verdict("applied", "odd" * (not number), 0.0, (0,) * (not number))
        root.say(MessageType.VERDICT, verdict, seq=number, round=number, version=number + 1)
        root.weights(plan, number + 1, zeros, Flags.DELTA)
        for leaf in leaves:
            assert leaf.verdict() == Verdict("applied", "", 0.0, ())
    (first, refused), (second, mean), (third, last) = said
    assert np.array_equal(first, refused)
    assert np.array_equal(second, mean + refused)
    assert np.array_equal(third, last)
    root.socket.close()


def test_waits_are_told_to_leaves_of_other_branches(cluster, raw, plan, until):
    tree = Tree(cluster, raw, plan)
    gradients = [whole(plan, rank) for rank in range(LEAVES)]
    tree.push(0, gradients, (0, 1, 2))

    def told():
        tree.leaves[0].send(MessageType.HEARTBEAT, Heartbeat(0))
        return "rank 2" in tree.leaves[0].wait_for(MessageType.STATUS).body.text

    until(told, "a word of who is waited for")
    tree.leaves[2].send(MessageType.HEARTBEAT, Heartbeat(0))
    assert "waiting for rank 3 of 4" in tree.leaves[2].wait_for(MessageType.STATUS).body.text
    tree.push(0, gradients, (3,))
    tree.answers(0)
    tree.leave()


def test_the_death_of_an_aggregator_ends_the_job_by_name(cluster, raw, plan):
    tree = Tree(cluster, raw, plan, "--lease", "1")
    tree.aggregators[1].signal(signal.SIGKILL)
    assert tree.aggregators[1].wait() == -signal.SIGKILL
    assert tree.root.wait() == 75
    assert "rank 2, the aggregator of ranks 2-3, was last seen" in tree.root.err()
    assert tree.aggregators[0].wait() == 75
    with pytest.raises(GaveUpError, match="aggregator of ranks 2-3"):
        raise GaveUpError(bye_of(tree.leaves[0]).text)


def bye_of(leaf):
    body = leaf.wait_for(MessageType.BYE).body
    assert isinstance(body, Bye)
    return body


def test_a_root_that_ends_takes_its_aggregators_along(cluster, raw, plan):
    tree = Tree(cluster, raw, plan)
    tree.root.signal(signal.SIGTERM)
    assert tree.root.wait() == 0
    for aggregator in tree.aggregators:
        assert aggregator.wait() == 75
        assert "told to stop (SIGTERM)" in aggregator.err()
    assert "told to stop" in bye_of(tree.leaves[3]).text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"recipe": preset("sign-majority")}, "aggregate=majority"),
        ({"recipe": preset("fp32"), "consistency": "asp"}, "runs consistency bsp"),
        ({"recipe": preset("shared-direction")}, "changes the units of residuals"),
        ({"recipe": preset("ef21")}, "counts a silent worker"),
    ],
)
def test_jobs_that_no_tree_can_run_are_refused_in_words(cluster, raw, settings, words):
    plan = Plan.of([("w", (512,))], world_size=LEAVES, **settings)
    for options in (
        ("--children", "0-1,2-3"),
        ("--children", "0,1", "--parent", "tcp://127.0.0.1:9"),
    ):
        worker = raw(cluster.server(*options).endpoint, plan)
        worker.hello()
        worker.wait_for(MessageType.COOKIE)
        worker.send(MessageType.PLAN, plan.body)
        error = worker.refusal()
        assert isinstance(error, RemotePlanError)
        assert words in str(error)


def test_an_aggregator_needs_children_and_saves_nothing(cluster):
    for options, words in (
        ((), "list the ranks of its workers"),
        (("--children", "0,1", "--save", "w.safetensors"), "has no weights"),
        (("--children", "1,0"), "expected rank 2"),
    ):
        server = cluster.server("--parent", "tcp://127.0.0.1:9", *options, ready=False)
        assert server.wait() == 78
        assert words in server.err()

"""Several real servers of one job, and scripted workers that speak to each."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors import safe_open

from psq.codec import ShardCodec
from psq.layout import PART_NUMEL, part_count
from psq_proto.messages import Heartbeat, Leave, MessageType
from psq_server.reduce import Reducer
from psq_server.saving import merge, part_path

SPECS = [("table", (200, 150)), ("bias", (7,)), ("head", (90, 100))]
SERVERS = 2
ROUNDS = 3


def weights_of(plan, seed=0):
    return np.random.default_rng(seed).standard_normal(plan.layout.numel, np.float32)


def of(values, shard):
    return values[shard.offset : shard.offset + shard.numel]


def give(worker, values):
    """Initial weights, of the shards of this worker's server."""
    for shard in worker.plan.owned:
        for part in range(part_count(shard.numel)):
            body = of(values, shard)[part * PART_NUMEL : (part + 1) * PART_NUMEL].tobytes()
            worker.send(MessageType.INIT, body, shard=shard.index, part=part)


def take(worker, version):
    """One WEIGHTS frame of each of the server's shards."""
    got = {}
    while len(got) < len(worker.plan.owned):
        header, body = worker.wait_for(MessageType.WEIGHTS)
        assert header.version == version
        got[header.shard] = bytes(body)
    return got


def encoded(worker, values, shard):
    codec = ShardCodec(worker.uplink, shard)
    payload = np.empty(codec.nbytes, np.uint8)
    codec.encode(of(values, shard), payload)
    return payload


@pytest.fixture
def job(raw, cluster, plan_of, tmp_path):
    """(plan, servers, workers by server): two servers, two workers, weights with everybody."""
    plan = plan_of(2, specs=SPECS, servers=SERVERS)
    path = tmp_path / "w.safetensors"
    servers = [cluster.server("--json", "--save", str(path)) for _ in range(SERVERS)]
    workers = [
        [raw(server.endpoint, plan.for_server(i), rank).join() for rank in (0, 1)]
        for i, server in enumerate(servers)
    ]
    for pair in workers:
        give(pair[0], weights_of(plan))
        for worker in pair:
            worker.pull()
            take(worker, 0)
    return plan, servers, workers


def play(plan, workers):
    """A few rounds; returns the reducers that did the same here."""
    reducers = [Reducer(plan.for_server(i)) for i in range(SERVERS)]
    for reducer, pair in zip(reducers, workers, strict=True):
        for shard in pair[0].plan.owned:
            reducer.init(shard.index, 0, of(weights_of(plan), shard).tobytes())
    for number in range(ROUNDS):
        gradients = [weights_of(plan, 10 * number + rank) for rank in (0, 1)]
        for reducer, pair in zip(reducers, workers, strict=True):
            expected = {}
            for shard in pair[0].plan.owned:
                payloads = [encoded(worker, gradients[worker.rank], shard) for worker in pair]
                for worker, payload in zip(pair, payloads, strict=True):
                    worker.push(shard.index, payload, number)
                expected[shard.index] = reducer.reduce(shard.index, payloads, 0.01).tobytes()
            for worker in pair:
                assert take(worker, number + 1) == expected
    return reducers


def test_each_server_reduces_and_saves_its_own_shards_and_the_parts_make_the_whole(
    job, tmp_path, summary_of
):
    plan, servers, workers = job
    reducers = play(plan, workers)
    for pair in workers:
        for worker in pair:
            worker.send(MessageType.LEAVE, Leave("done"))
    assert [server.wait() for server in servers] == [0, 0]
    path = tmp_path / "w.safetensors"
    parts = [part_path(path, i, SERVERS) for i in range(SERVERS)]
    assert [summary_of(server)["saved"] for server in servers] == list(map(str, parts))
    merge(parts, path)
    slices = {key: value for reducer in reducers for key, value in reducer.weights().items()}
    with safe_open(path, "numpy") as opened:
        assert opened.metadata()["version"] == str(ROUNDS)
        for name, shape in SPECS:
            whole = opened.get_tensor(name)
            assert whole.shape == shape
            mine = [key for key in slices if key.startswith(f"{name}[")]
            mine.sort(key=lambda key: int(key.removeprefix(f"{name}[").split(":")[0]))
            assert whole.tobytes() == b"".join(slices[key].tobytes() for key in mine)


def test_servers_go_on_by_themselves(job):
    plan, _, workers = job
    gradient = weights_of(plan, 1)
    for worker in workers[0]:
        for shard in worker.plan.owned:
            worker.push(shard.index, encoded(worker, gradient, shard), 0)
    assert workers[0][0].verdict().outcome == "applied"
    behind = workers[1][0]
    behind.send(MessageType.HEARTBEAT, Heartbeat(0))
    status = behind.wait_for(MessageType.STATUS).body
    assert status.version == 0
    assert status.missing == tuple(shard.index for shard in behind.plan.owned)


def test_a_shard_of_another_server_is_refused(job):
    _, _, workers = job
    worker = workers[0][0]
    others = workers[1][0].plan.owned[0]
    worker.push(others.index, encoded(worker, weights_of(worker.plan, 1), others), 0)
    held = ", ".join(str(shard.index) for shard in worker.plan.owned[:8])
    assert f"expected one of shards {held}" in str(worker.refusal())


def test_a_worker_that_lists_the_servers_in_another_order_is_told_so(job, raw):
    plan, servers, _ = job
    astray = raw(servers[1].endpoint, plan.for_server(0), 1)
    astray.hello()
    astray.wait_for(MessageType.COOKIE)
    astray.send(MessageType.PLAN, astray.plan.body)
    assert "server: this one is 1 of 2" in str(astray.refusal())

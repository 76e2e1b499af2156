"""A real server and scripted workers: joining, rounds, refusals."""

from __future__ import annotations

import socket
import struct

import numpy as np
import pytest
from safetensors import safe_open

from psq.codec import get_codec
from psq.errors import (
    FencedError,
    RefusedError,
    RemotePlanError,
    RemoteProtocolError,
    RemoteVersionError,
)
from psq_proto.frames import Header, encode_control
from psq_proto.messages import (
    NO_SHARD,
    Flags,
    Heartbeat,
    Hello,
    MessageType,
)
from psq_server.reduce import Reducer

NAN = struct.pack("<f", float("nan"))
HUGE = struct.pack("<f", 3e38)


def weights_of(plan, seed=0):
    return np.random.default_rng(seed).standard_normal(plan.layout.numel, np.float32)


@pytest.fixture
def server(cluster):
    return cluster.server("--json")


def started(raw, server, plan, ranks=1):
    """Every rank joined, the weights at version 0 with everybody."""
    workers = [raw(server.endpoint, plan, rank).join() for rank in range(ranks)]
    workers[0].init(weights_of(plan))
    for worker in workers:
        worker.pull().frames(0)
    return workers


def test_a_worker_gets_back_the_weights_it_gave(raw, server, plan_of):
    plan = plan_of()
    worker = raw(server.endpoint, plan).join()
    assert worker.welcome.init_wanted
    found = worker.init(weights_of(plan)).pull().frames(0)
    header, body = found[0, 0]
    assert header.flags == Flags.FULL
    assert header.codec == get_codec("fp32").wire_id
    assert body == weights_of(plan).tobytes()


@pytest.mark.parametrize("recipe", ["server-adam", "qadam", "fp32"])
def test_every_worker_gets_the_bytes_that_the_reducer_makes(raw, server, plan_of, recipe):
    plan = plan_of(2, recipe=recipe)
    workers = started(raw, server, plan, ranks=2)
    reducer = Reducer(plan)
    reducer.init(0, 0, weights_of(plan))
    for number in range(3):
        gradients = [weights_of(plan, 10 * number + rank) for rank in range(2)]
        for worker in reversed(workers):
            worker.push_all(gradients[worker.rank], number)
        expected = reducer.reduce(0, [w.encode(gradients[w.rank])[0] for w in workers], 0.01)
        for worker in workers:
            verdict = worker.verdict()
            assert verdict.outcome == "applied"
            assert verdict.server_s > 0
            assert worker.frames(number + 1)[0, 0][1] == expected.tobytes()


def test_a_round_of_skips_changes_nothing_but_the_version(raw, server, plan_of):
    plan = plan_of(recipe="fp32")
    (worker,) = started(raw, server, plan)
    worker.send(MessageType.PUSH, flags=Flags.SKIP, shard=NO_SHARD)
    assert worker.verdict().outcome == "applied"
    assert worker.frames(1)[0, 0][1] == weights_of(plan).tobytes()


def test_the_job_ends_when_everybody_has_left_and_the_weights_are_saved(
    raw, cluster, plan_of, summary_of, tmp_path
):
    path = tmp_path / "final.safetensors"
    server = cluster.server("--json", "--save", str(path))
    plan = plan_of(recipe="fp32")
    (worker,) = started(raw, server, plan)
    worker.push_all(weights_of(plan, 1))
    last = np.frombuffer(worker.frames(1)[0, 0][1], np.float32)
    assert worker.leave().reason == "done"
    assert server.wait() == 0
    with safe_open(path, "numpy") as saved:
        assert saved.metadata()["version"] == "1"
        assert saved.metadata()["recipe"] == "fp32"
        assert saved.metadata()["plan"] == f"{plan.digest:016x}"
        assert saved.get_tensor("weight").shape == (40, 30)
        assert saved.get_tensor("weight").tobytes() == last[:1200].tobytes()
    summary = summary_of(server)
    assert summary["reason"] == "done"
    assert (summary["rounds"], summary["version"], summary["joins"]) == (1, 1, 1)
    assert summary["saved"] == str(path)
    assert summary["sent_bytes"] > 2 * 4 * plan.layout.numel
    assert summary["seconds"]["reduce"] > 0


# ---- what is refused


def test_a_rank_that_does_not_exist_is_refused(raw, cluster, plan_of):
    server = cluster.server("--world-size", "2")
    stranger = raw(server.endpoint, plan_of(2), rank=7)
    stranger.hello()
    error = stranger.refusal()
    assert isinstance(error, RefusedError)
    assert "rank 7 does not exist: this job has ranks 0..1" in str(error)


def test_another_model_is_refused_and_the_first_difference_named(raw, server, plan_of):
    started(raw, server, plan_of(2), ranks=2)
    other = raw(server.endpoint, plan_of(2, specs=[("weight", (40, 31)), ("bias", (7,))]), 1)
    other.hello()
    other.wait_for(MessageType.COOKIE)
    other.send(MessageType.PLAN, other.plan.body)
    error = other.refusal()
    assert isinstance(error, RemotePlanError)
    assert "'weight' [40, 30]" in str(error)
    assert "'weight' [40, 31]" in str(error)


def test_another_protocol_version_is_refused(raw, server):
    worker = raw(server.endpoint)
    worker.hello(majors=(9,))
    assert isinstance(worker.refusal(), RemoteVersionError)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda good: {"payload": good[:-1]}, "expected 1048 bytes by the plan, got 1047"),
        (lambda good: {"payload": good + bytes(9)}, "expected 1048 bytes by the plan, got 1057"),
        (lambda _: {"codec": get_codec("sign").wire_id}, "expected codec 0x"),
        (lambda good: {"payload": NAN + good[4:]}, "scale that is NaN or Inf"),
        (lambda good: {"payload": HUGE + good[4:]}, "scale of 3e+38, the limit is 7.21e+16"),
    ],
)
def test_a_push_that_does_not_fit_is_rejected_and_the_job_goes_on(
    raw, server, plan_of, change, words
):
    plan = plan_of()
    (worker,) = started(raw, server, plan)
    good = worker.encode(weights_of(plan, 1))[0].tobytes()
    worker.push(**{"shard": 0, "payload": good, **change(good)})
    verdict = worker.verdict()
    assert verdict.outcome == "rejected"
    assert "rank 0 shard" in verdict.reason
    assert words in verdict.reason
    worker.push(0, good, 1)
    assert worker.verdict().outcome == "applied"


def test_a_push_of_a_shard_that_this_server_does_not_have_is_refused(raw, server, plan_of):
    plan = plan_of()
    (worker,) = started(raw, server, plan)
    worker.push(3, worker.encode(weights_of(plan, 1))[0].tobytes())
    error = worker.refusal()
    assert isinstance(error, RemoteProtocolError)
    assert "expected one of shards 0 by the plan, got shard 3" in str(error)


def test_ranks_with_different_learning_rates_are_told_of_each_other(raw, server, plan_of):
    plan = plan_of(2)
    first, second = started(raw, server, plan, ranks=2)
    (payload,) = first.encode(weights_of(plan, 1))
    first.push(0, payload, rate=0.1)
    first.send(MessageType.HEARTBEAT, Heartbeat(0))
    first.wait_for(MessageType.STATUS)
    second.push(0, payload, rate=0.2)
    error = second.refusal()
    assert isinstance(error, RemoteProtocolError)
    assert "rank 1 shard 0 of round 0: learning rate 0.2, but rank 0 pushes with 0.1" in str(error)


def test_a_damaged_push_is_asked_for_again(raw, server, plan_of):
    plan = plan_of()
    (worker,) = started(raw, server, plan)
    (payload,) = worker.encode(weights_of(plan, 1))
    frame = worker.session.send(
        MessageType.PUSH, payload.tobytes(), codec=worker.uplink.wire_id, rate=0.01
    )
    damaged = bytearray(frame)
    damaged[-1] ^= 1
    worker.socket.send(damaged)
    assert worker.wait_for(MessageType.ERROR).body.code == "wire"
    worker.send(MessageType.HEARTBEAT, Heartbeat(0))
    assert worker.wait_for(MessageType.STATUS).body.missing == (0,)
    worker.socket.send(frame)
    assert worker.verdict().outcome == "applied"


def test_a_newer_process_takes_over_and_the_older_one_is_told(raw, server, plan_of):
    plan = plan_of()
    (old,) = started(raw, server, plan)
    new = raw(server.endpoint, plan).join(lineage=6)
    assert isinstance(old.refusal(), FencedError)
    new.pull().frames(0)
    new.push_all(weights_of(plan, 1))
    assert new.verdict().outcome == "applied"


# ---- what must not hurt


def test_rubbish_of_every_kind_hurts_nobody(raw, server, plan_of):
    plan = plan_of()
    (worker,) = started(raw, server, plan)
    rude = raw(server.endpoint, plan)
    rude.socket.send(b"")
    rude.socket.send(b"PSQW" + bytes(96))
    rude.socket.send_multipart([b"a", b"b", b"c"] * 50)
    rude.socket.send(bytes(1 << 20))
    hello = encode_control(Header(type=MessageType.HELLO), Hello(1))
    for cut in range(0, len(hello), 7):
        rude.socket.send(hello[:cut])
    huge = raw(server.endpoint, plan)
    huge.socket.send(bytes(3 << 20))  # over the limit: libzmq ends this connection
    worker.push_all(weights_of(plan, 1))
    assert worker.verdict().outcome == "applied"


def test_bytes_that_are_no_zeromq_hurt_nobody(raw, server, plan_of):
    plan = plan_of()
    (worker,) = started(raw, server, plan)
    host, port = server.endpoint.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)) * 20)
        worker.push_all(weights_of(plan, 1))
        assert worker.verdict().outcome == "applied"


def test_a_reader_that_stands_still_holds_up_no_other(raw, server, plan_of):
    plan = plan_of(2, specs=[("large", (6 << 20,))], recipe="fp32")
    stuck = raw(server.endpoint, plan, 1, RCVHWM=1, RCVBUF=4096).join()
    worker = raw(server.endpoint, plan, 0).join().init(weights_of(plan))
    stuck.pull()  # and never reads the 24 MiB that come
    assert len(worker.pull().frames(0)) == 24
    worker.send(MessageType.HEARTBEAT, Heartbeat(0))
    assert worker.wait_for(MessageType.STATUS).body.version == 0
    # When it does read, everything is there.
    assert len(stuck.frames(0)) == 24

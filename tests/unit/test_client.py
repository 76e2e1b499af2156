"""The client over TCP, against a server in a thread."""

import logging
import random
from collections.abc import Sequence

import numpy as np
import pytest

from psq.client import Client, Hooks, Patience
from psq.codec import get_codec
from psq.errors import ConfigError, FencedError, GaveUpError, RemotePlanError, RemoteProtocolError
from psq.layout import PART_NUMEL
from psq.plan import Plan
from psq.presets import preset
from psq_proto.frames import Header

NUMEL = PART_NUMEL + 100
HURRY = Patience(give_up_after_s=1.0, heartbeat_s=0.02, report_s=0.05, farewell_s=5.0)
CALM = Patience(give_up_after_s=10.0, heartbeat_s=0.02, report_s=5.0, farewell_s=5.0)


class Numbers:
    """The model of these tests: a vector in fp32, and a log of what was asked."""

    def __init__(self, value: float = 1.0) -> None:
        self.start = value
        self.x = np.full(NUMEL, np.nan, np.float32)
        self.calls: list[str] = []
        self.fault: BaseException | None = None

    def hooks(self) -> Hooks:
        return Hooks(self.initial, self.weights, self.restore, self.reset)

    def initial(self, shard: int) -> np.ndarray:
        self.calls.append(f"initial {shard}")
        return np.full(NUMEL, self.start, np.float32)[self.span(shard)]

    def weights(self, header: Header, body: memoryview) -> None:
        if self.fault is not None:
            raise self.fault
        assert header.part == 0
        self.x[self.span(header.shard)] = np.frombuffer(body, "<f4")

    def restore(self, shard: int) -> None:
        self.calls.append(f"restore {shard}")

    def reset(self, shards: Sequence[int]) -> None:
        self.calls.append(f"reset {list(shards)}")

    @staticmethod
    def span(shard: int) -> slice:
        return slice(0, PART_NUMEL) if shard == 0 else slice(PART_NUMEL, NUMEL)


def make(endpoint, numbers: Numbers, *, rank=0, patience=CALM, **changes) -> Client:
    numel, world_size = changes.get("numel", NUMEL), changes.get("world_size", 1)
    plan = Plan.of([("w", (numel,))], preset("fp32"), world_size)
    rng = random.Random(rank)  # noqa: S311 - a test
    return Client(endpoint, plan, rank, numbers.hooks(), patience=patience, rng=rng)


def push_all(client: Client, value: float = 1.0) -> None:
    codec = get_codec("fp32")
    client.begin(0.5)
    for shard in range(len(client.plan.layout.shards)):
        numel = client.plan.layout.shards[shard].numel
        codec.encode(np.full(numel, value, np.float32), client.payload(shard))
        client.push(shard)


@pytest.fixture
def clients():
    """Clients to be closed whatever happens."""
    made: list[Client] = []
    yield made
    for client in made:
        client.leave("error", "the test is over")


def test_a_job_from_join_to_leave(serve, clients):
    server, numbers = serve(), Numbers(2.0)
    client = make(server.endpoint, numbers)
    clients.append(client)
    assert client.version == -1
    assert client.join() == 0
    assert (numbers.x == 2.0).all()
    for version in (1, 2):
        push_all(client)
        result = client.finish()
        assert (result.applied, result.version, client.version) == (True, version, version)
        assert result.server_s > 0
    # Adam's first steps with a constant gradient are of size lr.
    np.testing.assert_allclose(numbers.x, 1.0, atol=1e-5)
    client.leave("done")
    client.leave("done")
    server.wait()
    assert "reason=done" in server.log
    # A heartbeat after the goodbye may find nobody who counts it.
    assert 0 <= client.sent_bytes - server.link.received_bytes < 200


def test_a_skipped_round_moves_on(serve, clients):
    server, numbers = serve(), Numbers()
    client = make(server.endpoint, numbers)
    clients.append(client)
    client.join()
    client.begin(0.5)
    client.skip()
    result = client.finish()
    assert (result.applied, result.version) == (True, 1)
    assert (numbers.x == 1.0).all()


def test_a_poll_takes_in_what_has_come_without_waiting(serve, clients, eventually):
    client = make(serve().endpoint, Numbers())
    clients.append(client)
    client.join()
    assert client.takes_part(0) is False
    push_all(client)
    assert client.takes_part(0) is True
    eventually(lambda: client.poll() or client.version == 1, "the weights after the round")
    assert list(client.versions) == [1, 1]
    assert client.finish().rejected == ()


def test_several_servers_over_tcp_each_with_its_shards(serve, clients):
    servers = [serve(), serve()]
    endpoints = [server.endpoint for server in servers]
    start = np.arange(1.0, 9.0, dtype=np.float32)
    specs = [(f"w{k}", (1 << 13,)) for k in range(start.size)]
    plan = Plan.of(specs, preset("fp32"), 1, servers=2)
    assert sorted(set(plan.layout.owners)) == [0, 1]
    x = [np.zeros(shard.numel, np.float32) for shard in plan.layout.shards]
    hooks = Hooks(
        lambda k: np.full(x[k].size, start[k], np.float32),
        lambda header, body: np.copyto(x[header.shard], np.frombuffer(body, "<f4")),
        lambda _: None,
        lambda _: None,
    )
    client = Client(endpoints, plan, 0, hooks, patience=CALM)
    clients.append(client)
    assert client.join() == 0
    assert [values[0] for values in x] == [start[k] for k in range(len(x))]
    codec = get_codec("fp32")
    for step in range(3):
        assert client.begin(0.5) == step
        for k, values in enumerate(x):
            codec.encode(np.ones_like(values), client.payload(k))
            client.push(k)
            client.poll()
        result = client.finish()
        assert (result.applied, result.version, result.rejected) == (True, step + 1, ())
    for k, values in enumerate(x):
        np.testing.assert_allclose(values, start[k] - 1.5, atol=1e-5)
    assert client.waited_s > 0.0
    client.leave("done")
    for server in servers:
        server.wait()
        assert "reason=done" in server.log


def test_the_number_of_addresses_is_the_plans(serve):
    with pytest.raises(ConfigError, match=r"the job has 1 server\(s\), got 2 address\(es\)"):
        make([serve().endpoint] * 2, Numbers())


def test_a_server_that_is_not_there_is_named_and_given_up(clients, caplog):
    caplog.set_level(logging.WARNING, "psq.client")
    client = make("tcp://127.0.0.1:1", Numbers(), patience=HURRY)
    clients.append(client)
    with pytest.raises(GaveUpError, match=r"waiting for server tcp://127\.0\.0\.1:1") as gave_up:
        client.join()
    assert gave_up.value.exit_code == 75
    assert "waiting for server tcp://127.0.0.1:1 for 0 s" in caplog.messages


def test_a_rank_that_does_not_come_is_named(serve, clients, caplog):
    caplog.set_level(logging.WARNING, "psq.client")
    client = make(serve().endpoint, Numbers(), rank=1, world_size=2, patience=HURRY)
    clients.append(client)
    with pytest.raises(GaveUpError, match="waiting for rank 0"):
        client.join()
    assert any(words.startswith("waiting for rank 0 (not heard for ") for words in caplog.messages)


def test_heartbeats_go_out_while_nobody_calls(serve, clients, eventually):
    client = make(serve().endpoint, Numbers())
    clients.append(client)
    client.join()
    before = client.sent_bytes
    eventually(lambda: client.sent_bytes > before + 300, "a few heartbeats")


def test_the_heartbeat_thread_never_waits_for_the_link(serve, clients):
    client = make(serve().endpoint, Numbers(), patience=Patience())
    clients.append(client)
    client.join()
    before = client.sent_bytes
    with client._lock:
        client._beat()  # would hang here if it waited
    assert client.sent_bytes == before


def test_what_comes_while_computing_is_put_aside_for_finish(serve, clients, eventually):
    server = serve()
    first = make(server.endpoint, Numbers())
    clients.append(first)
    first.join()
    second = make(server.endpoint, Numbers(), patience=CALM)
    clients.append(second)
    second.join()
    eventually(lambda: first._channels[0]._inbox, "the FENCED")
    push_all(first)
    with pytest.raises(FencedError, match="another process holds rank 0") as fenced:
        first.finish()
    assert fenced.value.exit_code == 76


def test_statuses_do_not_pile_up_while_computing(serve, clients, eventually):
    client = make(serve().endpoint, Numbers())
    clients.append(client)
    client.join()
    before = client.received_bytes
    eventually(lambda: client.received_bytes > before + 1000, "a few answers")
    assert not client._channels[0]._inbox


def test_a_worker_of_another_model_hears_what_differs(serve, clients):
    server = serve()
    clients += [make(server.endpoint, Numbers()), make(server.endpoint, Numbers(), numel=7)]
    clients[0].join()
    with pytest.raises(RemotePlanError, match=r"tensor 0: the job has 'w' \[262244\].*'w' \[7\]"):
        clients[1].join()


def test_a_server_that_came_back_without_its_state_ends_the_worker(serve, clients):
    server = serve()
    client = make(server.endpoint, Numbers())
    clients.append(client)
    client.join()
    server.link.send = lambda *_: None  # it dies without a word
    server.vanish()
    serve(bind=server.endpoint)
    push_all(client)
    with pytest.raises(RemoteProtocolError, match="came back without its state"):
        client.finish()


def test_a_server_that_ends_ends_the_worker(serve, clients):
    """By its goodbye, or, where the connection ended before that was read, by the bound."""
    server = serve()
    patience = Patience(give_up_after_s=1.0, heartbeat_s=0.02)
    client = make(server.endpoint, Numbers(), patience=patience)
    clients.append(client)
    client.join()
    server.vanish()
    push_all(client)
    with pytest.raises(GaveUpError) as gave_up:
        client.finish()
    assert gave_up.value.exit_code == 75


def test_an_interrupt_in_the_middle_leaves_the_link_closable(serve):
    server, numbers = serve(), Numbers()
    client = make(server.endpoint, numbers)
    client.join()
    numbers.fault = KeyboardInterrupt()
    push_all(client)
    with pytest.raises(KeyboardInterrupt):
        client.finish()
    client.leave("interrupted")
    server.vanish()
    assert "reason=interrupted" in server.log


def test_leaving_before_joining_is_allowed():
    make("tcp://127.0.0.1:1", Numbers()).leave("error")


def test_a_goodbye_nobody_answers_ends_in_time(clients, caplog):
    patience = Patience(give_up_after_s=0.2, heartbeat_s=0.02, report_s=5.0, farewell_s=0.1)
    client = make("tcp://127.0.0.1:1", Numbers(), patience=patience)
    clients.append(client)
    client.leave("done")
    assert any("left without the server's answer" in words for words in caplog.messages)

"""The two ends of the wire, over the loopback interface."""

import socket
from collections.abc import Callable, Iterator

import pytest
import zmq

from psq.errors import ConfigError, UsageError
from psq.link import (
    DRAIN_LIMIT,
    MAX_FRAME_BYTES,
    ZERO_COPY_BYTES,
    Sent,
    ServerLink,
    WorkerLink,
    WorkerLinks,
    check_libzmq,
    libzmq_version,
    wire_bytes,
)

WAIT_S = 10.0
ANY_PORT = "tcp://127.0.0.1:0"


@pytest.fixture
def server() -> Iterator[ServerLink]:
    with ServerLink(ANY_PORT) as link:
        yield link


@pytest.fixture
def worker(server: ServerLink) -> Iterator[WorkerLink]:
    with WorkerLink(server.endpoint) as link:
        assert link.wait_room(WAIT_S)
        yield link


def take(link: WorkerLink | ServerLink, count: int) -> list:
    taken: list = []
    while len(taken) < count:
        assert link.wait(WAIT_S), f"{len(taken)} of {count} messages came"
        taken += link.drain()
    return taken


def until(condition: Callable[[], bool], link: WorkerLink | ServerLink) -> None:
    """Wait for something libzmq does in its own thread, a poll at a time."""
    for _ in range(1000):
        if condition():
            return
        link.wait(0.01)
    pytest.fail("it did not happen")


def test_frames_travel_both_ways_byte_for_byte(server, worker):
    assert worker.send(b"up" * 1000)
    [(peer, frame)] = take(server, 1)
    assert bytes(frame) == b"up" * 1000
    assert server.send(peer, bytearray(b"down")) is Sent.QUEUED
    assert [bytes(frame) for frame in take(worker, 1)] == [b"down"]


def test_port_zero_becomes_a_real_endpoint(server):
    port = int(server.endpoint.rpartition(":")[2])
    assert server.endpoint == f"tcp://127.0.0.1:{port}"
    assert port > 0


def test_a_port_in_use_is_named(server):
    told = r"cannot listen on tcp://127\.0\.0\.1:\d+: the address is in use"
    with pytest.raises(ConfigError, match=told):
        ServerLink(server.endpoint)


def test_an_address_of_another_machine_cannot_be_bound():
    with pytest.raises(ConfigError, match="this machine has no such address"):
        ServerLink("tcp://192.0.2.1:0")


@pytest.mark.parametrize(
    "address", ["", "localhost:1", "tcp://127.0.0.1", "udp://127.0.0.1:1", "tcp://127.0.0.1:x"]
)
def test_an_address_that_is_none_is_refused_by_both_ends(address):
    with pytest.raises(ConfigError, match="write an address such as"):
        WorkerLink(address)
    with pytest.raises(ConfigError, match="write an address such as"):
        ServerLink(address)


def test_an_ipv6_address_works_where_the_machine_has_one():
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        server = ServerLink("tcp://[::1]:0")
    except ConfigError:
        pytest.skip("no IPv6 loopback here")
    with server, WorkerLink(server.endpoint) as worker:
        assert worker.wait_room(WAIT_S)


def test_an_old_libzmq_is_refused(monkeypatch):
    monkeypatch.setattr(zmq, "zmq_version_info", lambda: (4, 3, 4))
    assert libzmq_version() == (4, 3, 4)
    with pytest.raises(ConfigError, match=r"libzmq 4\.3\.4 is too old, psq needs 4\.3\.5"):
        check_libzmq()


def test_nothing_queues_for_a_server_that_is_not_there():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        with WorkerLink(f"tcp://127.0.0.1:{taken.getsockname()[1]}") as worker:
            assert not worker.wait_room(0.05)
            assert not worker.send(b"lost")
            assert worker.sent_bytes == 0


def test_sending_to_a_peer_nobody_is_behind_says_so(server):
    assert server.send(b"nobody", b"frame") is Sent.GONE
    assert server.sent_frames == 0


def test_a_worker_that_left_is_gone(server, worker):
    worker.send(b"hello")
    [(peer, _)] = take(server, 1)
    worker.close()
    until(lambda: server.send(peer, b"anyone?") is Sent.GONE, server)


def test_a_worker_that_does_not_read_fills_its_queue_and_blocks_nobody():
    with ServerLink(ANY_PORT, queue_frames=1) as server, WorkerLink(server.endpoint) as worker:
        assert worker.wait_room(WAIT_S)
        worker.send(b"hello")
        [(peer, _)] = take(server, 1)
        frame = bytearray(MAX_FRAME_BYTES)
        answers = {server.send(peer, frame) for _ in range(500)}
        assert answers == {Sent.QUEUED, Sent.FULL}


@pytest.mark.parametrize(
    ("frame_bytes", "expected"), [(0, 2), (100, 102), (255, 257), (256, 265), (10**6, 10**6 + 9)]
)
def test_wire_bytes_include_the_framing(frame_bytes, expected):
    assert wire_bytes(frame_bytes) == expected


def test_both_ends_count_the_same_bytes(server, worker):
    sizes = (0, 1, 255, 256, 5000, ZERO_COPY_BYTES)
    for size in sizes:
        assert worker.send(bytes(size))
    messages = take(server, len(sizes))
    assert server.received_bytes == worker.sent_bytes == sum(map(wire_bytes, sizes))
    for peer, frame in messages:
        assert server.send(peer, frame) is Sent.QUEUED
    take(worker, len(sizes))
    assert worker.received_bytes == server.sent_bytes == worker.sent_bytes
    assert worker.received_frames == server.sent_frames == len(sizes)


def test_a_counting_socket_agrees_with_the_counter():
    """ZMTP's framing is measured against a bare TCP listener that speaks just enough of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with WorkerLink(f"tcp://127.0.0.1:{port}", linger_s=0) as worker:
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(WAIT_S)
                peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48))
                ready = b"\x05READY" + b"\x0bSocket-Type" + (6).to_bytes(4, "big") + b"ROUTER"
                peer.sendall(b"\x04" + bytes([len(ready)]) + ready)
                assert worker.wait_room(WAIT_S)
                worker.send(b"a" * 255)
                worker.send(b"b" * 256)
                stream = b""
                while b"b" * 256 not in stream:
                    stream += peer.recv(4096)
                start = stream.index(b"\x00\xff" + b"a" * 255)
                assert len(stream) - start == worker.sent_bytes


def test_a_message_of_several_frames_is_dropped_and_counted(server, worker):
    worker._socket.send_multipart([b"one", b"two", b"three"])
    worker.send(b"single")
    [(_, frame)] = take(server, 1)
    assert bytes(frame) == b"single"
    assert server.refused == 1
    assert server.received_frames == 1


def test_a_frame_over_the_limit_is_refused_before_it_is_sent(worker):
    with pytest.raises(UsageError, match="the limit is"):
        worker.send(bytes(MAX_FRAME_BYTES + 1))


def test_a_peer_that_sends_more_than_the_limit_is_cut_off_and_others_are_served(server, worker):
    with WorkerLink(server.endpoint, linger_s=0) as rude:
        assert rude.wait_room(WAIT_S)
        rude._socket.send(bytes(MAX_FRAME_BYTES + 1))
        worker.send(b"polite")
        [(_, frame)] = take(server, 1)
        assert bytes(frame) == b"polite"


def test_large_buffers_are_lent_and_come_back(server, worker):
    frame = bytearray(ZERO_COPY_BYTES)
    assert not worker.is_lent(frame)
    assert worker.send(frame)
    take(server, 1)
    until(lambda: not worker.is_lent(frame), worker)
    frame[:4] = b"safe"


def test_a_large_buffer_in_the_queue_is_still_lent():
    with ServerLink(ANY_PORT) as server, WorkerLink(server.endpoint) as worker:
        assert worker.wait_room(WAIT_S)
        worker.send(b"hello")
        [(peer, _)] = take(server, 1)
        frames = [bytearray(MAX_FRAME_BYTES) for _ in range(64)]
        assert all(server.send(peer, frame) is Sent.QUEUED for frame in frames)
        # 64 MiB do not fit the socket buffers of a worker that does not read.
        assert server.is_lent(frames[-1])


def test_small_buffers_are_copied_and_may_change_at_once(server, worker):
    frame = bytearray(b"first")
    worker.send(frame)
    assert not worker.is_lent(frame)
    frame[:] = b"later"
    [(_, got)] = take(server, 1)
    assert bytes(got) == b"first"


def test_a_drain_stops_at_its_limit(server, worker):
    for index in range(DRAIN_LIMIT + 5):
        while not worker.send(b"%d" % index):
            assert worker.wait_room(WAIT_S)
    assert server.wait(WAIT_S)
    first = list(server.drain(3))
    assert 1 <= len(first) <= 3
    take(server, DRAIN_LIMIT + 5 - len(first))


def test_a_wait_ends_when_its_time_is_up(server):
    assert not server.wait(0.01)
    assert list(server.drain()) == []


def test_a_watched_descriptor_wakes_a_wait(server):
    here, there = socket.socketpair()
    with here, there:
        server.watch(here.fileno())
        there.send(b"!")
        assert not server.wait(WAIT_S)  # returns at once, and there is no message


def test_a_worker_finds_its_server_again_after_a_restart(server):
    endpoint = server.endpoint
    with WorkerLink(endpoint) as worker:
        assert worker.wait_room(WAIT_S)
        server.close()
        until(lambda: not worker.send(b"gone?"), worker)
        with ServerLink(endpoint) as again:
            assert worker.wait_room(WAIT_S)
            worker.send(b"back")
            assert bytes(take(again, 1)[-1][1]) == b"back"


def test_close_may_be_called_twice(worker):
    worker.close()
    worker.close()
    assert worker.closed


def test_one_wait_serves_links_to_several_servers():
    with ServerLink(ANY_PORT) as first, ServerLink(ANY_PORT) as second:
        group = WorkerLinks([first.endpoint, second.endpoint])
        for link, server in zip(group.links, (first, second), strict=True):
            assert link.wait_room(WAIT_S)
            assert link.send(b"hello")
            [(peer, _)] = take(server, 1)
            if server is second:
                server.send(peer, b"from the second")
        assert group.wait(WAIT_S) == [1]
        assert [bytes(frame) for frame in group.links[1].drain()] == [b"from the second"]
        assert group.wait(0.0) == []
        assert group.wait(WAIT_S, room=[0]) == []  # there is room: it returns at once
        group.close()
        group.close()
        assert group.closed


def test_a_group_with_an_address_that_is_none_is_refused_whole(server):
    with pytest.raises(ConfigError, match="write an address such as"):
        WorkerLinks([server.endpoint, "nowhere"])

"""What libzmq does not bound by itself: connections, descriptors, messages that never end."""

import contextlib
import resource
import select
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from psq import link_server
from psq.connections import STRANGERS_BYTES, UNREAD_BYTES
from psq.link import MAX_FRAME_BYTES, ServerLink, WorkerLink, connection_limit

ANY_PORT = "tcp://127.0.0.1:0"
LOOKS = 1000
LOOK_S = 0.02
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
MORE = b"\x01\x00"  # an empty part with others after it


@pytest.fixture
def server():
    with ServerLink(ANY_PORT) as link:
        yield link


def port_of(server):
    return int(server.endpoint.rpartition(":")[2])


@pytest.fixture
def peer(server):
    """A hostile peer's socket, past its handshake."""
    with socket.create_connection(("127.0.0.1", port_of(server))) as made:
        made.sendall(GREETING + bytes([4, len(READY)]) + READY)
        wait_bytes(made, len(GREETING) + 4)
        yield made


def wait_bytes(made, count):
    got = b""
    while len(got) < count:
        assert select.select([made], [], [], 10.0)[0], "no greeting came"
        got += made.recv(4096)


def until(server, condition):
    """Turn until `condition` holds; the frames that came meanwhile."""
    came = []
    for _ in range(LOOKS):
        server.wait(LOOK_S)
        came += [bytes(frame) for _, frame in server.drain()]
        if condition():
            return came
    pytest.fail("it did not happen")


def has_ended(made):
    """Whether the other end has hung up."""
    if not select.select([made], [], [], 0)[0]:
        return False
    try:
        return not made.recv(4096)
    except OSError:
        return True


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
        (zmq.RCVHWM, 64),
        (zmq.HANDSHAKE_IVL, 3000),
        (zmq.CONNECT_TIMEOUT, 1000),
        (zmq.RECONNECT_IVL, 100),
        (zmq.RECONNECT_IVL_MAX, 500),
        (zmq.TCP_MAXRT, 30_000),
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.TCP_KEEPALIVE_IDLE, 5),
        (zmq.TCP_KEEPALIVE_INTVL, 2),
        (zmq.TCP_KEEPALIVE_CNT, 3),
        (zmq.HEARTBEAT_IVL, 0),
        (zmq.IMMEDIATE, 1),
    ],
)
def test_both_ends_have_the_limits_that_are_promised(server, option, value):
    with WorkerLink(server.endpoint) as worker:
        for link in (server, worker):
            assert link._socket.getsockopt(option) == value
            assert link._socket.getsockopt(zmq.SNDHWM) == 64
    assert server._socket.getsockopt(zmq.BACKLOG) == 1024


def test_the_end_of_a_connection_is_told_once_and_after_its_last_frame(server):
    with WorkerLink(server.endpoint) as worker:
        assert worker.wait_room(10.0)
        worker.send(b"hello")
        assert until(server, lambda: server.received_frames) == [b"hello"]
        worker.send(b"bye")
    came, ended = [], []
    for _ in range(LOOKS):
        server.wait(LOOK_S)
        for name, frame in server.drain():
            came.append((name, bytes(frame)))
        ended += server.ended()
        if ended:
            break
        assert came in ([], [(came[0][0], b"bye")] if came else [])
    assert [name for name, _ in came] == ended
    until(server, lambda: not server.connections)
    assert server.ended() == []


def test_a_message_that_never_ends_is_cut_off_before_it_fills_the_memory(server, peer):
    honest = WorkerLink(server.endpoint)
    with honest:
        assert honest.wait_room(10.0)
        peer.settimeout(0.0)
        before, sent = resident_bytes(), 0
        while not server.hung_up:
            with contextlib.suppress(BlockingIOError):
                sent += peer.send(MORE * 8192)
            until(server, lambda: True)
        assert sent > UNREAD_BYTES
        assert resident_bytes() - before < 400 << 20
        until(server, lambda: server.connections == 1)
        assert any("message without end" in note for note in server.notes())
        honest.send(b"still here")
        assert until(server, lambda: server.received_frames) == [b"still here"]


def test_a_message_of_several_parts_is_dropped_and_its_sender_stays(server, peer):
    peer.sendall(MORE * 10 + b"\x00\x01x" + b"\x00\x04good")
    assert until(server, lambda: server.received_frames) == [b"good"]
    assert (server.refused, server.hung_up, server.connections) == (1, 0, 1)


def test_who_sends_messages_of_many_parts_is_hung_up_on(server, peer):
    peer.sendall(MORE * 10_000 + b"\x00\x01x")
    until(server, lambda: server.refused == 1)
    until(server, lambda: has_ended(peer))
    until(server, lambda: server.connections == 0)


def test_strangers_share_what_may_be_unread_and_members_are_not_among_them(server):
    """Each has less than one may have; together they have more than strangers may."""
    part = b"\x01\xfa" + bytes(250)  # with others after it
    unfinished = part * (UNREAD_BYTES // 2 // len(part))
    count = 2 * STRANGERS_BYTES // len(unfinished)
    port = port_of(server)
    with contextlib.ExitStack() as stack:
        made = []
        for number in range(count + 1):
            peer = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            peer.sendall(GREETING + bytes([4, len(READY)]) + READY)
            wait_bytes(peer, len(GREETING) + 4)
            peer.sendall(b"\x00\x01%d" % (number % 10))
            made.append(peer)
        names = []
        while len(names) < len(made):
            server.wait(LOOK_S)
            names += [name for name, _ in server.drain()]
        server.members = {names[0]}
        for peer in made:
            peer.sendall(unfinished)
        until(server, lambda: server.connections * len(unfinished) <= STRANGERS_BYTES * 1.2)
        assert any("strangers had" in note for note in server.notes())
        assert server.hung_up >= count // 3
        assert names[0] in {each.peer for each in server._connections._open.values()}


def test_an_honest_peer_that_sends_much_is_not_cut_off(server):
    """More than 100 times what may be unread, in the largest frames, and in small ones."""
    with WorkerLink(server.endpoint) as worker:
        assert worker.wait_room(10.0)
        left = {MAX_FRAME_BYTES: 128, 1: 20_000}
        expected = sum(left.values())
        while server.received_frames < expected:
            for size, count in left.items():
                if count and worker.send(bytes(size)):
                    left[size] -= 1
            server.wait(0.0)
            for _ in server.drain():
                pass
        assert server.hung_up == 0


def test_an_honest_peer_whose_server_does_not_look_is_not_cut_off(server):
    """What waits to be read is no message without end, however much it is."""
    with WorkerLink(server.endpoint) as worker:
        assert worker.wait_room(10.0)
        for _ in range(16):
            assert worker.wait_room(10.0)
            worker.send(bytes(MAX_FRAME_BYTES))
        for _ in range(20):
            server.wait(LOOK_S)
        assert len(until(server, lambda: server.received_frames == 16)) == 16
        assert server.hung_up == 0


def test_a_frame_that_is_too_large_ends_its_connection(server, peer):
    peer.sendall(b"\x02" + struct.pack(">Q", MAX_FRAME_BYTES + 1))
    until(server, lambda: has_ended(peer))
    until(server, lambda: server.connections == 0)


def test_who_does_not_finish_its_handshake_is_hung_up_on(server):
    with socket.create_connection(("127.0.0.1", port_of(server))) as slow:
        slow.sendall(GREETING[:11])
        until(server, lambda: server.connections == 1)
        until(server, lambda: has_ended(slow))
        until(server, lambda: server.connections == 0)


def test_of_too_many_connections_the_oldest_silent_ones_go():
    with ServerLink(ANY_PORT, max_connections=3) as server, contextlib.ExitStack() as stack:
        worker = stack.enter_context(WorkerLink(server.endpoint))
        assert worker.wait_room(10.0)
        worker.send(b"hello")
        until(server, lambda: server.received_frames)
        made = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port_of(server))))
            for _ in range(5)
        ]
        until(server, lambda: server.hung_up == 3 and server.connections == 3)
        until(server, lambda: [has_ended(each) for each in made] == [True] * 3 + [False] * 2)
        worker.send(b"still here")
        assert until(server, lambda: server.received_frames == 2) == [b"still here"]


CROWD = """
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (500, 500))
made = []
try:
    for _ in range(400):
        made.append(socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=1))
except OSError:
    pass
print(len(made), flush=True)
sys.stdin.read()
"""
STARVED = """
import resource, sys, time
from psq.link import ServerLink, WorkerLink
server = ServerLink("tcp://127.0.0.1:0", max_connections=10_000)
worker = WorkerLink(server.endpoint)
seen = {"frames": 0, "notes": []}

def turn():
    server.wait(0.1)
    seen["frames"] += len(list(server.drain()))
    seen["notes"] += server.notes()

def until(done):
    ends_s = time.monotonic() + 20
    while not done() and time.monotonic() < ends_s:
        turn()

until(lambda: worker.send(b"hello"))
until(lambda: seen["frames"])
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 5000))
print(server.endpoint, flush=True)
until(lambda: seen["notes"])
print(seen["notes"][0], flush=True)
began_s, ends_s = time.process_time(), time.monotonic() + 1.5
while time.monotonic() < ends_s:
    turn()
print(time.process_time() - began_s, flush=True)
worker.send(b"still here")
until(lambda: seen["frames"] > 1)
sys.stdin.readline()
until(lambda: server.connections == 1)
print(seen["frames"], server.connections, worker.failures, flush=True)
"""


def test_without_descriptors_silent_connections_go_and_nothing_spins():
    """libzmq alone tries to accept for ever, with a whole core."""
    python = [sys.executable, "-c"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*python, STARVED], **pipes) as starved:
        port = starved.stdout.readline().rpartition(":")[2].strip()
        with subprocess.Popen([*python, CROWD, port], **pipes) as crowd:
            assert int(crowd.stdout.readline()) >= 80
            assert "never heard" in starved.stdout.readline()
            assert float(starved.stdout.readline()) < 0.5
            crowd.communicate("")
        out, _ = starved.communicate("\n")
        assert out.split() == ["2", "1", "0"]


@pytest.mark.parametrize(
    ("soft", "hard", "expected", "raised"),
    [
        (1024, 4096, 1920, 4096),
        (1024, 1_000_000, 8192, 16_640),
        (20_000, 20_000, 8192, 20_000),
        (100, 100, 1, 100),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 8192, resource.RLIM_INFINITY),
    ],
)
def test_there_are_no_more_connections_than_descriptors_for_them(
    monkeypatch, soft, hard, expected, raised
):
    now = [soft, hard]
    monkeypatch.setattr(link_server.resource, "getrlimit", lambda _: tuple(now))
    monkeypatch.setattr(
        link_server.resource, "setrlimit", lambda _, pair: now.__setitem__(0, pair[0])
    )
    assert connection_limit() == expected
    assert now == [raised, hard]

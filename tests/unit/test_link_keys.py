"""The door: who is let in, what those hear who are not, and that the door is tried before use."""

import socket
import time

import pytest
import zmq
from zmq.utils import z85

from psq import curve
from psq.curve import decide, new_pair, z85_encode
from psq.errors import ConfigError, RefusedError
from psq.keys import AUTHORIZED, Authorized, Ranks, ServerKeys, WorkerKeys, write_public
from psq.link import MAX_FRAME_BYTES, ServerLink, WorkerLink, WorkerLinks

ANY_PORT = "tcp://127.0.0.1:0"
LOOKS = 1000
LOOK_S = 0.01


class Place:
    """A server's folder, and keys for it."""

    def __init__(self, folder):
        self.authorized = folder / AUTHORIZED
        self.authorized.mkdir(mode=0o700)
        self.server = ServerKeys(new_pair(), self.authorized)
        self.folder = folder

    def worker(self, rank, *, listed=True):
        pair = new_pair()
        if listed:
            write_public(self.authorized / f"rank{rank}.pub", pair.public, "", Ranks(rank, rank))
        return WorkerKeys(pair, self.server.own.public, self.folder / f"rank{rank}.secret")


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture
def server(place):
    place.mine = place.worker(0)
    with ServerLink(ANY_PORT, keys=place.server) as link:
        yield link


def turn(server, *others):
    """Let everybody look once; what the server got, with whose key."""
    server.wait(LOOK_S)
    came = [(peer, bytes(frame), server.key) for peer, frame in server.drain()]
    for other in others:
        other.wait(0.0)
    return came


def until(condition, server, *others):
    """Turn until `condition` holds; everything that came meanwhile."""
    came = []
    for _ in range(LOOKS):
        came += turn(server, *others)
        if condition():
            return came
    pytest.fail("it did not happen")


def say(server, worker, frame):
    """Send once there is a connection; what came."""
    until(lambda: worker.send(frame), server, worker)
    came = []
    for _ in range(LOOKS):
        came += turn(server, worker)
        if came:
            return came
    pytest.fail("nothing came")


def test_an_authorized_key_is_let_in_and_each_frame_says_whose_it_is(server, place):
    with WorkerLink(server.endpoint, keys=place.mine) as worker:
        [(peer, frame, key)] = say(server, worker, b"hello")
        assert frame == b"hello"
        assert key == Authorized("rank0", place.mine.own.public, Ranks(0, 0))
        server.send(peer, b"welcome")
        until(lambda: [bytes(frame) for frame in worker.drain()] == [b"welcome"], server)


def test_nothing_readable_is_on_the_wire(server, place):
    """A proxy that keeps what passes sees neither the frame nor any part of it."""
    secret = b"gradients of a private model " * 40
    seen = bytearray()
    host, port = server.endpoint.removeprefix("tcp://").split(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with WorkerLink(near, keys=place.mine) as worker:
            inner, _ = listener.accept()
            outer = socket.create_connection((host, int(port)))
            with inner, outer:
                ends = (inner, outer)
                for end in ends:
                    end.settimeout(0.0)

                def forward():
                    for one, other in (ends, ends[::-1]):
                        try:
                            data = one.recv(65536)
                        except BlockingIOError:
                            continue
                        seen.extend(data)
                        other.sendall(data)
                    return False

                sent, came = False, []
                for _ in range(LOOKS):
                    forward()
                    sent = sent or worker.send(secret)
                    came += turn(server)
                    if came:
                        break
    assert came[0][1] == secret
    assert len(seen) > len(secret)
    assert b"gradients" not in seen
    assert b"private" not in seen


def test_the_largest_frame_fits_in_both_directions(server, place):
    frame = bytes(MAX_FRAME_BYTES)
    with WorkerLink(server.endpoint, keys=place.mine) as worker:
        [(peer, came, _)] = say(server, worker, frame)
        assert came == frame
        server.send(peer, frame)
        until(lambda: [len(f) for f in worker.drain()] == [MAX_FRAME_BYTES], server)


def test_both_ends_count_the_bytes_of_encryption(server, place):
    with WorkerLink(server.endpoint, keys=place.mine) as worker:
        for size in (1, 222, 223, 5000):
            say(server, worker, bytes(size))
        # 33 bytes more each, and the longer framing from 223 on.
        assert worker.sent_bytes == server.received_bytes == 36 + 257 + 265 + 5042


def refusal(server, worker):
    """What a worker hears that is turned away."""
    heard = []

    def is_heard():
        try:
            worker.wait(0.0)
        except RefusedError as error:
            heard.append(str(error))
        return heard

    until(is_heard, server)
    return heard[0]


def test_an_unknown_key_is_refused_and_its_worker_told(server, place):
    stranger = place.worker(5, listed=False)
    with WorkerLink(server.endpoint, keys=stranger) as worker:
        told = refusal(server, worker)
        assert f"server {server.endpoint} refused the key" in told
        assert "rank5.secret" in told
        assert stranger.own.secret not in told
        assert not worker.send(b"let me in")
    assert server.refused_keys == 2  # and the canary's
    assert any("refused, from 127.0.0.1" in note for note in server.notes())


def test_a_worker_without_keys_is_told_that_it_needs_some(server):
    with WorkerLink(server.endpoint) as worker:
        assert "wants keys and this worker has none" in refusal(server, worker)


def test_a_worker_with_keys_does_not_talk_to_a_server_without(place):
    with ServerLink(ANY_PORT) as server, WorkerLink(server.endpoint, keys=place.worker(0)) as it:
        assert "speaks plaintext and this worker has keys" in refusal(server, it)
        assert not it.send(b"secret")


def test_a_worker_does_not_talk_to_a_server_with_another_key(server, place):
    """Whoever took the server's address has not its key; the worker's is not even shown."""
    wrong = WorkerKeys(place.mine.own, new_pair().public, place.folder)
    with WorkerLink(server.endpoint, keys=wrong) as worker:
        until(lambda: worker.failures > 1, server, worker)
        assert not worker.send(b"secret")
    assert server.refused_keys == 1  # the canary's


def test_a_group_of_links_hears_of_a_refusal_too(server, place):
    group = WorkerLinks([server.endpoint], keys=place.worker(5, listed=False))
    try:
        assert "refused the key" in refusal(server, group)
    finally:
        group.close(0.0)


@pytest.fixture
def _at_once(monkeypatch):
    """The folder is looked at in every turn."""
    monkeypatch.setattr(curve, "RELOAD_S", 0.0)


def test_a_key_that_is_added_is_let_in_without_a_restart(server, place):
    with WorkerLink(server.endpoint, keys=place.worker(1)) as worker:
        [(_, _, key)] = say(server, worker, b"hello")
        assert key.name == "rank1"


@pytest.mark.usefixtures("_at_once")
def test_a_key_that_is_revoked_is_cut_off_although_it_is_connected(server, place):
    with WorkerLink(server.endpoint, keys=place.mine) as worker:
        [(peer, _, _)] = say(server, worker, b"hello")
        (place.authorized / "rank0.pub").unlink()
        ended = []
        until(lambda: ended.extend(server.ended()) or ended, server)
        assert ended == [peer]
        assert "refused the key" in refusal(server, worker)
    assert server.hung_up == 1


def test_a_frame_that_was_under_way_when_its_key_was_revoked_is_dropped(server, place):
    with WorkerLink(server.endpoint, keys=place.mine) as worker:
        say(server, worker, b"hello")
        server._doorman.authorized = {}
        worker.send(b"one more")
        came = until(lambda: server.refused, server)
        assert came == []
        assert server.key is None


@pytest.mark.usefixtures("_at_once")
def test_a_broken_file_lets_nobody_in_and_cuts_off_nobody_else(server, place):
    with WorkerLink(server.endpoint, keys=place.mine) as worker:
        say(server, worker, b"hello")
        (place.authorized / "broken.pub").write_text("half a f")
        notes = []
        until(lambda: notes.extend(server.notes()) or notes, server, worker)
        assert any("broken.pub is no key file" in note for note in notes)
        assert say(server, worker, b"still here")


@pytest.mark.usefixtures("_at_once")
def test_who_is_let_in_stays_while_the_folder_cannot_be_read(server, place):
    with WorkerLink(server.endpoint, keys=place.mine) as worker:
        say(server, worker, b"hello")
        place.authorized.rename(place.folder / "away")
        notes = []
        until(lambda: notes.extend(server.notes()) or notes, server, worker)
        assert any("who is let in stays as it was" in note for note in notes)
        assert say(server, worker, b"still here")


def test_a_server_whose_door_is_open_does_not_start(place, monkeypatch):
    def let_everybody_in(request, authorized):
        del authorized
        return [b"1.0", request[1], b"200", b"OK", b"anybody", b""], "", ""

    monkeypatch.setattr(curve, "decide", let_everybody_in)
    with pytest.raises(ConfigError, match="let in a key that was made up"):
        ServerLink(ANY_PORT, keys=place.server)


def test_a_server_whose_door_nobody_answers_does_not_start(place, monkeypatch):
    monkeypatch.setattr(curve, "CANARY_S", 0.2)
    monkeypatch.setattr(curve.Doorman, "answer", lambda _: None)
    with pytest.raises(ConfigError, match="did not answer its own canary"):
        ServerLink(ANY_PORT, keys=place.server)


def test_without_a_doorman_libzmq_itself_refuses(server, place):
    """The second lock: a socket that enforces its domain lets nobody in unasked."""
    server._doorman.sockets[0].unbind("inproc://zeromq.zap.01")
    with WorkerLink(server.endpoint, keys=place.mine) as worker:
        until(lambda: worker.failures, server, worker)
        assert not worker.send(b"hello")


def test_the_door_stays_open_while_its_socket_is_renewed(server, place, monkeypatch):
    monkeypatch.setattr(curve, "RENEW_AFTER", 1)
    monkeypatch.setattr(curve, "HANDSHAKES_S", 0.0)
    first = server._doorman.sockets[0]
    with WorkerLink(server.endpoint, keys=place.mine) as before:
        say(server, before, b"one")
        until(lambda: first.closed, server, before)
        assert len(server._doorman.sockets) == 1
        say(server, before, b"two")
        with WorkerLink(server.endpoint, keys=place.worker(1)) as after:
            [(_, _, key)] = say(server, after, b"three")
            assert key.name == "rank1"


def test_a_port_is_free_again_after_a_server_that_did_not_start(place, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"tcp://127.0.0.1:{port}"
    monkeypatch.setattr(curve, "CANARY_S", 0.05)
    monkeypatch.setattr(curve.Doorman, "answer", lambda _: None)
    with pytest.raises(ConfigError):
        ServerLink(endpoint, keys=place.server)
    monkeypatch.undo()
    with ServerLink(endpoint, keys=place.server) as server:
        assert server.endpoint == endpoint


def test_keys_are_written_as_zeromq_writes_them():
    for data in (bytes(32), bytes(range(32)), b"\xff" * 32):
        assert z85_encode(data) == z85.encode(data).decode()


REQUEST = [b"1.0", b"7", b"psq", b"10.0.0.9", b"", b"CURVE", bytes(32)]
LISTED = {z85_encode(bytes(32)): Authorized("rank0", z85_encode(bytes(32)), Ranks(0, 0))}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, b"200"),
        ({6: bytes(31) + b"\1"}, b"400"),
        ({6: b""}, b"400"),
        ({6: bytes(36)}, b"400"),
        ({5: b"NULL"}, b"400"),
        ({5: b"PLAIN"}, b"400"),
        ({2: b"other"}, b"400"),
        ({0: b"2.0"}, b"500"),
    ],
)
def test_the_door_opens_for_a_listed_key_of_this_domain_and_nothing_else(change, code):
    request = [change.get(index, part) for index, part in enumerate(REQUEST)]
    reply, refused, _ = decide(request, LISTED)
    assert (reply[0], reply[1], reply[2]) == (b"1.0", b"7", code)
    assert (reply[4] == b"") == (code != b"200")
    assert bool(refused) == (code == b"400")


@pytest.mark.parametrize("parts", range(7))
def test_a_request_that_is_cut_short_is_refused(parts):
    assert decide(REQUEST[:parts], LISTED)[0][2] == b"500"


def test_a_flood_of_strangers_is_counted_and_not_told_one_by_one(server, place):
    began_s = time.monotonic()
    for _ in range(12):
        with WorkerLink(server.endpoint, keys=place.worker(5, listed=False)) as worker:
            refusal(server, worker)
    assert server.refused_keys == 13
    periods = 1 + (time.monotonic() - began_s) / 10.0
    assert len(server.notes()) <= 9 * periods


def test_a_libzmq_without_encryption_is_named(monkeypatch):
    monkeypatch.setattr(zmq, "has", lambda _: False)
    with pytest.raises(ConfigError, match="built without CURVE"):
        new_pair()

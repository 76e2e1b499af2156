"""A disk that refuses: nobody hears of what is not durable, everybody hears why, and it heals."""

import errno
import select
import threading

import pytest
from durable_server import END_S, Server, begun

import psq.durable.journal
import psq.durable.segment
import psq_server.store
from psq.durable.files import sync
from psq.errors import StateError
from psq.plan import Plan
from psq.presets import preset
from psq_proto.messages import NONE, Heartbeat, MessageType, Status, Verdict
from psq_server.state import StopRequested, Tick

PLAN = Plan.of([("x", (40, 30)), ("b", (7,))], preset("server-adam"), 2)
NO_SPACE = "No space left on device"


class Disk:
    """What an fsync of the journal does."""

    def __init__(self):
        self.refuses, self.struck = False, 0

    def sync(self, fd):
        if self.refuses:
            self.struck += 1
            raise OSError(errno.ENOSPC, NO_SPACE)
        sync(fd)


@pytest.fixture
def disk(monkeypatch):
    made = Disk()
    monkeypatch.setattr(psq.durable.segment, "sync", made.sync)
    monkeypatch.setattr(psq.durable.journal, "RETRY_S", 0.01)
    return made


def wait_for(server, condition):
    while not condition():
        assert select.select([server.store.fd], [], [], END_S)[0], "the disk did not answer"
        server._hear()


def status(speaker):
    speaker.send(MessageType.HEARTBEAT, Heartbeat(0))
    return [m.body for m in speaker.heard if isinstance(m.body, Status)][-1]


def verdicts(speaker):
    return [m for m in speaker.heard if isinstance(m.body, Verdict)]


def test_while_the_disk_refuses_nothing_is_heard_of_a_round_but_why(tmp_path, disk):
    server, speakers = begun(tmp_path / "state", PLAN)
    for speaker in speakers:
        speaker.push(0)
    server.settle()
    assert [len(verdicts(speaker)) for speaker in speakers] == [1, 1]
    disk.refuses = True
    for speaker in speakers:
        speaker.push(1)
    wait_for(server, lambda: server.commits.blocked)
    assert disk.struck
    assert server.version == 2
    assert [len(verdicts(speaker)) for speaker in speakers] == [1, 1]
    told = status(speakers[0])
    assert (told.version, told.round, told.resolved, told.missing) == (1, 1, 0, ())
    assert NO_SPACE in told.text
    assert str(tmp_path) in told.text
    snapshot = server.state.snapshot(server.now_s)
    assert (snapshot.status, NO_SPACE in snapshot.text) == ("blocked", True)
    disk.refuses = False
    server.settle()
    assert [len(verdicts(speaker)) for speaker in speakers] == [2, 2]
    assert server.commits.blocked == ""
    told = status(speakers[0])
    assert (told.version, told.resolved) == (2, 1)
    assert told.text.startswith("waiting for ranks 0, 1 of 2")
    server.crash()


def test_a_crash_while_the_disk_refuses_takes_back_what_nobody_heard_of(tmp_path, disk):
    server, speakers = begun(tmp_path / "state", PLAN)
    for speaker in speakers:
        speaker.push(0)
    server.settle()
    before = server.everything()
    disk.refuses = True
    for speaker in speakers:
        speaker.push(1)
    wait_for(server, lambda: server.commits.blocked)
    server.crash()
    disk.refuses = False
    came_back = Server(tmp_path / "state", PLAN)
    assert came_back.version in (1, 2)  # it may have got there: nobody was told
    if came_back.version == 1:
        assert came_back.everything()[0] == before[0]
    came_back.crash()


def test_a_server_that_is_told_to_stop_while_the_disk_refuses_ends_all_the_same(tmp_path, disk):
    server, speakers = begun(tmp_path / "state", PLAN)
    disk.refuses = True
    for speaker in speakers:
        speaker.push(0)
    wait_for(server, lambda: server.commits.blocked)
    server.happen(StopRequested("SIGTERM"))
    assert server.stopped is None
    assert server.commits.give_up() is None
    server.now_s += 5.6
    failure = server.commits.give_up()
    assert failure is not None
    assert failure.exit_code == 65
    assert NO_SPACE in str(failure)
    server.crash()


def test_initial_weights_are_tried_again_until_they_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(psq_server.store, "RETRY_S", 0.01)
    real, struck = psq_server.store.write_checkpoint, []

    def refuse(*given):
        if len(struck) < 2:
            struck.append(given)
            msg = "the disk is full"
            raise StateError(msg)
        return real(*given)

    monkeypatch.setattr(psq_server.store, "write_checkpoint", refuse)
    server, _ = begun(tmp_path / "state", PLAN)
    assert len(struck) == 2
    assert server.store.version == 0
    assert "event=blocked" in server.log.getvalue()
    assert "event=unblocked" in server.log.getvalue()
    server.crash()


def test_another_checkpoint_that_fails_holds_up_nobody(tmp_path, monkeypatch):
    server, speakers = begun(tmp_path / "state", PLAN, checkpoint_every=1)

    def refuse(*_):
        msg = "the disk is full"
        raise StateError(msg)

    monkeypatch.setattr(psq_server.store, "write_checkpoint", refuse)
    for version in range(2):
        for speaker in speakers:
            speaker.push(version)
        server.settle()
    assert server.version == 2
    assert server.store.failed_checkpoints == 2
    assert status(speakers[0]).resolved == 1 != NONE
    server.crash()


def test_a_last_checkpoint_that_is_slow_is_done_without_where_the_journal_has_it_all(
    tmp_path, monkeypatch
):
    server, speakers = begun(tmp_path / "state", PLAN)
    for speaker in speakers:
        speaker.push(0)
    server.settle()
    real, may_go = psq_server.store.write_checkpoint, threading.Event()

    def slow(*given):
        assert may_go.wait(END_S)
        return real(*given)

    monkeypatch.setattr(psq_server.store, "write_checkpoint", slow)
    server.happen(StopRequested("SIGTERM"))
    server._hear()
    assert server.stopped is None
    server.now_s += 5.6
    server._hear()
    assert server.commits.give_up() is None
    assert server.stopped is not None
    assert server.stopped.exit_code == 0
    may_go.set()
    server.crash()


def test_a_round_that_is_half_made_at_the_end_is_not_saved(tmp_path):
    plan = Plan.of([("x", (1 << 20,)), ("b", (7,))], preset("server-adam"), 2)
    server, speakers = begun(tmp_path / "state", plan)
    for speaker in speakers:
        speaker.push(0, [0])  # the first of two shards is reduced
    server.happen(StopRequested("SIGTERM"))
    server.now_s += 3.0
    server.happen(Tick())
    assert server.stopped is not None
    assert server.saved is None
    assert "SIGTERM" in server.stopped.text
    assert "event=not-saved" in server.log.getvalue()
    server.crash()
    came_back = Server(tmp_path / "state", plan)
    assert came_back.version == 0
    assert came_back.weights.reducer.counts()[0][0] == 0
    came_back.crash()

"""Copies of checkpoints elsewhere: one at a time, the newest next, and nobody waits for them."""

from __future__ import annotations

import select
import threading

import pytest
from durable_server import END_S, begun

from psq.durable.checkpoint import list_checkpoints
from psq.errors import ConfigError, StateError
from psq.plan import Plan
from psq.presets import preset
from psq_server.copies import SLOW_S, Copies

PLAN = Plan.of([("x", (40, 30)), ("b", (7,))], preset("server-adam"), 2)


class Elsewhere:
    """A store that takes what it is told to, one copy at a time."""

    def __init__(self):
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.paths = []
        self.error = None

    def copy(self, path):
        assert path.is_dir(), "it was removed before its turn"
        self.paths.append(path)
        self.begun.release()
        assert self.may_end.acquire(timeout=END_S)
        assert path.is_dir(), "it was removed meanwhile"
        if self.error:
            raise self.error
        return f"far://{path.name}"


class News:
    """What became of copies, one after another."""

    def __init__(self):
        self.said = []
        self._came = threading.Semaphore(0)

    def tell(self, news):
        self.said.append(news)
        self._came.release()

    def wait(self):
        assert self._came.acquire(timeout=END_S)
        return self.said[-1]


@pytest.fixture
def far():
    store = Elsewhere()
    yield store
    store.may_end.release(1000)


def wait_for(server, line):
    """Wait until the server has logged this."""
    while line not in server.log.getvalue():
        assert select.select([server.store.fd], [], [], END_S)[0], server.log.getvalue()
        server._hear()


def folders(tmp_path, count):
    paths = [tmp_path / f"checkpoint-{number}" for number in range(count)]
    for path in paths:
        path.mkdir()
    return paths


def test_one_is_copied_one_waits_and_the_newest_wins(tmp_path, far):
    news, paths = News(), folders(tmp_path, 4)
    copies = Copies(far.copy, news.tell)
    copies.offer(0, paths[0])
    assert far.begun.acquire(timeout=END_S)
    assert copies.offer(1, paths[1]) == ""
    assert copies.offer(2, paths[2]) == "version 1 is not copied, this one is newer"
    assert copies.offer(3, paths[3]) == "version 2 is not copied, this one is newer"
    assert copies.wanted == (paths[0], paths[3])
    far.may_end.release(2)
    assert (news.wait(), news.wait()) is not None
    assert [(n.version, n.text) for n in news.said] == [
        (0, "far://checkpoint-0"),
        (3, "far://checkpoint-3"),
    ]
    assert copies.counts == {"copied": 2, "failed": 0, "overtaken": 2}
    assert copies.wanted == ()
    assert copies.close(END_S)


def test_a_copy_that_fails_is_said_and_the_next_is_made(tmp_path, far):
    news, paths = News(), folders(tmp_path, 2)
    far.error = StateError("no such bucket")
    copies = Copies(far.copy, news.tell)
    copies.offer(0, paths[0])
    far.may_end.release()
    assert (news.wait().text, news.said[-1].failed) == ("no such bucket", True)
    far.error = None
    copies.offer(1, paths[1])
    far.may_end.release()
    assert not news.wait().failed
    assert copies.counts == {"copied": 1, "failed": 1, "overtaken": 0}
    assert copies.close(END_S)


def test_a_copy_that_hangs_is_mentioned_and_ends_no_process(tmp_path, far):
    now_s = [100.0]
    copies = Copies(far.copy, News().tell, clock=lambda: now_s[0])
    first, second = folders(tmp_path, 2)
    copies.offer(7, first)
    assert far.begun.acquire(timeout=END_S)
    now_s[0] += SLOW_S + 5
    assert copies.offer(8, second) == "the copy of version 7 takes 65 s so far"
    assert not copies.close(0.0)


def test_checkpoints_go_on_and_stay_readable_while_a_store_hangs(tmp_path, far):
    server, speakers = begun(tmp_path / "state", PLAN, checkpoint_every=1, copy=far.copy)
    assert far.begun.acquire(timeout=END_S)
    for version in range(6):
        for speaker in speakers:
            speaker.push(version)
        server.settle()
    assert server.store.version == 6, "a copy that does not end holds up no checkpoint"
    kept = [one.version for one in list_checkpoints(server.directory.checkpoints)]
    assert kept == [6, 5, 0], "the last two, and the one that is being copied"
    far.may_end.release(2)
    wait_for(server, "event=copied version=6 to=far://checkpoint-00000000000000000006")
    assert "event=copied version=0 to=far://checkpoint-0" in server.log.getvalue()
    assert server.store.copies == {"copied": 2, "failed": 0, "overtaken": 5}
    server.crash()


def test_a_copy_that_cannot_be_made_at_all_is_a_warning_and_ends_no_checkpoint(tmp_path):
    def refuse(path):
        msg = f"{path.name} cannot be copied: nothing knows such a URL"
        raise ConfigError(msg)

    server, speakers = begun(tmp_path / "state", PLAN, checkpoint_every=1, copy=refuse)
    wait_for(server, "warning event=not-copied version=0 ")
    for speaker in speakers:
        speaker.push(0)
    server.settle()
    wait_for(server, "warning event=not-copied version=1 ")
    assert "nothing knows such a URL" in server.log.getvalue()
    assert server.store.version == 1
    server.crash()

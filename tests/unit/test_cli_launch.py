"""What the launcher makes of what its server says; the processes are in tests/cluster."""

from __future__ import annotations

import pytest

from psq.errors import GaveUpError
from psq_worker import launch
from psq_worker.board import Board

WAITING = (
    "2026-01-01T00:00:00Z info event=waiting need=join round=0 "
    'text="waiting for rank 1 of 2 for 5 s, never seen (to join)"'
)
LEFT = '2026-01-01T00:00:00Z info event=left rank={} reason=done text=""'


class Said:
    """A view that keeps what it is told, and children that run for some looks."""

    def __init__(self, looks):
        self._looks = looks
        self.lines = []

    def say(self, who, text):
        self.lines.append((who, text))

    def refresh(self, board):
        pass

    def running(self, name):
        assert name == "server"
        self._looks -= 1
        return self._looks >= 0

    def pump(self, timeout_s):
        pass


@pytest.fixture
def watch(monkeypatch):
    """Watch a server of two workers, with no patience but for saving."""
    monkeypatch.setattr(launch, "SERVER_END_S", -1.0)
    return launch._Watch(Board(2), Said(0), ["rank 0", "rank 1"])


def test_a_server_that_waits_for_a_worker_that_never_came_is_explained(watch):
    watch.on_line("server", WAITING)
    watch.on_line("server", LEFT.format(0))
    with pytest.raises(GaveUpError, match=r"rank 1 of 2 .* every rank must make a psq"):
        watch.wait_end(Said(3))


def test_a_server_that_all_have_left_has_time_to_save(watch):
    watch.on_line("server", WAITING)
    for rank in (0, 1, 1):
        watch.on_line("server", LEFT.format(rank))
    watch.wait_end(Said(3))


def test_a_save_without_an_end_is_given_up_too(watch, monkeypatch):
    monkeypatch.setattr(launch, "SAVE_S", -2.0)
    for rank in (0, 1):
        watch.on_line("server", LEFT.format(rank))
    with pytest.raises(GaveUpError, match=r"did not end within -2 s of its workers$"):
        watch.wait_end(Said(3))


def test_of_the_servers_log_warnings_are_shown_but_not_what_the_launcher_says_itself():
    said = Said(0)
    watch = launch._Watch(Board(2), said, ["rank 0", "rank 1"])
    gone = "2026-01-01T00:00:00Z warning event=left rank=0 reason={} text=SIGTERM"
    for line in (WAITING, gone.format("interrupted"), gone.format("error")):
        watch.on_line("server", line)
    assert said.lines == [("server", gone.format("error"))]

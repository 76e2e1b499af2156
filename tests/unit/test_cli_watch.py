"""What the launcher makes of what its servers say; the processes are in tests/cluster."""

from __future__ import annotations

import pytest

from psq.errors import GaveUpError
from psq_worker import watch as watching
from psq_worker.board import Board
from psq_worker.children import ChildFailedError
from psq_worker.watch import Watch, server_names

RANKS = ["rank 0", "rank 1"]
READY = "psq-server ready endpoint=tcp://127.0.0.1:{} metrics=http://m/metrics kernel=v3 pid=1"
WAITING = (
    "2026-01-01T00:00:00Z info event=waiting need=join round=0 "
    'text="waiting for rank 1 of 2 for 5 s, never seen (to join)"'
)
JOINED = "2026-01-01T00:00:00Z info event=joined rank={} world_size=2 incarnation=1"
LEFT = '2026-01-01T00:00:00Z info event=left rank={} reason=done text=""'


class View:
    """Keeps what it is told."""

    def __init__(self):
        self.lines = []

    def say(self, who, text):
        self.lines.append((who, text))

    def refresh(self, board):
        pass


class Processes:
    """Children that run for so many looks; `then` says something at each pump."""

    def __init__(self, looks, then=lambda: None):
        self._looks = dict(looks)
        self._then = then
        self.told = []

    def running(self, *names):
        return any(self._looks[name] > 0 for name in names)

    def code(self, name):
        return None if self._looks[name] > 0 else 0

    def terminate(self, name):
        self.told.append(name)

    def pump(self, _timeout_s):
        self._looks = {name: looks - 1 for name, looks in self._looks.items()}
        self._then()

    def fail(self, name, why=""):
        return ChildFailedError(name, 1, [], why)


def watch_of(servers, joined=(0, 1)):
    view, names = View(), server_names(servers)
    watch = Watch(Board(2), view, RANKS, names)
    for rank in joined:
        watch.on_line(names[-1], JOINED.format(rank))
    return watch, view


@pytest.fixture
def impatient(monkeypatch):
    """No patience but for saving."""
    monkeypatch.setattr(watching, "SERVER_END_S", -1.0)


def test_the_only_server_of_a_job_needs_no_number():
    assert server_names(1) == ["server"]
    assert server_names(3) == ["server 0", "server 1", "server 2"]


def test_addresses_come_in_the_order_of_the_servers_whoever_is_ready_first():
    watch, view = watch_of(2)
    said = [("server 1", READY.format(7001)), ("server 0", READY.format(7000))]

    def speak():
        watch.on_line(*said.pop(0))

    children = Processes({"server 0": 5, "server 1": 5}, speak)
    assert watch.wait_ready(children) == ["tcp://127.0.0.1:7000", "tcp://127.0.0.1:7001"]
    assert not said
    assert ("", "server 1 on tcp://127.0.0.1:7001, v3 kernels") in view.lines


def test_a_server_that_ends_before_it_is_ready_is_named():
    watch, _ = watch_of(2)
    watch.on_line("server 0", READY.format(7000))
    with pytest.raises(ChildFailedError, match="server 1 ended"):
        watch.wait_ready(Processes({"server 0": 9, "server 1": 0}))


def test_a_server_that_says_nothing_is_named(monkeypatch):
    monkeypatch.setattr(watching, "READY_TIMEOUT_S", -1.0)
    watch, _ = watch_of(2)
    watch.on_line("server 0", READY.format(7000))
    with pytest.raises(GaveUpError, match="server 1 said no ready line"):
        watch.wait_ready(Processes({"server 0": 9, "server 1": 9}))


@pytest.mark.usefixtures("impatient")
def test_a_server_that_ends_before_the_workers_ends_the_job_by_name():
    watch, _ = watch_of(2)
    looks = {"server 0": 99, "server 1": 1, "rank 0": 99, "rank 1": 99}
    with pytest.raises(ChildFailedError, match="server 1 ended"):
        watch.wait_trained(Processes(looks))


def test_a_server_whose_job_was_done_before_it_began_says_at_once_what_to_do():
    watch, _ = watch_of(1, joined=())
    watch.on_line("server", '2026-01-01T00:00:00Z info event=stop reason=done text="all"')
    children = Processes({"server": 0, "rank 0": 9, "rank 1": 9})
    with pytest.raises(ChildFailedError, match="is done already: name another folder"):
        watch.wait_trained(children)


@pytest.mark.usefixtures("impatient")
def test_a_server_whose_workers_have_all_left_may_end_before_the_others():
    watch, _ = watch_of(1)
    watch.hears("aggregator 2,3", "2,3")
    for rank in (2, 3):
        watch.on_line("aggregator 2,3", LEFT.format(rank))
    looks = {"server": 99, "aggregator 2,3": 1, "rank 0": 9, "rank 1": 9}
    watch.wait_trained(Processes(looks))


def test_workers_that_end_soon_after_their_server_may_do_so():
    watch, _ = watch_of(2)
    watch.wait_trained(Processes({"server 0": 9, "server 1": 1, "rank 0": 2, "rank 1": 3}))


@pytest.mark.usefixtures("impatient")
def test_a_server_that_waits_for_a_worker_that_is_gone_says_whom_it_waits_for():
    watch, _ = watch_of(1)
    watch.on_line("server", WAITING)
    watch.on_line("server", LEFT.format(0))
    with pytest.raises(GaveUpError, match=r"rank 1 of 2 for 5 s"):
        watch.wait_end(Processes({"server": 3}))


@pytest.fixture
def hasty(monkeypatch):
    """No patience with what a server has to have said by now."""
    monkeypatch.setattr(watching, "JOINED_HEARD_S", -1.0)
    monkeypatch.setattr(watching, "GOODBYE_S", -1.0)


@pytest.mark.usefixtures("hasty")
def test_a_worker_that_ends_well_and_never_joined_ends_the_job_by_rank():
    watch, _ = watch_of(1, joined=(0,))
    with pytest.raises(ChildFailedError, match=r"rank 1 ended .* it never joined"):
        watch.wait_trained(Processes({"server": 9, "rank 0": 9, "rank 1": 1}))


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("line", [JOINED, LEFT])
def test_whoever_a_server_has_heard_may_end(line):
    watch, _ = watch_of(1, joined=())
    for rank in range(2):
        watch.on_line("server", line.format(rank))
    watch.wait_trained(Processes({"server": 9, "rank 0": 2, "rank 1": 1}))


def test_a_server_may_say_a_moment_later_that_the_last_worker_had_joined():
    watch, _ = watch_of(1, joined=(0,))
    lines = [LEFT.format(0), "x", "x", JOINED.format(1)]
    children = Processes(
        {"server": 99, "rank 0": 2, "rank 1": 1},
        lambda: watch.on_line("server", lines.pop(0)) if lines else None,
    )
    watch.wait_trained(children)
    assert not lines


@pytest.mark.usefixtures("hasty")
def test_a_server_that_was_away_as_all_ended_is_told_to_once():
    watch, _ = watch_of(1)
    watch.on_line("server", LEFT.format(0))
    watch.restarts("server")
    watch.on_line("server", READY.format(7000))
    children = Processes({"server": 3})
    watch.wait_end(children)
    assert children.told == ["server"]


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("ready", [True, False])
def test_a_server_that_knows_or_is_not_ready_yet_is_let_be(ready):
    watch, _ = watch_of(1)
    watch.restarts("server")
    if ready:
        for line in (READY.format(7000), LEFT.format(0), LEFT.format(1)):
            watch.on_line("server", line)
    children = Processes({"server": 3})
    watch.wait_end(children)
    assert children.told == []


@pytest.mark.usefixtures("impatient")
def test_a_server_that_all_have_left_has_time_to_save():
    watch, _ = watch_of(2)
    watch.on_line("server 0", WAITING)
    for rank in (0, 1, 1):
        watch.on_line("server 0", LEFT.format(rank))
    watch.wait_end(Processes({"server 0": 3, "server 1": 0}))


@pytest.mark.usefixtures("impatient")
def test_a_server_that_ranks_have_not_left_has_no_such_time_whatever_others_have():
    watch, _ = watch_of(2)
    for rank in (0, 1):
        watch.on_line("server 0", LEFT.format(rank))
    with pytest.raises(GaveUpError, match="server 1 did not end"):
        watch.wait_end(Processes({"server 0": 3, "server 1": 3}))


@pytest.mark.usefixtures("impatient")
def test_a_save_without_an_end_is_given_up_too(monkeypatch):
    monkeypatch.setattr(watching, "SAVE_S", -2.0)
    watch, _ = watch_of(1)
    for rank in (0, 1):
        watch.on_line("server", LEFT.format(rank))
    with pytest.raises(GaveUpError, match=r"server did not end within -2 s of the workers$"):
        watch.wait_end(Processes({"server": 3}))


def test_of_a_servers_log_warnings_are_shown_but_not_what_the_launcher_says_itself():
    watch, view = watch_of(2)
    gone = "2026-01-01T00:00:00Z warning event=left rank=0 reason={} text=SIGTERM"
    for line in (WAITING, gone.format("interrupted"), gone.format("error")):
        watch.on_line("server 1", line)
    assert view.lines == [("server 1", gone.format("error"))]

"""Children: they end together, in time, and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest

from psq.process import PARENT_FD_ENV
from psq_worker.children import (
    MAX_LINE_BYTES,
    STOP_GRACE_S,
    TAIL_LINES,
    ChildFailedError,
    Children,
    InterruptedByError,
)

DEADLINE_S = 20.0
WAIT_FOR_EVER = "import threading; threading.Event().wait()"


def python(code):
    return [sys.executable, "-u", "-c", textwrap.dedent(code)]


class Crowd:
    """A group whose lines are kept; `until` pumps to a deadline."""

    def __init__(self):
        self.lines = []
        self.children = Children(lambda name, text: self.lines.append((name, text)))

    def start(self, name, code, **more):
        return self.children.start(name, python(code), dict(os.environ), **more)

    def until(self, done):
        deadline = time.monotonic() + DEADLINE_S
        while not done():
            assert time.monotonic() < deadline, self.lines
            self.children.pump(0.05)

    def finish(self, *names):
        self.until(lambda: not self.children.running(*names))


@pytest.fixture
def crowd():
    group = Crowd()
    with group.children:
        yield group


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def open_descriptors():
    folder = Path("/proc/self/fd")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def test_lines_of_both_streams_come_with_the_name_of_who_said_them(crowd):
    crowd.start("one", "import sys; print('out'); print('err', file=sys.stderr); print('last')")
    crowd.finish("one")
    assert sorted(crowd.lines) == [("one", "err"), ("one", "last"), ("one", "out")]


def test_a_last_line_without_an_end_and_bytes_that_are_no_text_come_through(crowd):
    crowd.start("one", r"import sys; sys.stdout.buffer.write(b'a\xffb\n\nrest')")
    crowd.finish("one")
    assert crowd.lines == [("one", "a�b"), ("one", "rest")]


def test_a_line_without_end_is_cut_so_that_it_cannot_fill_the_memory(crowd):
    crowd.start("one", f"print('x' * {3 * MAX_LINE_BYTES})")
    crowd.finish("one")
    assert len(crowd.lines) > 1
    assert "".join(text for _, text in crowd.lines) == "x" * 3 * MAX_LINE_BYTES


def test_a_child_with_a_code_ends_the_wait_with_that_code_and_its_last_words(crowd):
    crowd.start("patient", WAIT_FOR_EVER)
    crowd.start("bad", "print('why it ended'); raise SystemExit(78)")
    with pytest.raises(
        ChildFailedError, match=r"(?s)bad ended with code 78.*why it ended"
    ) as error:
        crowd.finish("patient")
    assert error.value.exit_code == 78
    assert error.value.child == "bad"


def test_last_words_are_bounded(crowd):
    crowd.start("bad", "[print(f'line {i}') for i in range(100)]; raise SystemExit(1)")
    with pytest.raises(ChildFailedError) as error:
        crowd.finish("bad")
    assert str(error.value).count("\n") == TAIL_LINES
    assert "line 99" in str(error.value)
    assert "line 80" not in str(error.value)


def test_a_child_killed_by_a_signal_is_reported_by_the_signals_name(crowd):
    crowd.start("bad", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(ChildFailedError, match=r"SIGKILL \(code 137\); it said nothing") as error:
        crowd.finish("bad")
    assert error.value.exit_code == 137


def test_a_child_that_ends_well_too_early_can_be_made_a_failure(crowd):
    crowd.start("brief", "print('bye')")
    crowd.finish("brief")
    error = crowd.children.fail("brief", "nobody asked")
    assert error.exit_code == 1
    assert "brief ended before the job did; nobody asked; its last words:\n    bye" in str(error)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_comes_out_of_pump_with_its_exit_code(crowd, number):
    crowd.start("patient", WAIT_FOR_EVER)
    os.kill(os.getpid(), number)
    with pytest.raises(InterruptedByError, match=number.name) as error:
        crowd.finish("patient")
    assert error.value.exit_code == 128 + number


def test_handlers_and_descriptors_are_as_before_after_the_block():
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    descriptors = open_descriptors()
    with Children(lambda *_: None) as children:
        children.start("one", python("pass"), dict(os.environ))
    after = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert after == handlers
    assert open_descriptors() == descriptors


def test_leaving_the_block_ends_a_child_that_listens_and_one_that_does_not():
    group = Crowd()
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf');"
    with group.children:
        pids = [group.start("polite", f"print('here'); {WAIT_FOR_EVER}")]
        pids.append(group.start("deaf", deaf + WAIT_FOR_EVER))
        group.until(lambda: len(group.lines) == 2)
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 2.0
    assert not any(is_alive(pid) for pid in pids)


POLITE = """
    import signal, sys, threading, time
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    print("ready")
    told.wait()
    print("told", time.monotonic())
"""


@pytest.mark.parametrize("stubborn", [True, False])
def test_those_that_outlive_are_told_last_and_in_time_even_when_others_do_not_end(stubborn):
    group = Crowd()
    with group.children:
        group.start("server 0", POLITE, outlives=True)
        group.start("rank 0", POLITE)
        group.start("server 1", POLITE, outlives=True)
        if stubborn:
            ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            group.start("rank 1", ignore + 'print("ready")\n' + WAIT_FOR_EVER)
        ready = 4 if stubborn else 3
        group.until(lambda: sum(text == "ready" for _, text in group.lines) == ready)
    told = {name: float(text.split()[1]) for name, text in group.lines if "told" in text}
    for server in ("server 0", "server 1"):
        assert told["rank 0"] < told[server] < told["rank 0"] + STOP_GRACE_S


def test_what_a_child_left_behind_in_its_group_is_ended_too():
    group = Crowd()
    with group.children:
        group.start(
            "parent",
            f"""
            import subprocess, sys
            child = subprocess.Popen([sys.executable, "-c", {WAIT_FOR_EVER!r}])
            print(child.pid)
            """,
        )
        group.until(lambda: group.lines)
        grandchild = int(group.lines[0][1])
        assert is_alive(grandchild)
    deadline = time.monotonic() + DEADLINE_S
    while is_alive(grandchild):
        assert time.monotonic() < deadline


def test_a_child_is_told_which_descriptor_shows_that_its_parent_lives(crowd):
    crowd.start("one", f"import os; os.fstat(int(os.environ[{PARENT_FD_ENV!r}])); print('open')")
    crowd.finish("one")
    assert crowd.lines == [("one", "open")]


def test_children_do_not_get_the_writing_end_so_its_closing_is_seen(crowd):
    crowd.start("holder", f"print('here'); {WAIT_FOR_EVER}")
    crowd.start(
        "watcher",
        f"""
        import os
        fd = int(os.environ[{PARENT_FD_ENV!r}])
        print("watching")
        print("end of file" if os.read(fd, 1) == b"" else "data")
        """,
    )
    crowd.until(lambda: ("watcher", "watching") in crowd.lines)
    os.close(crowd.children._parent_writer)
    crowd.until(lambda: ("watcher", "end of file") in crowd.lines)
    crowd.children._parent_writer = os.open(os.devnull, os.O_WRONLY)


def test_stdin_is_empty(crowd):
    crowd.start("one", "import sys; print(repr(sys.stdin.read()))")
    crowd.finish("one")
    assert crowd.lines == [("one", "''")]


def test_a_child_that_nobody_misses_ends_and_the_others_go_on(crowd):
    dead = []

    crowd.children._on_death = lambda _, name, code: dead.append((name, code))
    crowd.start("lost", "print('last'); raise SystemExit(3)")
    crowd.start("other", "import sys; sys.stdin.read(); print('done')")
    crowd.finish("lost", "other")
    assert dead == [("lost", 3)]
    assert crowd.children.code("lost") == 3
    assert crowd.children.code("other") == 0
    assert ("other", "done") in crowd.lines

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys

import pytest

from psq.errors import ConfigError
from psq.process import EXIT_ORPHANED, PARENT_FD_ENV, watch_parent

DEADLINE_S = 20.0
PRELUDE = "import os, signal, sys, time; from psq.process import watch_parent\n"
WAIT = "print('ready', flush=True); signal.pause()\n"


def start(code, *, fd):
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code],
        env={**os.environ, PARENT_FD_ENV: str(fd)},
        pass_fds=[fd],
        stdout=subprocess.PIPE,
    )


@pytest.fixture
def pipe():
    ends = list(os.pipe())
    yield ends
    for end in ends:
        os.close(end)


def end_after_closing(pipe, child):
    with child:
        assert child.stdout.readline() == b"ready\n"
        os.close(pipe.pop())
        return child.wait(DEADLINE_S)


def test_without_a_parent_to_watch_nothing_happens():
    assert not watch_parent({})


@pytest.mark.parametrize("text", ["x", "9999"])
def test_a_descriptor_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match=f"PSQ_PARENT_FD='{text}' names no open descriptor"):
        watch_parent({PARENT_FD_ENV: text})


def test_a_child_gets_sigterm_when_its_parent_is_gone(pipe):
    child = start("watch_parent()\n" + WAIT, fd=pipe[0])
    assert end_after_closing(pipe, child) == -signal.SIGTERM


def test_a_child_that_ignores_sigterm_ends_all_the_same(pipe):
    code = "import psq.process; psq.process.ORPHAN_GRACE_S = 0.05\n"
    code += "signal.signal(signal.SIGTERM, lambda *_: None); watch_parent()\n"
    code += "print('ready', flush=True)\nwhile True: signal.pause()\n"
    assert end_after_closing(pipe, start(code, fd=pipe[0])) == EXIT_ORPHANED


def test_the_variable_is_not_handed_on_to_grandchildren(pipe):
    code = f"assert watch_parent(); print({PARENT_FD_ENV!r} in os.environ)\n"
    with start(code, fd=pipe[0]) as child:
        assert child.stdout.read() == b"False\n"


def test_the_descriptor_is_not_inherited_by_grandchildren(pipe):
    fd = pipe[0]
    code = f"watch_parent(); print(os.get_inheritable({fd}))\n"
    with start(code, fd=fd) as child:
        assert child.stdout.read() == b"False\n"


@pytest.mark.skipif(sys.platform != "linux", reason="PDEATHSIG is Linux's")
def test_on_linux_a_leaked_pipe_does_not_keep_an_orphan_alive(pipe):
    reader, writer = pipe
    middle = (
        "import subprocess\n"
        f"code = {PRELUDE + 'watch_parent()' + chr(10) + WAIT!r}\n"
        f"child = subprocess.Popen([sys.executable, '-c', code], pass_fds=[{reader}])\n"
        "signal.pause()\n"
    )
    parent = start(middle, fd=reader)
    with parent:
        assert parent.stdout.readline() == b"ready\n"
        parent.kill()
        parent.wait(DEADLINE_S)
        # We hold the writer still; only the kernel can have told the grandchild. When it is gone,
        # nobody holds its stdout any more.
        assert select.select([parent.stdout], [], [], DEADLINE_S)[0]
        assert parent.stdout.read() == b""
    assert writer


FRAMES = """
import resource
def frames():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [bytearray(1 << 20) for _ in range(6)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""


def page_faults(before, environ):
    code = (
        f"{FRAMES}\nfrom psq.process import keep_freed_memory\n{before}\nframes(); print(frames())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environ,
        check=True,
        capture_output=True,
        timeout=DEADLINE_S,
    )
    return int(done.stdout)


def test_freed_memory_that_is_kept_costs_no_page_faults():
    environ = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("this libc keeps memory as it likes")
    assert page_faults("", environ) > 20 * 6 * 100
    assert page_faults("assert keep_freed_memory()", environ) < 100


def test_who_has_set_malloc_himself_is_not_overruled():
    environ = {**os.environ, "MALLOC_ARENA_MAX": "2"}
    assert page_faults("assert not keep_freed_memory()", environ) > 20 * 6 * 100

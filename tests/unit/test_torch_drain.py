"""What SIGTERM does to a worker, without a server: the steps are made up."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

import psq.torch.drain as module
from psq.errors import ConfigError
from psq.torch import LOCAL, StepReport, drain_on_sigterm, observers
from psq.torch.drain import Drained

WAIT_S = 10.0


class Made(module.Worker):
    """As much of a worker as is asked for."""

    def __init__(self, version=0):
        self._version = version

    version = property(lambda self: self._version)
    in_this_process = property(lambda _: True)

    def close(self, reason="done", text=""):
        """Nothing is open."""


PLAIN = """
import signal
from psq.torch import drain_on_sigterm
from psq.torch.opened import opened
from psq.torch.worker import Worker

class Made(Worker):
    __init__ = lambda self: None
    version = -1
    in_this_process = True
    def close(self, reason="done", text=""):
        opened.remove(self)
        print("left:", reason, text)

opened.append(Made())
drain_on_sigterm()
{end}
"""


@pytest.fixture
def opened(monkeypatch):
    """The workers of this process; signals and observers are as before afterwards."""
    made = []
    monkeypatch.setattr(module, "opened", made)
    before, heard = signal.getsignal(signal.SIGTERM), list(observers)
    yield made
    signal.signal(signal.SIGTERM, before)
    observers[:] = heard


def term():
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("end", "said"),
    [("signal.raise_signal(signal.SIGTERM)", "left: interrupted SIGTERM"), ("pass", "left: done")],
)
def test_a_script_without_a_with_block_is_not_done_because_it_was_told_to_end(end, said):
    """Else its rank would count as finished, and what it has kept would be removed."""
    command = [sys.executable, "-c", PLAIN.format(end=end)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.strip()) == (0, said), ended.stderr


def step(reason=""):
    for observer in tuple(observers):
        observer(Made(), StepReport(1, 1, applied=True, reason=reason), None, 0)


def test_the_step_ends_and_then_the_program(opened):
    opened.append(Made())
    drain_on_sigterm()
    term()
    with pytest.raises(Drained) as ended:
        step()
    assert ended.value.code == 0


def test_a_local_step_is_not_the_end_of_a_round(opened):
    opened.append(Made())
    drain_on_sigterm()
    term()
    step(LOCAL)
    with pytest.raises(Drained):
        step()


def test_a_step_that_takes_too_long_is_given_up(opened):
    opened.append(Made())
    drain_on_sigterm(0.01)
    term()
    with pytest.raises(Drained):
        threading.Event().wait(WAIT_S)


def test_a_second_signal_ends_the_program_at_once(opened):
    opened.append(Made())
    drain_on_sigterm()
    term()
    with pytest.raises(SystemExit) as ended:
        term()
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_without_a_worker_there_is_nothing_to_end(opened):
    assert not opened
    drain_on_sigterm()
    with pytest.raises(SystemExit) as ended:
        term()
    assert ended.value.code == 128 + signal.SIGTERM


def test_a_worker_that_has_not_joined_yet_leaves_at_once(opened):
    opened.append(Made(version=-1))
    drain_on_sigterm()
    with pytest.raises(Drained):
        term()


@pytest.mark.parametrize("end", [step, term])
def test_who_ends_in_time_is_not_hurried_afterwards(opened, end):
    opened.append(Made())
    drain_on_sigterm()
    before = set(threading.enumerate())
    term()
    [timer] = set(threading.enumerate()) - before
    with pytest.raises(SystemExit):
        end()
    timer.join(WAIT_S / 2)
    assert not timer.is_alive()


def test_only_the_main_thread_can_ask_for_it():
    said = []

    def ask():
        try:
            drain_on_sigterm()
        except ConfigError as error:
            said.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert "main thread" in said[0]

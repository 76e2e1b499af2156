from __future__ import annotations

import os
import signal

import pytest

from psq_server.signals import GRACE_S, Signals


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def test_a_signal_wakes_and_is_taken_once(clock):
    with Signals(clock=clock, end=pytest.fail) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.take() == "SIGTERM"
        assert signals.take() is None


def test_the_same_wish_said_twice_is_one_wish(clock):
    with Signals(clock=clock, end=pytest.fail) as signals:
        signals.note(signal.SIGINT, None)
        clock.now_s += GRACE_S / 2
        signals.note(signal.SIGTERM, None)
        assert signals.take() == "SIGINT"


def test_a_second_signal_ends_the_process_at_once(clock):
    codes = []
    with Signals(clock=clock, end=codes.append) as signals:
        signals.note(signal.SIGTERM, None)
        clock.now_s += GRACE_S
        signals.note(signal.SIGTERM, None)
    assert codes == [128 + signal.SIGTERM]


def test_handlers_are_put_back(clock):
    before = signal.getsignal(signal.SIGTERM)
    with Signals(clock=clock):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before

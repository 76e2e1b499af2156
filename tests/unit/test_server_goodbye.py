"""A server that was killed while its workers said goodbye: whom it waits for, and for how long."""

from __future__ import annotations

import pytest
from durable_server import Server, Speaker, begun

from psq.plan import Plan
from psq.presets import preset
from psq_proto.messages import NO_VERSION, MessageType
from psq_server.state import Tick
from psq_server.state.presence import BACK_S

PLAN = Plan.of([("x", (40, 30)), ("b", (7,))], preset("server-adam"), 2)


@pytest.fixture
def came_back(tmp_path):
    """A server whose first process died when rank 1 had left, and rank 0 had not."""
    server, speakers = begun(tmp_path / "state", PLAN)
    for speaker in speakers:
        speaker.push(0)
    server.settle()
    speakers[1].leave()
    server.settle()
    server.crash()
    again = Server(tmp_path / "state", PLAN)
    yield again
    again.crash()


def wait(server, duration_s):
    server.now_s += duration_s
    server.happen(Tick())
    server.settle()


def test_it_ends_when_those_that_are_not_done_are_not_heard_in_time(came_back):
    wait(came_back, BACK_S - 1.0)
    assert came_back.stopped is None
    wait(came_back, 2.0)
    assert came_back.stopped is not None
    assert (came_back.stopped.exit_code, came_back.stopped.reason) == (0, "done")
    assert "rank 1 was done when this server was killed" in came_back.stopped.text


def test_one_that_comes_in_time_is_waited_for_as_ever(came_back):
    wait(came_back, BACK_S - 1.0)
    first = Speaker(came_back, 0, lineage=100).join()
    wait(came_back, 5 * BACK_S)
    assert came_back.stopped is None
    first.send(MessageType.PULL, version=NO_VERSION)
    first.push(1)
    came_back.settle()
    assert came_back.version == 2


def test_where_nobody_is_known_to_be_done_all_are_waited_for_and_it_is_said_what_to_do(tmp_path):
    server, speakers = begun(tmp_path / "state", PLAN)
    for speaker in speakers:
        speaker.push(0)
    server.settle()
    server.crash()
    again = Server(tmp_path / "state", PLAN)
    wait(again, 5 * BACK_S)
    assert again.stopped is None
    words = again.state.snapshot(again.now_s).text
    assert "nobody has come since this server's start" in words
    assert "stop it (SIGTERM), its weights are whole" in words
    Speaker(again, 0, lineage=100).join()
    assert "nobody has come" not in again.state.snapshot(again.now_s).text
    again.crash()

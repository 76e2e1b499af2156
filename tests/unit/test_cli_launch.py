"""What the launcher starts; the processes are in tests/cluster."""

from __future__ import annotations

import pytest

from psq_worker import launch
from psq_worker.launch import Commands, cast_words, server_count

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("asked", "workers", "cores", "expected"),
    [(3, 2, 1, 3), ("auto", 2, 1, 1), ("auto", 2, 64, 2), ("auto", 8, 8, 4), ("auto", 1, 2, 1)],
)
def test_auto_is_a_server_per_worker_up_to_half_the_cores(
    monkeypatch, asked, workers, cores, expected
):
    monkeypatch.setattr(launch, "cores", lambda: cores)
    assert server_count(asked, workers) == expected


@pytest.mark.parametrize(
    ("commands", "words"),
    [
        (Commands(1), "1 server, 1 worker, 1 CPU thread"),
        (Commands(4, 2), "2 servers, 4 workers, 1 CPU thread each"),
    ],
)
def test_who_takes_part_is_said_in_words(commands, words):
    assert cast_words(commands, ONE_THREAD) == words


def test_every_server_has_a_metrics_port_of_its_own_after_what_was_typed():
    commands = Commands(2, 3, metrics_port=9000, server_words=("--metrics-port", "9000"))
    ports = [launch._server_command(commands, number)[-1] for number in range(3)]
    assert ports == ["9000", "9001", "9002"]
    free = launch._server_command(Commands(2, 3), 2)
    assert "--metrics-port" not in free


def test_every_worker_is_told_all_servers_in_their_order():
    words = launch._worker_command(Commands(2, 2), ["tcp://a:1", "tcp://b:2"], 1)
    assert words[words.index("--connect") + 1] == "tcp://a:1,tcp://b:2"
    assert words[words.index("--rank") + 1] == "1"


def test_every_process_is_told_where_the_timeline_goes_before_the_script_is_named():
    commands = Commands(2, 2, timeline="t.json", worker_words=("train.py", "--", "3"))
    for words in (
        launch._server_command(commands, 1),
        launch._worker_command(commands, ["tcp://a:1", "tcp://b:2"], 1)[:-3],
    ):
        assert words[words.index("--timeline-filename") + 1] == "t.json"
    assert "--timeline-filename" not in launch._server_command(Commands(2, 2), 1)

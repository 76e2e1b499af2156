"""The recorder of spans, and the file that a process makes of them."""

import json
import os
import threading

import pytest

from psq.errors import StateError
from psq.timeline import (
    NOWHERE,
    Phase,
    Process,
    Timeline,
    check_writable,
    machine_clock,
    part_path,
    write_part,
)

RANK = Process("rank", 3)


def events_of(path, kind="X"):
    return [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == kind]


def test_spans_come_back_as_they_were_recorded_and_in_that_order():
    recorder = Timeline()
    recorder.add(Phase.ENCODE, 0.25, 0.75, shard=2, round=7, nbytes=100)
    recorder.add(Phase.WAIT, 0.5, 9.0)
    recorder.add(Phase.RECEIVE, 1.0, 2.0, 0, 8, 1, 5)
    assert recorder.spans() == [
        (Phase.ENCODE, 0.25, 0.75, 2, 7, NOWHERE, 100),
        (Phase.WAIT, 0.5, 9.0, NOWHERE, NOWHERE, NOWHERE, 0),
        (Phase.RECEIVE, 1.0, 2.0, 0, 8, 1, 5),
    ]
    assert recorder.lost_spans == 0


@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 11])
def test_at_the_limit_the_oldest_spans_are_overwritten_and_counted(count):
    recorder = Timeline(limit=4)
    for number in range(count):
        recorder.add(Phase.PUSH, float(number), end_s=float(number + 1), shard=number)
    kept = list(range(count))[-4:]
    assert [span.shard for span in recorder.spans()] == kept
    assert recorder.lost_spans == count - len(kept)


def test_threads_that_record_at_once_lose_nothing():
    recorder = Timeline(limit=4000)
    start = threading.Barrier(4)

    def record(rank):
        start.wait()
        for number in range(1000):
            recorder.add(Phase.PUSH, 0.0, 1.0, shard=number, rank=rank)

    threads = [threading.Thread(target=record, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = sorted((span.rank, span.shard) for span in recorder.spans())
    assert found == [(rank, number) for rank in range(4) for number in range(1000)]


def test_a_part_is_a_chrome_trace_with_a_named_row_for_each_phase(tmp_path):
    recorder = Timeline()
    recorder.add(Phase.ENCODE, 1.5, end_s=1.75, shard=4, round=2, nbytes=77)
    recorder.add(Phase.WAIT, 1.75, end_s=2.0, round=2)
    path = write_part(tmp_path / "t.json", recorder, RANK, job="abc")
    encode, wait = events_of(path)
    assert encode == {
        "name": "encode",
        "cat": "rank",
        "ph": "X",
        "pid": RANK.pid,
        "tid": int(Phase.ENCODE),
        "ts": 1_500_000.0,
        "dur": 250_000.0,
        "args": {"shard": 4, "round": 2, "bytes": 77},
    }
    assert (wait["name"], wait["dur"], wait["args"]["shard"]) == ("wait", 250_000.0, NOWHERE)
    named = {(e["name"], e["tid"]): e["args"] for e in events_of(path, "M")}
    assert named["process_name", 0] == {"name": "rank 3"}
    assert named["thread_name", Phase.ENCODE] == {"name": "encode"}
    assert {tid for _, tid in named} == {0, Phase.ENCODE, Phase.WAIT}


def test_a_part_says_whose_it_is_and_what_is_not_in_it(tmp_path):
    recorder = Timeline(limit=2)
    for _ in range(5):
        recorder.add(Phase.PUSH, 0.0, 1.0)
    offsets = [{"server": 0, "offset_s": 1.5, "round_trip_s": 0.25}]
    path = write_part(tmp_path / "t.json", recorder, RANK, job="abc", offsets=offsets)
    assert json.loads(path.read_text())["otherData"] == {
        "process": "rank 3",
        "job": "abc",
        "clock": machine_clock(),
        "offsets": offsets,
        "lost_spans": 3,
    }


def test_a_process_that_did_nothing_leaves_a_part_too(tmp_path):
    path = write_part(tmp_path / "t.json", Timeline(), RANK, job="abc")
    assert events_of(path) == []


def test_each_process_writes_to_a_place_of_its_own(tmp_path):
    path = tmp_path / "t.json"
    assert part_path(path, RANK).name == "t.rank3.json"
    assert part_path(path, Process("server", 0)).name == "t.server0.json"
    pids = {Process(role, n).pid for role in ("rank", "server") for n in range(4096)}
    assert len(pids) == 2 * 4096


def test_what_the_disk_refuses_is_an_error_and_leaves_the_old_file(tmp_path):
    output = tmp_path / "t.json"
    part_path(output, RANK).mkdir()
    with pytest.raises(StateError, match=r"cannot write the timeline to .*t\.rank3\.json"):
        write_part(output, Timeline(), RANK, job="abc")
    assert [path.name for path in tmp_path.iterdir()] == ["t.rank3.json"]


@pytest.mark.parametrize("place", ["missing/t.json", "."])
def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, place):
    with pytest.raises(StateError, match="cannot write a timeline to"):
        check_writable(tmp_path / place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused_at_once(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StateError, match="cannot write a timeline to"):
        check_writable(tmp_path / "t.json")

"""Parts of one job on one clock."""

import json

import pytest

from psq.errors import StateError
from psq.timeline import Phase, Process, Timeline, write_part
from psq.trace import Part, merge, place


def make_part(folder, name, times_s, *, job="abc"):
    """A file whose process encoded for 1 s from each of these times on."""
    role, number = name.split()
    recorder = Timeline()
    for time_s in times_s:
        recorder.add(Phase.ENCODE, time_s, end_s=time_s + 1.0)
    process = Process(role, int(number))
    return write_part(folder / "t.json", recorder, process, job=job)


def on(path, clock, offsets=()):
    """The same part, from another machine, whose worker measured these (server, offset, trip)."""
    measured = [dict(zip(("server", "offset_s", "round_trip_s"), o, strict=True)) for o in offsets]
    head, _, rest = path.read_text().partition("\n")
    head = json.loads(head + "]}")
    head["otherData"] |= {"clock": clock, "offsets": measured}
    path.write_text(json.dumps(head).removesuffix("]}") + "\n" + rest)
    return path


def starts_of(path):
    """When each process's spans began, in seconds, by its name."""
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    found = {}
    for event in events:
        if event["ph"] == "X":
            found.setdefault(names[event["pid"]], []).append(event["ts"] / 1e6)
    return found


def part(process, clock, *offsets):
    measured = {server: (offset_s, trip_s) for server, offset_s, trip_s in offsets}
    return Part(f"{process}.json", process, "abc", clock, measured, 0)


def test_processes_of_one_machine_keep_their_times_and_the_trace_begins_at_0(tmp_path):
    paths = [make_part(tmp_path, "rank 0", [50.0, 52.0]), make_part(tmp_path, "server 0", [51.5])]
    assert merge(paths, tmp_path / "all.json") == 3
    assert starts_of(tmp_path / "all.json") == {"rank 0": [0.0, 2.0], "server 0": [1.5]}
    about = json.loads((tmp_path / "all.json").read_text())["otherData"]
    assert about["processes"] == ["rank 0", "server 0"]
    assert about["lost_spans"] == {"rank 0": 0, "server 0": 0}


def test_a_worker_of_another_machine_is_moved_to_the_servers_clock(tmp_path):
    rank = on(make_part(tmp_path, "rank 0", [10.0]), "a", [(0, 990.0, 0.001)])
    server = on(make_part(tmp_path, "server 0", [1000.25]), "b")
    merge([rank, server], tmp_path / "all.json")
    assert starts_of(tmp_path / "all.json") == {"rank 0": [0.0], "server 0": [0.25]}


def test_a_server_is_placed_by_the_worker_that_talked_to_both_with_the_shortest_trips():
    shifts = place(
        [
            part("server 1", "c"),
            part("rank 0", "a", (0, 5.5, 0.2), (1, -4.5, 0.2)),
            part("rank 1", "b", (0, 7.0, 0.01), (1, -3.0, 0.02)),
            part("server 0", "s"),
        ]
    )
    assert shifts == {"server 0": 0.0, "rank 0": 5.5, "rank 1": 7.0, "server 1": 10.0}


def test_workers_beside_servers_join_machines_in_a_chain():
    shifts = place(
        [
            part("server 0", "a"),
            part("rank 0", "a", (0, 0.0, 0.1), (1, 3.0, 0.1)),
            part("server 1", "b"),
            part("rank 1", "b"),
            part("rank 2", "c", (1, 10.0, 0.1)),
        ]
    )
    assert shifts == {
        "server 0": 0.0,
        "rank 0": 0.0,
        "server 1": -3.0,
        "rank 1": -3.0,
        "rank 2": 7.0,
    }


def test_a_server_that_left_no_part_still_joins_those_who_talked_to_it():
    shifts = place(
        [part("rank 0", "a", (0, 100.0, 0.1)), part("rank 1", "b", (0, 40.0, 0.1))],
    )
    assert shifts == {"rank 0": 0.0, "rank 1": -60.0}


def test_a_part_whose_clock_nobody_knows_is_refused_by_name():
    with pytest.raises(StateError, match=r"rank 1\.json: rank 1 ran on another machine"):
        place([part("server 0", "a"), part("rank 0", "a", (0, 0.0, 0.1)), part("rank 1", "b")])


def test_two_parts_of_one_process_are_refused(tmp_path):
    one = make_part(tmp_path, "rank 0", [1.0])
    with pytest.raises(StateError, match="are both of rank 0"):
        merge([one, one], tmp_path / "all.json")
    assert not (tmp_path / "all.json").exists()


def test_parts_of_two_jobs_are_refused(tmp_path):
    parts = [make_part(tmp_path, "rank 0", [1.0]), make_part(tmp_path, "rank 1", [1.0], job="xyz")]
    with pytest.raises(StateError, match=r"of job xyz.*of job abc"):
        merge(parts, tmp_path / "all.json")


@pytest.mark.parametrize("cut", [0, 30, 200, -3])
def test_a_part_that_was_cut_short_is_refused(tmp_path, cut):
    path = make_part(tmp_path, "rank 0", [1.0, 2.0])
    path.write_text(path.read_text()[:cut])
    with pytest.raises(StateError, match="is no part of a timeline, or not all of it"):
        merge([path], tmp_path / "all.json")
    assert not (tmp_path / "all.json").exists()


def test_a_merged_trace_is_no_part(tmp_path):
    path = make_part(tmp_path, "rank 0", [1.0])
    merge([path], tmp_path / "all.json")
    with pytest.raises(StateError, match="is no part of a timeline"):
        merge([tmp_path / "all.json"], tmp_path / "again.json")


def test_a_part_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(StateError, match=r"cannot read .*: No such file"):
        merge([tmp_path / "t.rank0.json"], tmp_path / "all.json")

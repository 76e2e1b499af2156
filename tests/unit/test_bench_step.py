"""The step benchmark's pure parts: shapes, the wire's floor, ratios and tables."""

import importlib
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def load(monkeypatch):
    """Imports a module as the script does, and forgets it and what it brought afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.split(".")[0] in {"peers", "netns", "step"}:
            del sys.modules[name]


def test_shapes_sum_to_the_published_sizes_of_their_models(load):
    totals = load("peers.shapes").totals()
    assert totals["11.7M"] == 11_689_512
    assert totals["25M"] == 25_557_032
    assert totals["1M"] == 992_730
    assert totals["flat25"] == 25_000_000


def test_resnet50_has_its_161_tensors(load):
    assert len(load("peers.shapes").resnet50()) == 161


def test_an_unknown_size_is_refused_with_those_there_are(load):
    with pytest.raises(ValueError, match=r"'2M' is none of 1M, 11\.7M"):
        load("peers.shapes").shapes_of("2M")


def test_one_server_carries_every_workers_bytes_on_its_busiest_way(load):
    wire = load("peers.wire")
    transfers = wire.through_servers([100], [70], ["server"], ["a", "b"])
    assert wire.busiest(transfers) == 200
    assert wire.floor_s(transfers, 1600) == 1.0


def test_a_server_beside_each_worker_halves_the_busiest_way(load):
    wire = load("peers.wire")
    transfers = wire.through_servers([50, 50], [50, 50], ["a", "b"], ["a", "b"])
    # up from a: 50 to the other server, 50 of answers to the other worker
    assert wire.busiest(transfers) == 100


def test_what_stays_on_one_machine_takes_no_link(load):
    wire = load("peers.wire")
    assert wire.busiest(wire.through_servers([9], [9], ["a"], ["a"])) == 0


@pytest.mark.parametrize(("workers", "share"), [(2, 1.0), (4, 1.5), (8, 1.75)])
def test_a_ring_carries_twice_w_minus_one_over_w_on_each_way(load, workers, share):
    wire = load("peers.wire")
    assert wire.busiest(wire.ring(1000, [str(w) for w in range(workers)])) == 1000 * share


def test_power_sgd_sends_factors_of_matrices_and_vectors_whole(load):
    wire = load("peers.wire")
    assert wire.power_sgd_bytes([(100, 10, 2, 2), (7,)], 1) == 4 * (100 + 40 + 7)
    # rank 2 of a 3 x 4 matrix is 14 values: more than half of 12, so it goes whole
    assert wire.power_sgd_bytes([(3, 4)], 2) == 4 * 12


def test_psq_sends_about_one_bit_a_value_each_way(load, tmp_path):
    systems, wire = load("peers.systems"), load("peers.wire")
    setup = systems.Setup("25M", 2, None, tmp_path)
    own = wire.busiest(systems.SYSTEMS["psq"].transfers(setup))
    beside = wire.busiest(systems.SYSTEMS["psq-s2"].transfers(setup))
    assert 1.0 < own * 8 / 2 / setup.numel < 1.1
    assert 0.45 < beside / own < 0.55


def test_rates_are_read_as_tc_writes_them(load):
    rate_of = load("netns").rate_of
    assert rate_of("100mbit") == 100e6
    assert rate_of("2.5gbit") == 2.5e9
    with pytest.raises(ValueError, match="'fast' is not like 100mbit"):
        rate_of("fast")


def seat(step, name, rounds, cpu_s):
    systems = importlib.import_module("peers.systems")
    made = step.Seat(systems.SYSTEMS[name])
    made.rounds, made.cpu_s = rounds, cpu_s
    made.link_bytes, made.peaks_kb = [0.0] * len(rounds), {"worker0": 2048, "worker1": 4096}
    return made


def test_ratios_compare_rounds_that_were_neighbours(load):
    step = load("step")
    ours = seat(step, "psq", [[1.0, 2.0, 3.0], [4.0], [2.0]], [1.0, 1.0, 1.0])
    peer = seat(step, "ddp-fp32", [[6.0], [8.0], [5.0]], [2.0, 4.0, 4.0])
    assert step.against(peer, ours) == {
        "faster_best": 5.0,
        "faster_median": 2.5,
        "cpu_share": 0.25,
    }


def test_the_table_shows_what_was_measured_and_why_a_row_was_not(load, tmp_path):
    step, systems = load("step"), load("peers.systems")
    processes = load("peers.processes")
    ours = seat(step, "psq", [[0.010, 0.020]], [0.030])
    broken = seat(step, "ddp-fp32", [], [])
    broken.failure = "no wheel for a | b"
    setup = systems.Setup("1M", 2, processes.Site(None, tmp_path), tmp_path)
    rows = step.rows_of([ours, broken], setup)
    text = step.table({"size": "1M", "workers": 2, "rate": "loopback", "rows": rows})
    assert "| psq | 10.0 | 15.0 | 30.0 |  |  |  | 1.00 | 1.00 | 1.00 | 4 |  |" in text
    assert "| ddp-fp32 | not measured: no wheel for a / b |" in text
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {13}


def test_a_place_without_namespaces_is_said_and_not_measured(load, monkeypatch, tmp_path):
    step = load("step")
    monkeypatch.setattr(step.netns, "unavailable", lambda: "network namespaces need root")
    monkeypatch.setattr(sys, "argv", ["step.py", "--systems", "psq"])
    result = step.compare("1gbit", "1M", step.parse(), tmp_path)
    assert "rows" not in result
    assert step.table(result).endswith("skipped: network namespaces need root")


@pytest.mark.parametrize(
    "wrong",
    [["--systems", "psq,nobody"], ["--sizes", "9M"], ["--rates", "fast"], ["--rounds", "0"]],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(
    load, monkeypatch, capsys, wrong
):
    step = load("step")
    monkeypatch.setattr(sys, "argv", ["step.py", *wrong])
    with pytest.raises(SystemExit):
        step.parse()
    assert wrong[0] in capsys.readouterr().err

"""The accuracy benchmark's pure parts: what counts as reached, and the table."""

import importlib
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """The script as a module; it and what it brought are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield importlib.import_module("accuracy")
    for name in set(sys.modules) - before:
        if name.split(".")[0] in {"peers", "netns", "accuracy"}:
            del sys.modules[name]


def run_of(seed, **rows):
    told = {"task": "t", "rate": "100mbit", "workers": 2, "steps": 96, "versions": {"psq": "1"}}
    shown = [
        {"system": name.replace("_", "-"), "failure": "", "gave_up": False, "points": points}
        for name, points in rows.items()
    ]
    return {**told, "seed": seed, "rows": shown}


def cells_of(text, system):
    line = next(line for line in text.splitlines() if f"(`{system}`)" in line)
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_target_is_reached_with_the_first_score_at_or_above_it(bench):
    points = [(32, 2.0, 4e6, 0.79), (64, 4.0, 8e6, 0.80), (96, 6.0, 12e6, 0.78)]
    cells = cells_of(bench.table([run_of(0, psq_1bit=points)], 0.80), "psq-1bit")
    assert cells == ["64", "4.0", "8.00", "0.7800", "62.5", "125.0", "0"]


def test_seeds_give_medians_and_one_that_never_gets_there_makes_it_never(bench):
    fast = [(32, 1.0, 1e6, 0.9), (96, 3.0, 3e6, 0.9)]
    slow = [(32, 1.0, 1e6, 0.7), (64, 3.0, 2e6, 0.9), (96, 5.0, 3e6, 0.9)]
    never = [(96, 3.0, 3e6, 0.5)]
    runs = [run_of(seed, psq_1bit=points) for seed, points in enumerate((fast, slow, fast))]
    assert cells_of(bench.table(runs, 0.8), "psq-1bit")[:3] == ["32", "1.0", "1.00"]
    runs.append(run_of(3, psq_1bit=never))
    cells = cells_of(bench.table(runs, 0.8), "psq-1bit")
    assert cells[:3] == ["never"] * 3
    assert cells[-1] == "0, 1, 2, 3"


def test_a_system_that_failed_says_why_and_one_of_fewer_seeds_says_which(bench):
    points = [(96, 3.0, 3e6, 0.9)]
    first = run_of(0, psq_1bit=points, ddp_fp32=points)
    first["rows"][1]["failure"] = "worker0 ended: no | gloo"
    text = bench.table([first, run_of(1, psq_1bit=points)], 0.8)
    assert cells_of(text, "ddp-fp32")[0] == "not measured: worker0 ended: no / gloo"
    assert cells_of(text, "ddp-fp32")[-1] == "0"
    assert cells_of(text, "psq-1bit")[-1] == "0, 1"


def test_a_system_that_gave_up_says_at_which_step(bench):
    run = run_of(0, ddp_fp32=[(32, 170.0, 1e6, 0.6)])
    run["rows"][0]["gave_up"] = True
    assert cells_of(bench.table([run], 0.8), "ddp-fp32")[3] == "0.6000 (at step 32)"


def test_every_system_has_one_way_of_starting(bench):
    for system in bench.SYSTEMS.values():
        assert bool(system.recipe) != bool(system.hook), system.name

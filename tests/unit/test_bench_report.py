"""The benches' report: what is kept and run again, the bars' verdicts, the page's tables."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
SCRIPT = "import json, sys; print(json.dumps(sys.argv[1:]))"


@pytest.fixture
def load(monkeypatch):
    """Imports a module as the script does, and forgets it and what it brought afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        found = sys.modules[name]
        if str(getattr(found, "__file__", None) or "").startswith(str(BENCH)) or name in (
            "reporting",
            "peers",
        ):
            del sys.modules[name]


@pytest.fixture
def runs(load, monkeypatch, tmp_path):
    module = load("reporting.runs")
    monkeypatch.setattr(module, "BENCH", tmp_path)
    monkeypatch.setattr(module, "facts", lambda: {"machine": "one", "psq": "0"})
    return module


def script(folder, text):
    (folder / "one.py").write_text(text)


def test_what_is_kept_is_not_run_again(runs, tmp_path):
    script(tmp_path, SCRIPT)
    settings = runs.Settings(tmp_path / "out")
    run = runs.Run("one", "one.py --rounds 3", "one.py", 1.0)
    first = runs.perform(run, settings)
    script(tmp_path, "raise SystemExit(1)")
    assert first["result"] == ["--rounds", "3", "--json"]
    assert runs.perform(run, settings) == first


def test_another_command_and_again_run_it_again(runs, tmp_path):
    script(tmp_path, SCRIPT)
    settings = runs.Settings(tmp_path / "out")
    runs.perform(runs.Run("one", "one.py --rounds 3", "", 1.0), settings)
    other = runs.Run("one", "one.py --rounds 4", "", 1.0)
    assert runs.perform(other, settings)["result"] == ["--rounds", "4", "--json"]
    script(tmp_path, "print(7)")
    assert runs.perform(other, settings)["result"] == ["--rounds", "4", "--json"]
    again = runs.Settings(tmp_path / "out", again=True)
    assert runs.perform(other, again)["result"] == 7


def test_a_failure_says_why_and_is_tried_again(runs, tmp_path):
    settings = runs.Settings(tmp_path / "out")
    run = runs.Run("one", "one.py", "", 1.0)
    script(tmp_path, "raise SystemExit('the link is down')")
    assert "ended with 1: the link is down" in runs.perform(run, settings)["error"]
    script(tmp_path, "print(7)")
    assert runs.perform(run, settings)["result"] == 7


def test_a_bench_that_skips_or_is_not_there_is_no_result(runs, tmp_path):
    settings = runs.Settings(tmp_path / "out")
    script(tmp_path, "print('skipped: network namespaces need root')")
    kept = runs.perform(runs.Run("one", "one.py", "", 1.0), settings)
    assert (kept["result"], kept["error"]) == (None, "network namespaces need root")
    kept = runs.perform(runs.Run("two", "two.py", "", 1.0), settings)
    assert kept["error"] == "there is no two.py"


def test_a_bench_that_hangs_is_ended_at_its_limit(runs, tmp_path):
    script(tmp_path, "import signal; signal.pause()")
    kept = runs.perform(
        runs.Run("one", "one.py", "", 1.0), runs.Settings(tmp_path / "out"), limit_s=0.5
    )
    assert kept["error"] == "stopped: it took longer than 0 s"


def test_a_bench_may_write_its_json_to_a_file(runs, tmp_path):
    script(tmp_path, "import sys; open(sys.argv[-1], 'w').write('[5]'); print('a table')")
    run = runs.Run("one", "one.py", "", 1.0, writes_file=True)
    assert runs.perform(run, runs.Settings(tmp_path / "out"))["result"] == [5]


def test_a_file_that_was_cut_off_counts_as_none(runs, tmp_path):
    (tmp_path / "x.json").write_text('{"command": ')
    assert runs.read(tmp_path / "x.json") is None


def test_a_bar_holds_by_its_unrounded_figure(load):
    judge = load("reporting.judge")
    assert judge.Bar("a", 0.8499, ">=", 0.85).holds is False
    assert judge.Bar("a", 0.85, ">=", 0.85).holds is True
    assert judge.Bar("a", 1.36, "<=", 1.35).holds is False
    assert judge.Bar("a", None, "<=", 1.35, "no root").holds is None
    assert "not run" in judge.Bar("a", None, "<=", 1.35, "no root").line()
    assert "no root" in judge.Bar("a", None, "<=", 1.35, "no root").line()


def test_with_nothing_measured_every_bar_is_not_run_and_says_why(load):
    found = load("reporting.judge").bars({})
    assert len(found) > 40
    assert {bar.holds for bar in found} == {None}
    assert all(bar.note for bar in found)


def step_table(rate, *rows):
    return {
        f"step-{rate}-25M": {
            "error": "",
            "result": [{"rate": rate, "size": "25M", "workers": 2, "rows": list(rows)}],
        }
    }


def step_row(system, best_s, **more):
    return {
        "system": system,
        "best_s": best_s,
        "median_s": 2 * best_s,
        "cpu_s": 1.0,
        "floor_s": best_s,
        "replicas_equal": True,
        **more,
    }


def bar_named(bars, text):
    (found,) = [bar for bar in bars if text in bar.name]
    return found


def test_how_much_faster_is_best_by_best(load):
    judge = load("reporting.judge")
    results = step_table("loopback", step_row("psq", 0.010), step_row("ddp-fp32", 0.019))
    found = bar_named(judge.bars(results), "loopback: times faster than ddp-fp32")
    assert found.measured == pytest.approx(1.9)
    assert found.holds is False


def test_the_best_peer_is_the_one_that_psq_beats_least(load):
    judge = load("reporting.judge")
    peers = [step_row("ddp-bf16", 0.03), step_row("powersgd-1", 0.02)]
    results = step_table("loopback", step_row("psq", 0.01), *peers)
    found = bar_named(judge.bars(results), "best compressed")
    assert found.measured == pytest.approx(2.0)
    assert found.note.startswith("powersgd-1")


def test_a_system_that_failed_makes_its_bars_not_run_with_its_reason(load):
    judge = load("reporting.judge")
    failed = {"system": "ddp-fp32", "failure": "worker0 ended: out of memory"}
    results = step_table("10gbit", step_row("psq", 0.01), failed)
    found = bar_named(judge.bars(results), "10gbit: times faster")
    assert found.holds is None
    assert "out of memory" in found.note


def test_replicas_that_differ_once_fail_their_bar(load):
    judge = load("reporting.judge")
    rows = [step_row("psq", 0.01), step_row("psq-s2", 0.01, replicas_equal=False)]
    found = bar_named(judge.bars(step_table("1gbit", *rows)), "replicas equal")
    assert found.holds is False
    assert found.note == "not: psq-s2"


def test_time_to_accuracy_takes_the_first_score_at_the_target(load):
    judge = load("reporting.judge")

    def row(system, *points):
        return {"system": system, "points": [(0, seconds, 0, score) for seconds, score in points]}

    rows = [
        row("psq-local-8", (1.0, 0.8), (2.0, 0.885), (3.0, 0.87)),
        row("powersgd-1", (5.0, 0.89)),
        row("powersgd-4", (4.0, 0.87)),
    ]
    found = bar_named(
        judge.bars({"accuracy": {"error": "", "result": [{"rows": rows}]}}), "time to accuracy"
    )
    assert found.measured == pytest.approx(2.5)


def test_the_worst_codec_of_a_family_counts_and_is_named(load):
    judge = load("reporting.judge")
    rows = [
        {"level": "v4", "verb": "encode_ef", "codec": f"uniform:bits={bits}", "ratio": ratio}
        for bits, ratio in ((2, 0.9), (4, 0.6), (8, 0.8))
    ]
    found = bar_named(
        judge.bars({"codecs": {"error": "", "result": {"rows": rows}}}), "uniform 2/4/8"
    )
    assert (found.measured, found.holds) == (0.6, False)
    assert found.note.startswith("uniform:bits=4")


def test_a_page_without_figures_names_every_section_and_says_not_run(load, tmp_path):
    page = load("reporting.page").write_page({}, tmp_path)
    text = page.read_text()
    for section in load("reporting.sections").SECTIONS:
        assert f"## {section.title}" in text
        assert f"`{section.runs[0].command(quick=False)}`: not run." in text
    assert not list(tmp_path.glob("*.png"))


def test_a_section_that_failed_says_why_on_the_page(load, tmp_path):
    kept = {"command": "python bench/memory.py", "error": "no room", "wall_s": 1.0}
    kept |= {"result": None, "facts": {"psq": "0", "machine": "one"}}
    text = load("reporting.page").write_page({"memory": kept}, tmp_path).read_text()
    assert "`python bench/memory.py`: not measured: no room" in text


def test_run_names_are_used_once_and_their_scripts_exist(load):
    found = [run for section in load("reporting.sections").SECTIONS for run in section.runs]
    names = [run.name for run in found]
    assert len(set(names)) == len(names)
    for run in (*found, *load("bars").RUNS):
        assert (BENCH / run.words.split()[0]).is_file(), run.name


def test_all_of_the_benches_are_expected_to_take_half_an_hour(load):
    sections = load("reporting.sections").SECTIONS
    assert sum(section.expected_s for section in sections) <= 35 * 60


def test_the_bars_are_expected_to_take_six_minutes(load):
    bars = load("bars")
    assert sum(run.expected_s for run in bars.RUNS) <= bars.LIMIT_S


def test_the_summary_divides_each_peers_best_by_psqs(load):
    tables = load("reporting.tables")
    rows = [
        step_row("psq", 0.01, faster_best=1.0, faster_median=1.0),
        step_row("ddp-fp32", 0.05, faster_best=5.0, faster_median=4.0),
        step_row("psq-s2", 0.005),
    ]
    text = tables.summary(step_table("1gbit", *rows), ["1gbit"])
    assert "| 1gbit | 10.0 | 5.0 (4.0) |" in text
    assert "| 1gbit, 2 servers | 5.0 | 10.0 (10.0) |" in text


def test_no_more_servers_stand_beside_workers_than_there_are(load):
    systems_of = load("scaling").systems_of
    assert systems_of(1, [1, 2, 4], "ddp-fp32") == ["psq"]
    assert systems_of(2, [1, 2, 4], "ddp-fp32") == ["psq", "psq-s2", "ddp-fp32"]
    assert systems_of(4, [1, 2, 4], "") == ["psq", "psq-s2", "psq-s4"]


def test_a_workers_overhead_is_without_weights_gradients_and_the_benchs_pool(load, tmp_path):
    memory, shapes = load("memory"), load("peers.shapes")
    total = sum(map(shapes.numel, shapes.shapes_of("1M")))
    pool = max(map(shapes.numel, shapes.shapes_of("1M"))) * 4
    peaks = {
        "worker0": 0,
        "worker1": (total * 12 + pool) // 1024,
        "server@server": total * 3 // 1024,
    }
    setup = memory.Setup("1M", 2, memory.Site(None, tmp_path), tmp_path)
    row = memory.weighed(peaks, setup, staged=total / 4)
    assert row["overhead"] == pytest.approx(4.0, abs=0.01)
    assert row["server"] == pytest.approx(3.0, abs=0.01)
    assert row["server_payloads"] == 0.25


def test_kept_results_are_plain_json(runs, tmp_path):
    script(tmp_path, SCRIPT)
    runs.perform(runs.Run("one", "one.py", "", 1.0), runs.Settings(tmp_path / "out"))
    kept = json.loads((tmp_path / "out" / "one.json").read_text())
    assert set(kept) == {"command", "wall_s", "error", "facts", "result"}

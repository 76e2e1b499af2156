"""The page of results: which cells there are, that none is run twice, and what the page says."""

import dataclasses
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from psq.config import WorkerConfig
from psq.presets import PRESETS

BENCH = Path(__file__).resolve().parents[2] / "bench"
MODULES = ("cells", "methods", "order", "scores", "subjects", "bars", "tables", "page", "pool")
MODULES += ("pictures", "train", "powersgd")


@pytest.fixture
def e(monkeypatch):
    """The modules under bench/evidence; they are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield SimpleNamespace(**{name: importlib.import_module(f"evidence.{name}") for name in MODULES})
    for name in set(sys.modules) - before:
        if name.split(".")[0] in {"evidence", "reporting", "results", "peers"}:
            del sys.modules[name]


@pytest.fixture
def script(e):
    assert e.order.STAGES
    return importlib.import_module("results")


@pytest.fixture
def store(e, tmp_path):
    return e.cells.Store(tmp_path / "cells")


def result(score, *, bits=(4.1, 3.0), **more):
    curve = [[1.0, 2.0, 1e6, 1e6], [2.0, 1.5, 2e6, 2e6]]
    told = {"numel": 1234, "scores": [[480, score]], "curve": curve, "bits": bits}
    return {**told, "wire_bits": (bits[0] + 0.01, bits[1] + 0.01), "wall_s": 1.0, **more}


def fill(store, cells, scores, **more):
    for cell, score in zip(cells, scores, strict=True):
        store.put(cell, result(score, **more))


def fill_sgd(e, store):
    for subject in e.subjects.SUBJECTS:
        fill(store, e.order.rate_cells(subject), range(len(subject.sgd)))


# ---- statistics


def test_equal_differences_leave_no_doubt(e):
    assert e.scores.interval([0.5, 0.5, 0.5]) == e.scores.Interval(0.5, 0.0)


def test_the_interval_is_students(e):
    found = e.scores.interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.303 / 3**0.5)


def test_more_seeds_than_the_table_has_give_an_interval_that_is_not_too_narrow(e):
    assert e.scores.interval([1.0, 2.0, 3.0] * 5).half >= 2.145 * (10 / 14) ** 0.5 / 15**0.5


def test_one_seed_says_nothing_about_the_spread(e):
    assert e.scores.interval([0.1]) == e.scores.Interval(0.1, math.inf)


@pytest.mark.parametrize(
    ("mean", "half", "holds"),
    [(-0.2, 0.0, True), (-0.5, 0.6, True), (-0.5, 0.1, False), (0.5, 0.1, True)],
)
def test_within_the_noise_is_an_interval_with_zero_or_little_worse_or_better(e, mean, half, holds):
    assert e.scores.Interval(mean, half).holds(0.3) is holds


# ---- cells


def test_a_cells_file_follows_from_all_that_its_numbers_do(e, store, monkeypatch):
    cell = e.cells.Cell("char-lm", "server-adam", 4, 0, 1e-3)
    changes = (
        {"task": "fashion-mnist"},
        {"method": "qadam-1bit"},
        {"workers": 8},
        {"seed": 1},
        {"lr": 2e-3},
        {"feedback": False},
        {"non_iid": 0.3},
        {"participation": 0.5},
        {"way": "processes"},
    )
    assert {field.name for field in dataclasses.fields(cell)} == {k for c in changes for k in c}
    assert store.path(cell).parent == store.folder
    paths = {store.path(dataclasses.replace(cell, **change)) for change in changes}
    assert len(paths | {store.path(cell)}) == 1 + len(changes)
    before = store.path(cell)
    monkeypatch.setattr(e.cells, "REVISION", 99)
    assert store.path(cell) != before


def test_a_recipe_that_changes_has_its_cells_run_again(e, store, monkeypatch):
    cell = e.cells.Cell("char-lm", "server-adam", 4, 0, 1e-3)
    before = store.path(cell)
    changed = e.methods.method_of("server-adam").make().with_codecs(uplink="sign").to_plain()
    monkeypatch.setattr(e.cells, "_recipe_plain", lambda *_, **__: changed)
    assert store.path(cell) != before


def test_two_names_of_the_same_parts_are_one_cell(e, store, monkeypatch):
    other = dataclasses.replace(e.methods.method_of("server-adam"), name="other")
    monkeypatch.setattr(e.methods, "METHODS", (*e.methods.METHODS, other))
    one, same = (e.cells.Cell("char-lm", name, 4, 0, 1e-3) for name in ("server-adam", "other"))
    assert store.path(one) == store.path(same)


def test_a_task_that_is_trained_longer_is_trained_again(e, store, monkeypatch):
    cell = e.cells.Cell("char-lm", "adam", 1, 0, 1e-3, way="plain")
    before = store.path(cell)
    longer = dataclasses.replace(cell.subject, steps=cell.subject.steps + 16)
    monkeypatch.setattr(e.cells, "subject_of", lambda _: longer)
    assert store.path(cell) != before


def test_what_is_kept_comes_back_and_says_what_it_is_of(e, store):
    cell = e.cells.Cell("char-lm", "server-adam", 4, 0, 1e-3)
    assert store.get(cell) is None
    store.put(cell, result(2.0))
    assert store.get(cell)["scores"] == [[480, 2.0]]
    assert store.get(cell)["key"]["cell"]["lr"] == 1e-3
    assert store.get(cell)["name"] == "char-lm server-adam W4 lr0.001 s0"
    assert [path.suffix for path in store.folder.iterdir()] == [".json"]


def test_failures_are_tried_again_only_when_asked_for(e, store):
    good, bad = (e.cells.Cell("char-lm", "server-adam", 4, seed, 1e-3) for seed in (0, 1))
    store.put(good, result(2.0))
    store.put(bad, {"failure": "no"})
    assert store.has(bad)
    store.forget_failures()
    assert store.has(good)
    assert not store.has(bad)


# ---- which cells there are


def test_every_recipe_is_a_method_and_each_can_be_made(e):
    assert [method.recipe for method in e.methods.RECIPES] == list(PRESETS)
    for method in e.methods.RECIPES:
        assert method.make().name == method.recipe


def test_without_feedback_neither_side_has_a_residual(e):
    for method in e.methods.RECIPES:
        bare = method.make(feedback=False)
        assert not bare.uplink.error_feedback
        assert not bare.downlink.error_feedback
        assert method.has_feedback == (bare != method.make())
    assert e.methods.method_of("server-adam").has_feedback
    assert not e.methods.method_of("dist-lion").has_feedback


def test_plain_sgds_rate_is_the_best_of_those_tried_and_not_known_before_all_are(e, store):
    images, text = e.subjects.subject_of("fashion-mnist"), e.subjects.subject_of("char-lm")
    fill(store, e.order.rate_cells(images)[:-1], (0.1, 0.9, 0.3, 0.2, 0.1))
    assert e.order.sgd_rate(images, store) is None
    fill(store, e.order.rate_cells(images)[-1:], (None,))
    assert e.order.sgd_rate(images, store) == images.sgd[1]
    fill(store, e.order.rate_cells(text), (3.0, 2.5, 2.2, 2.4, 2.9, 3.3))
    assert e.order.sgd_rate(text, store) == text.sgd[2]


def test_plain_adam_comes_first_and_what_needs_sgds_rate_waits_for_it(e, store):
    first = e.order.next_cell(store, e.order.Wanted(), frozenset())
    assert (first.method, first.seed) == ("adam", 0)
    first = e.order.next_cell(store, e.order.Wanted(methods=("fp32-sgd",)), frozenset())
    assert first.seed == e.cells.RATE_SEED
    subject = first.subject
    assert e.order.cells_of(e.methods.method_of("ef-sgd"), subject, 4, store) == []
    fill_sgd(e, store)
    cells = e.order.cells_of(e.methods.method_of("dist-ef-sgdm"), subject, 4, store)
    assert [cell.lr for cell in cells] == [pytest.approx(0.1 * subject.sgd[-1])] * 3


def test_a_cell_that_is_there_or_taken_is_not_chosen_and_the_rest_is_by_importance(e, store):
    fill_sgd(e, store)
    wanted = e.order.Wanted(methods=("server-adam",), tasks=("char-lm",), seeds=(0, 1))
    chosen = []
    while (cell := e.order.next_cell(store, wanted, frozenset(chosen[-1:]))) is not None:
        chosen.append(cell)
        if len(chosen) > 1:
            store.put(chosen[-2], result(2.0))
        if len(chosen) == 8:
            break
    assert len(set(chosen)) == len(chosen)
    assert [(cell.workers, cell.seed) for cell in chosen[:6]] == [
        (workers, seed) for workers in (4, 1, 8) for seed in (0, 1)
    ]
    assert chosen[6].participation == 0.5


def test_seeds_of_rates_are_in_no_table(e, store):
    fill_sgd(e, store)
    for method in e.methods.METHODS:
        for subject in e.subjects.SUBJECTS:
            cells = e.order.cells_of(method, subject, 4, store)
            assert [cell.seed for cell in cells] == list(e.cells.SEEDS), method.name


def test_batches_can_be_shared_among_all_workers_and_rounds_end_with_the_job(e):
    for subject in e.subjects.SUBJECTS:
        for workers in e.order.WORKERS:
            assert subject.batch % workers == 0
        for method in e.methods.RECIPES:
            assert subject.steps % method.make().direction.local_steps == 0, method.name


# ---- running them


class FakePool:
    """A pool whose cells are processes that only end."""

    def __new__(cls, e, store, monkeypatch, *, until_s=math.inf, dies=()):
        started = []

        def start(_, cell):
            started.append(cell)
            if cell in dies:
                script = "import sys; sys.exit('no memory')"
            else:
                store.put(cell, result(0.5))
                script = ""
            return subprocess.Popen([sys.executable, "-c", script], stderr=-1, text=True)

        monkeypatch.setattr(e.pool.Pool, "start", start)
        monkeypatch.setattr(e.pool, "LOOK_S", 0.01)
        pool = e.pool.Pool(store, 2, until_s)
        pool.started = started
        return pool


def two(e):
    return [e.cells.Cell("char-lm", "server-adam", 4, seed, 1e-3) for seed in (0, 1)]


def chooser(store, cells):
    return lambda taken: next((c for c in cells if c not in taken and not store.has(c)), None)


def test_the_pool_runs_every_cell_once(e, store, monkeypatch, capsys):
    pool = FakePool(e, store, monkeypatch)
    pool.run(chooser(store, two(e)))
    assert pool.started == two(e)
    assert pool.done == 2
    assert "char-lm server-adam W4 lr0.001 s1: 0.5" in capsys.readouterr().out


def test_a_cell_that_dies_is_told_and_not_run_for_ever(e, store, monkeypatch, capsys):
    cells = two(e)
    pool = FakePool(e, store, monkeypatch, dies=cells[:1])
    pool.run(chooser(store, cells))
    assert pool.started == cells
    assert "s0: died: no memory" in capsys.readouterr().out


def test_when_time_is_up_nothing_is_begun(e, store, monkeypatch):
    pool = FakePool(e, store, monkeypatch, until_s=-math.inf)
    pool.run(chooser(store, two(e)))
    assert pool.started == []


@pytest.fixture
def brief(e, monkeypatch):
    """The residual network, three steps."""
    subject = dataclasses.replace(
        e.subjects.subject_of("fashion-resnet"), steps=3, every=3, batch=8
    )
    monkeypatch.setattr(e.cells, "subject_of", lambda _: subject)
    return subject


def test_a_simulated_cell_has_scores_losses_bits_and_a_digest(e, brief):
    told = e.train.train(e.cells.Cell(brief.task, "server-adam", 2, 0, 1e-3))
    assert [step for step, _ in told["scores"]] == [3]
    assert [row[0] for row in told["curve"]] == [1, 2, 3]
    assert 4.0 < told["bits"][0] < told["wire_bits"][0] < 6.0
    assert len(told["digest"]) == 64
    json.dumps(told, allow_nan=False)


def test_plain_adam_and_dense_psq_see_the_same_samples(e, brief):
    plain = e.train.train(e.cells.Cell(brief.task, "adam", 1, 0, 1e-3, way="plain"))
    dense = e.train.train(e.cells.Cell(brief.task, "fp32", 4, 0, 1e-3))
    losses = [[row[1] for row in told["curve"]] for told in (plain, dense)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != pytest.approx(losses[0][1], rel=1e-4)


def test_a_failure_is_kept_in_words(e, brief, store, monkeypatch):
    cell = e.cells.Cell(brief.task, "coded", 1, 0, 1e-3)  # a replica has nobody to agree with
    told = [str(store.folder), json.dumps(dataclasses.asdict(cell))]
    monkeypatch.setattr(sys, "argv", ["train", *told])
    e.train.main()
    assert "ConfigError" in store.get(cell)["failure"]


def test_a_rank_that_fails_is_quoted(e):
    script = "import sys; sys.exit('no gloo')"
    rank = subprocess.Popen([sys.executable, "-c", script], stdout=-1, stderr=-1, text=True)
    with pytest.raises(RuntimeError, match="no gloo"):
        e.powersgd._line(rank)


# ---- the page


def test_a_page_of_nothing_says_so_everywhere(e, store, tmp_path):
    e.page.write_page(store, tmp_path / "page.md", {})
    page = (tmp_path / "page.md").read_text()
    assert page.count("\n## ") == 6
    assert "holds |" not in page
    assert page.count("not run") > 100


def row_of(table, name):
    line = next(line for line in table.splitlines() if line.startswith(f"| {name}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_shows_means_paired_differences_bits_and_rates(e, store):
    subject = e.subjects.subject_of("fashion-mnist")
    adam, ours = e.methods.ADAM, e.methods.method_of("server-adam")
    fill(store, e.order.cells_of(adam, subject, 1, store), (0.9, 0.91, 0.92))
    cells = e.order.cells_of(ours, subject, 4, store)
    fill(store, cells, (0.89, 0.9, 0.91))
    fill(store, e.order.without_feedback(cells), (0.5, 0.51, 0.52))
    row = row_of(e.tables.recipes_table(store, subject), "`server-adam`")
    assert row[1:4] == ["90.00", "-1.00 ± 0.00", "-40.00 ± 0.00"]
    assert row[4:7] == ["4.10 (4.11)", "3.00 (3.01)", "0.001"]
    assert row[7] == "not run"
    assert "1,234 parameters" in e.tables.opening(store, subject)


def test_a_run_without_a_number_at_the_end_has_diverged_and_one_that_could_not_be_says_why(
    e, store
):
    subject = e.subjects.subject_of("char-lm")
    cells = e.order.cells_of(e.methods.method_of("qadam"), subject, 4, store)
    fill(store, cells, (2.0, None, 2.0))
    assert row_of(e.tables.recipes_table(store, subject), "`qadam`")[1] == "diverged"
    cells = e.order.cells_of(e.methods.POWER[0], subject, 4, store)
    for cell in cells:
        store.put(cell, {"failure": "RuntimeError: no gloo"})
    assert row_of(e.tables.recipes_table(store, subject), "powersgd-1")[1] == "failed"
    assert "RuntimeError: no gloo" in e.tables.failures(store)


def test_the_best_rate_is_that_of_the_grid_and_adam_has_its_own(e, store):
    subject, method = e.subjects.subject_of("char-lm"), e.methods.method_of("qadam")
    assert e.order.cells_of(method, subject, 4, store, best=True) == []
    fill(store, e.order.grid(method, subject, store), (2.5, 2.4, 2.3, 2.1, 2.2))
    best = e.order.cells_of(method, subject, 4, store, best=True)
    assert [cell.lr for cell in best] == [2 * subject.adam] * 3
    fill(store, best, (2.1, 2.1, 2.1))
    row = row_of(e.tables.recipes_table(store, subject), "`qadam`")
    assert row[7:] == ["0.002", "not run"]
    fill(store, e.order.grid(e.methods.ADAM, subject, store), (2.5, 2.4, 2.3, 2.4, 2.5))
    fill(store, e.order.cells_of(e.methods.ADAM, subject, 1, store), (2.0, 2.0, 2.0))
    row = row_of(e.tables.recipes_table(store, subject), "`qadam`")
    assert row[7:] == ["0.002", "+0.1000 ± 0.0000"]


def test_a_check_of_processes_is_of_all_weights(e, store):
    simulated, real = e.order.checks()[:2]
    assert (simulated.way, real.way) == ("simulated", "processes")
    store.put(simulated, result(0.8, digest="a"))
    assert "not run" in e.tables.checks_table(store)
    store.put(real, result(0.8, digest="a"))
    assert row_of(e.tables.checks_table(store), "`server-adam`")[-1] == "yes"


def test_a_check_of_processes_that_fails_is_shouted(e, store):
    for cell, digest in zip(e.order.checks()[:2], "ab", strict=True):
        store.put(cell, result(0.8, digest=digest))
    assert row_of(e.tables.checks_table(store), "`server-adam`")[-1] == "NO"


def test_traps_are_those_of_the_presets(e):
    table = e.tables.traps_table()
    for preset in PRESETS.values():
        assert preset.trap in table
        assert preset.suggested in table


# ---- what must hold


def line_of(e, store, name):
    table = e.bars.bars_table(store)
    line = next(line for line in table.splitlines() if line.startswith(f"| {name}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def fill_default(e, store, difference, bits=(4.1, 1.0), tasks=3):
    default = e.methods.method_of(WorkerConfig().recipe)
    for subject in e.subjects.SUBJECTS[:tasks]:
        worse = -difference / subject.points
        base = [0.9, 0.91, 0.92]
        fill(store, e.order.cells_of(e.methods.ADAM, subject, 1, store), base)
        cells = e.order.cells_of(default, subject, 4, store)
        fill(store, cells, [score + worse for score in base], bits=bits)


@pytest.mark.parametrize(
    ("difference", "verdict"), [(0.2, "holds"), (-3.0, "holds"), (0.5, "does not hold")]
)
def test_points_are_worse_by_less_accuracy_or_by_more_loss(e, store, difference, verdict):
    fill_default(e, store, difference)
    line = line_of(e, store, "default (")
    assert line[-1] == verdict
    assert line[1].count(f"{-difference:+.2f} ± 0.00 points") == 3


@pytest.mark.parametrize(
    ("bits", "verdict"), [((4.1, 1.05), "holds"), ((4.1, 3.0), "does not hold")]
)
def test_bits_are_held_to_both_ways(e, store, bits, verdict):
    fill_default(e, store, 0.0, bits=bits)
    assert line_of(e, store, "default: at most")[-1] == verdict


def test_a_line_with_a_part_that_was_not_run_does_not_hold_yet(e, store):
    fill_default(e, store, 0.0, tasks=2)
    line = line_of(e, store, "default (")
    assert line[-1] == "not run"
    assert line[1].endswith("1 of 3 not run")


def test_one_part_that_fails_is_enough(e, store):
    fill_default(e, store, 1.0, tasks=1)
    assert line_of(e, store, "default (")[-1] == "does not hold"


# ---- pictures and the command


def test_a_task_of_which_something_is_there_has_a_picture(e, store, tmp_path):
    pytest.importorskip("matplotlib")
    subject = e.subjects.subject_of("char-lm")
    fill(store, e.order.cells_of(e.methods.ADAM, subject, 1, store), (2.0, 2.1, 2.2))
    drawn = e.pictures.draw_all(store, tmp_path)
    assert drawn == {"char-lm": "results-char-lm.png"}
    assert (tmp_path / drawn["char-lm"]).read_bytes().startswith(b"\x89PNG")


def test_a_curve_ends_where_a_run_has_no_number(e, store):
    subject = e.subjects.subject_of("char-lm")
    cells = e.order.cells_of(e.methods.ADAM, subject, 1, store)[:2]
    store.put(cells[0], result(2.0))
    store.put(cells[1], result(2.0, curve=[[1.0, 4.0, 1e6, 1e6], [2.0, None, 2e6, 2e6]]))
    assert e.pictures.curve_of(cells, store) == [(1.0, 2.0, 3.0)]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90.0), ("30m", 1800.0), ("1.5h", 5400.0)])
def test_budgets_have_a_unit(script, text, seconds):
    assert script.parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["30", "m", "1d", "-5m"])
def test_other_budgets_are_refused(script, text):
    with pytest.raises(Exception, match="expected a time such as 90s, 30m or 2h"):
        script.parse_budget(text)


@pytest.mark.parametrize(("flags", "written"), [(["--page"], True), ([], False)])
def test_a_page_with_gaps_is_written_only_when_asked_for(
    script, tmp_path, monkeypatch, flags, written
):
    monkeypatch.setattr(script, "CELLS", tmp_path / "cells")
    monkeypatch.setattr(script, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["results.py", "--budget", "0s", *flags])
    script.main()
    assert (tmp_path / "results.md").exists() is written

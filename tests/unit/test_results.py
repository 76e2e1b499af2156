"""The page of results: its statistics, and that finished cells are not trained again."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from psq.presets import preset

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "results.py"


@pytest.fixture
def results(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("bench_results", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CELLS", tmp_path / "cells")
    monkeypatch.setattr(module, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(module, "PICTURE", tmp_path / "results.png")
    return module


def cell(score, recipe):
    wire = {"bits_per_parameter_up": 4.1, "bits_per_parameter_down": 3.0, "compression_ratio": 9.0}
    summary = {"score": score, "recipe": recipe, "numel": 1234, "steps": 10, "samples": 640}
    curve = {"scores": [0.5, score], "score_steps": [5.0, 10.0], "score_bytes": [1e6, 2e6]}
    return {"summary": {**summary, "wire": wire}, "curve": curve, "wall_s": 1.0}


def cells_of(results, scores_of):
    recipes = {method.name: " ".join(method.words[1:2]) + " (x)" for method in results.METHODS}
    return {
        (subject.task, method.name): [
            cell(score, recipes[method.name]) for score in scores_of(method)
        ]
        for subject in results.SUBJECTS
        for method in results.METHODS
    }


def test_equal_differences_leave_no_doubt(results):
    assert results.interval([0.5, 0.5, 0.5]) == (0.5, 0.0)


def test_the_interval_is_students(results):
    mean, half = results.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / 3**0.5)


def test_more_seeds_than_the_table_has_give_an_interval_that_is_not_too_narrow(results):
    _, half = results.interval([1.0, 2.0, 3.0] * 5)
    assert half >= 2.145 * (10 / 14) ** 0.5 / 15**0.5


def test_one_seed_says_nothing_about_the_spread(results):
    assert results.interval([0.1]) == (0.1, float("inf"))


def test_the_page_shows_each_seed_and_the_difference_to_plain_adam(results):
    is_adam = results.BASELINE.__eq__
    cells = cells_of(results, lambda method: (0.9, 0.91) if is_adam(method) else (0.89, 0.9))
    results.write_page(cells, [0, 1])
    page = results.PAGE.read_text()
    assert "90.50 | 90.00 91.00 | | 32 | 32 | 1x |" in page
    assert "89.50 | 89.00 90.00 | -1.00 ± 0.00 | 4.10 | 3.00 | 9.0x |" in page
    assert page.count("\n## ") == 2
    assert "1,234 parameters, 10 steps of 64 samples" in page


def test_the_default_recipe_is_marked_only_with_its_own_codecs(results):
    default = preset("server-adam")
    words = f"({default.uplink.codec} up, {default.downlink.kind} {default.downlink.codec} down)"
    method = results.METHODS[1]
    assert "default" in results._words(method, {"recipe": f"server-adam {words}"})
    assert "default" not in results._words(method, {"recipe": "server-adam (sign up, sign down)"})


def test_the_picture_is_drawn(results):
    pytest.importorskip("matplotlib")
    results.draw(cells_of(results, lambda _: (0.8, 0.9)))
    assert results.PICTURE.read_bytes().startswith(b"\x89PNG")


def test_a_finished_cell_is_not_trained_again(results, monkeypatch):
    trained = []

    class FakeBoard:
        def summary(self):
            return cell(0.7, "fp32 (x)")["summary"]

    def run(subject, method, words):
        trained.append((subject.task, method.name, words))
        return FakeBoard()

    monkeypatch.setattr(results, "_run", run)
    monkeypatch.setattr(results, "curve_of", lambda label, _: results.Method(label, "blue"))
    subject, method = results.SUBJECTS[0], results.METHODS[2]
    first = results.train_cell(subject, method, 4)
    assert results.train_cell(subject, method, 4) == json.loads(json.dumps(first))
    assert len(trained) == 1
    assert trained[0][2][:4] == ("--task", subject.task, "--seed", "4")

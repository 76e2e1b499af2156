"""Tables at the end of a job."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from psq_worker.events import PHASES
from psq_worker.report import (
    PHASE_WORDS,
    comparison_table,
    print_summary,
)

SUMMARY = {
    "task": "fashion-mnist",
    "recipe": "server-adam (log up, delta sign down)",
    "workers": 2,
    "servers": 1,
    "lost": [],
    "consistency": "bsp",
    "staleness": {"mean": 0.0, "max": 0},
    "exposed_s": 0.0042,
    "steps": 800,
    "numel": 1000,
    "samples": 51_200,
    "samples_per_s": 1234.5,
    "elapsed_s": 41.4,
    "loss": 0.31,
    "metric": "accuracy",
    "score": 0.8712,
    "scores": {"accuracy": 0.8712},
    "skipped": 0,
    "rejected": 0,
    "wire": {
        "sent_bytes": 5.2e8,
        "received_bytes": 1.3e8,
        "bits_per_parameter_up": 4.13,
        "bits_per_parameter_down": 1.04,
        "compression_ratio_up": 7.75,
        "compression_ratio_down": 30.8,
        "compression_ratio": 12.4,
    },
    "payload_bits": 4.03,
    "step_s": {"total": 0.055, **dict.fromkeys(PHASES, 0.011)},
}
BASELINE = {
    **SUMMARY,
    "workers": 1,
    "servers": 0,
    "exposed_s": 0.0,
    "payload_bits": None,
    "score": 0.87,
    "step_s": {"total": 0.03, **dict.fromkeys(PHASES, 0.0), "compute": 0.03},
}


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def cells(text, label):
    line = next(line for line in text.splitlines() if label in line)
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_a_summary_shows_score_bits_ratios_and_phases(capsys):
    print_summary(SUMMARY, as_json=False)
    text = capsys.readouterr().out
    assert "fashion-mnist: 2 workers, server-adam (log up, delta sign down)" in text
    assert cells(text, "test accuracy") == ["87.12 %"]
    assert cells(text, "bits per parameter, up") == ["4.13"]
    assert cells(text, "bits per parameter, down") == ["1.04"]
    assert cells(text, "compression, overall") == ["12.4x"]
    assert cells(text, "sent per worker") == ["520 MB"]
    assert cells(text, "milliseconds per step") == ["55.0"]
    for phase, words in PHASE_WORDS.items():
        assert cells(text, f"{phase}: {words}") == ["11.0"]


def test_a_comparison_shows_both_jobs_and_no_phases_that_plain_adam_has_not(capsys):
    Console().print(comparison_table(SUMMARY, BASELINE))
    text = capsys.readouterr().out
    assert cells(text, "test accuracy") == ["87.12 %", "87.00 %"]
    assert cells(text, "encode:") == ["11.0", "-"]
    assert cells(text, "compute:") == ["11.0", "30.0"]


def test_bits_of_payloads_are_shown_of_those_who_said_something(capsys):
    Console().print(comparison_table(SUMMARY, BASELINE))
    assert cells(capsys.readouterr().out, "of a value that was said") == ["4.03", "-"]
    print_summary({**SUMMARY, "payload_bits": None}, as_json=False)
    assert "of a value that was said" not in capsys.readouterr().out


def test_a_job_without_scores_has_no_score_row(capsys):
    print_summary({**SUMMARY, "metric": "", "score": None, "loss": None}, as_json=False)
    text = capsys.readouterr().out
    assert "test " not in text
    assert cells(text, "training loss, last tenth") == ["-"]


def test_a_script_that_says_nothing_of_samples_has_no_rate(capsys):
    print_summary({**SUMMARY, "samples": 0, "samples_per_s": 0.0}, as_json=False)
    assert cells(capsys.readouterr().out, "samples/s") == ["-"]


def test_skipped_and_rejected_pushes_are_counted_where_there_are_any(capsys):
    print_summary({**SUMMARY, "skipped": 3}, as_json=False)
    assert cells(capsys.readouterr().out, "pushes skipped") == ["3"]
    print_summary({**SUMMARY, "rejected": 7}, as_json=False)
    assert cells(capsys.readouterr().out, "pushes rejected") == ["7"]
    print_summary(SUMMARY, as_json=False)
    text = capsys.readouterr().out
    assert "skipped" not in text
    assert "rejected" not in text


def test_a_summary_shows_what_waiting_no_computing_hid(capsys):
    Console().print(comparison_table(SUMMARY, BASELINE))
    assert cells(capsys.readouterr().out, "exposed:") == ["4.2", "-"]


def test_several_servers_are_counted_and_the_only_one_is_not(capsys):
    print_summary({**SUMMARY, "servers": 3}, as_json=False)
    assert "fashion-mnist: 2 workers, 3 servers, server-adam" in capsys.readouterr().out


def test_staleness_is_shown_where_workers_may_be_apart(capsys):
    apart = {"consistency": "ssp:3", "staleness": {"mean": 0.5, "max": 2}}
    print_summary({**SUMMARY, **apart}, as_json=False)
    text = capsys.readouterr().out
    assert "2 workers, ssp:3, server-adam" in text
    assert cells(text, "rounds stale, mean and most") == ["0.50, 2"]
    print_summary(SUMMARY, as_json=False)
    assert "stale" not in capsys.readouterr().out


def test_json_is_the_summary_itself(capsys):
    print_summary(SUMMARY, as_json=True)
    assert json.loads(capsys.readouterr().out) == SUMMARY


def test_a_job_that_said_nothing_prints_nothing(capsys):
    print_summary({}, as_json=False)
    assert capsys.readouterr().out == ""

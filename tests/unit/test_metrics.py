from __future__ import annotations

import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from psq.metrics import PHASES, Metrics, Totals


def parse(metrics):
    text = metrics.exposition().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families.values()
        for sample in family.samples
    }


def make(totals=None):
    return Metrics(role="server", version="9", kernel="v3", read=lambda: totals or Totals())


def test_the_names_are_the_documented_ones():
    metrics = make(Totals(pushes={"staged": 1}, workers={"joined": 2}))
    metrics.observe_phase("reduce", 0.1)
    names = {key[0] for key in parse(metrics)}
    assert names >= {
        "psq_wire_bytes_total",
        "psq_step_seconds_count",
        "psq_phase_seconds_sum",
        "psq_staleness_steps",
        "psq_workers",
        "psq_rounds_total",
        "psq_pushes_total",
        "psq_skipped_total",
        "psq_evicted_total",
        "psq_waiting_seconds",
        "psq_version",
        "psq_build_info",
        "psq_insecure",
        "psq_durable_version",
        "psq_blocked",
        "psq_journal_bytes_total",
        "psq_checkpoint_age_seconds",
    }
    assert all(name.startswith("psq_") for name in names), "nothing but psq's own"


def test_counts_are_read_at_the_moment_of_the_scrape():
    totals = [Totals(rounds=1)]
    metrics = Metrics(role="server", version="9", kernel="v3", read=lambda: totals[0])
    assert parse(metrics)["psq_rounds_total",] == 1
    totals[0] = Totals(rounds=2, insecure=True, version=5, waiting_s=1.5)
    samples = parse(metrics)
    assert samples["psq_rounds_total",] == 2
    assert samples["psq_insecure",] == 1
    assert samples["psq_version",] == 5
    assert samples["psq_waiting_seconds",] == 1.5


def test_bytes_are_told_apart_by_direction():
    samples = parse(make(Totals(sent_bytes=10, received_bytes=20)))
    assert samples["psq_wire_bytes_total", ("direction", "sent")] == 10
    assert samples["psq_wire_bytes_total", ("direction", "received")] == 20


def test_what_runs_here_is_said():
    samples = parse(make())
    key = ("psq_build_info", ("kernel", "v3"), ("role", "server"), ("version", "9"))
    assert samples[key] == 1


def test_durations_fall_into_buckets_and_are_summed():
    metrics = make()
    for duration_s in (0.00005, 0.0001, 0.02, 5000.0):
        metrics.observe_step(duration_s)
    samples = parse(metrics)
    assert samples["psq_step_seconds_bucket", ("le", "0.0001")] == 2
    assert samples["psq_step_seconds_bucket", ("le", "0.03")] == 3
    assert samples["psq_step_seconds_bucket", ("le", "300.0")] == 3
    assert samples["psq_step_seconds_bucket", ("le", "+Inf")] == 4
    assert samples["psq_step_seconds_count",] == 4
    assert samples["psq_step_seconds_sum",] == pytest.approx(5000.02015)


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_has_its_own_durations(phase):
    metrics = make()
    metrics.observe_phase(phase, 2.0)
    samples = parse(metrics)
    assert samples["psq_phase_seconds_sum", ("phase", phase)] == 2.0
    assert sum(key[0] == "psq_phase_seconds_sum" for key in samples) == 1


def test_staleness_is_counted_in_rounds_once_there_is_any_to_tell():
    metrics = make()
    assert not any("applied_staleness" in key[0] for key in parse(metrics))
    for steps in (0, 0, 3, 200):
        metrics.observe_staleness(steps)
    samples = parse(metrics)
    assert samples["psq_applied_staleness_steps_bucket", ("le", "0.0")] == 2
    assert samples["psq_applied_staleness_steps_bucket", ("le", "3.0")] == 3
    assert samples["psq_applied_staleness_steps_count",] == 4
    assert samples["psq_applied_staleness_steps_sum",] == 203


def test_an_unknown_phase_is_a_mistake():
    with pytest.raises(KeyError):
        make().observe_phase("thinking", 1.0)


def test_two_in_one_process_share_nothing():
    first, second = make(), make()
    first.observe_step(1.0)
    assert parse(second)["psq_step_seconds_count",] == 0


def test_prometheus_is_not_imported_before_somebody_asks():
    code = "import psq.metrics, sys; assert 'prometheus_client' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_did_not_count_is_told_by_rank_and_reason():
    samples = parse(make(Totals(rejected={(3, "krum"): 5, (0, "late"): 1})))
    assert samples["psq_rejected_total", ("rank", "3"), ("reason", "krum")] == 5
    assert samples["psq_rejected_total", ("rank", "0"), ("reason", "late")] == 1

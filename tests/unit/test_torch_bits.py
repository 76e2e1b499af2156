"""Jobs whose workers choose how many bits they say a message in."""

from __future__ import annotations

import numpy as np
import pytest

from psq.presets import preset

BUDGET = ("uplink.choice=dq", "uplink.choice.bits=4", "uplink.choice.steps=30")
RECIPES = (preset("dq-sgd"), preset("server-adam").with_codecs(uplink="uniform:bits=4"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_workers_of_a_job_choose_bits_within_their_budget(join_many, recipe):
    runs = join_many(2, steps=30, width=4096, recipe=recipe.with_options(*BUDGET), lr=1e-4)
    assert runs[0].weights[-1].tobytes() == runs[1].weights[-1].tobytes()
    for run in runs:
        assert all(report.applied for report in run.reports)
        bits = np.array([report.bits_per_value for report in run.reports])
        budget = bits[0]  # nothing is known in the first step: 4 bits, scales and padding
        assert 4.0 < budget < 4.2
        assert np.ptp(bits) > 0.2  # not the same all the time
        assert 0.97 * budget <= bits.mean() <= 1.005 * budget


def test_a_report_counts_what_was_said_without_headers(join_many):
    (run,) = join_many(1, steps=3, width=1024, recipe="fp32")
    numel = run.weights[0].size
    for report in run.reports:
        assert (report.payload_bytes, report.said_numel) == (4 * numel, numel)
        assert report.bits_per_value == 32.0
        assert report.payload_bytes < report.sent_bytes

"""Every recipe against its file in tests/reference, through payloads, shards and all its parts."""

import numpy as np
import pytest

from battery.cases import CASES, RATES, job_of, reference_of, settings_of, started
from psq.presets import PRESETS

PAIRS = [(name, workers) for name, case in CASES.items() for workers in case.worlds]


def test_every_recipe_has_a_case_and_every_case_a_recipe():
    assert set(CASES) == set(PRESETS)
    assert len(RATES) >= 30


def test_a_bound_is_stated_with_its_reason():
    assert [name for name, case in CASES.items() if bool(case.bound) != bool(case.why)] == []


@pytest.mark.parametrize(("name", "workers"), PAIRS)
def test_a_recipe_does_what_its_reference_does(name, workers):
    bound = CASES[name].bound
    cluster, problem = started(name, workers)
    assert len(cluster.shards) > 1
    assert max(len(shard.segments) for shard in cluster.shards) > 1
    job = job_of(cluster.plan, problem, RATES)
    begun = cluster.x.copy()
    for t, x in enumerate(reference_of(name).train(job, **settings_of(name, workers)), 1):
        cluster.step(RATES[t - 1])
        apart = np.abs(cluster.x.astype(np.float64) - x).max()
        assert apart <= bound * np.abs(x).max(), f"round {t} of {len(RATES)}"
        is_image = cluster.plan.recipe.downlink.kind == "weights"
        seen = job.down(cluster.x) if is_image else cluster.x
        for worker in cluster.workers:
            assert worker.x.tobytes() == seen.tobytes(), f"rank {worker.rank} in round {t}"
    assert t == len(RATES)
    assert not np.array_equal(begun, cluster.x)


def test_kardams_filters_struck():
    cluster, _ = started("kardam", 4)
    refused = [reason for lr in RATES for reason in cluster.step(lr).refused.values()]
    for filter_name in ("warm-up", "frequency", "lipschitz"):
        assert any(reason.startswith(filter_name) for reason in refused), filter_name


@pytest.mark.parametrize("name", ["dq-sgd", "onebit-adam", "shared-adam", "shared-direction"])
def test_messages_went_out_in_several_codecs(name):
    cluster, _ = started(name, 3)
    rounds = [cluster.step(lr) for lr in RATES]
    assert len({push.codec for each in rounds for push in each.pushes.values()}) > 1

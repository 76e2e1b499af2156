"""A worker whose rate follows its own steps, where rounds are not everybody's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from psq.plan import Plan
from psq.presets import preset
from psq_worker.job import Job
from psq_worker.pace import OwnPace, is_own, steps_behind


def plan(consistency):
    return Plan.of([("w", (8,))], preset("server-adam"), 4, consistency=consistency)


@pytest.mark.parametrize(
    ("consistency", "own", "behind"),
    [("bsp", False, 20), ("bsp,quorum=2", False, 20), ("ssp:2", True, 5), ("asp", True, 5)],
)
def test_versions_are_steps_of_every_worker_only_where_rounds_are_everybodys(
    consistency, own, behind
):
    made = plan(consistency)
    assert is_own(made) is own
    assert steps_behind(made, 20) == behind


def test_each_step_is_told_its_rate_before_its_gradients_are_computed():
    """With overlap hooks push while backward runs, and ask for the rate before `step` is called."""
    job = Job(steps=4, batch_size=1, lr=1.0, schedule="linear", start_step=1)
    used = []
    worker = SimpleNamespace(
        rank=0, world_size=4, data_rank=0, data_world_size=4, lr=9.0,
        step=lambda **_: used.append(worker.lr),
    )  # fmt: skip
    paced = OwnPace(worker, job)
    seen = []
    for _ in range(3):
        seen.append(worker.lr)
        paced.step(loss=1.0, samples=1)
    assert seen == used == [0.75, 0.5, 0.25]

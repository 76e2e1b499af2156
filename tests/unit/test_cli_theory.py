"""psq schedule and psq privacy, and what jobs say of both before and after."""

import json
import logging
from types import SimpleNamespace

import pytest

from psq.config import WorkerConfig
from psq.config.options import run
from psq.presets import preset
from psq.recipe import OneMinusPower
from psq.theory import Release, gaussian_epsilon, rdp_epsilon
from psq.torch.settings import warn_of_schedule
from psq_worker import runner
from psq_worker.cli import psq
from psq_worker.job import Job


@pytest.fixture
def call(capsys):
    """Run psq in this process: (exit code, stdout, stderr)."""

    def calling(*words):
        with pytest.raises(SystemExit) as ended:
            run(psq, "psq", list(words))
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return calling


def test_the_defaults_schedule_is_shown_condition_by_condition(call):
    code, out, _ = call("schedule")
    assert code == 0
    assert out.splitlines()[0] == "shared-adam, learning rate 0.001, 10,000 steps: stalls"
    shown = [line.split()[0] for line in out.splitlines()[1:5]]
    assert shown == ["momentum", "memory", "step", "sum"]
    assert "rate " not in out.splitlines()[5]


def test_a_schedule_that_fits_names_its_rate_and_one_that_does_not_says_which_part(call):
    words = ("--adam", "theta=one-minus-power:0.9:0.75")
    assert "T^-0.375" in call("schedule", "qadam", *words, "--lr", "power:0.5:0.5")[1]
    code, out, _ = call("schedule", "qadam", *words, "--json")
    found = json.loads(out)
    assert (code, found["verdict"]) == (0, "fails")
    assert {c["name"]: c["verdict"] for c in found["conditions"]}["step size"] == "fails"


def test_a_recipe_without_a_schedule_and_a_rate_that_is_none_are_refused(call):
    code, _, err = call("schedule", "ef-sgd")
    assert code == 78
    assert "ef-sgd has no Adam" in err
    assert "AMSGrad" in call("schedule", "server-amsgrad")[2]
    assert "got 'fast:1:x'" in call("schedule", "--lr", "fast:1:x")[2]
    assert call("schedule", "--steps", "1")[0] == 64


def test_privacy_states_epsilon_by_rdp_and_exactly(call):
    code, out, _ = call("privacy", "--sigma", "40", "--steps", "100", "--json")
    assert code == 0
    found, release = json.loads(out), Release(1.0, 40.0, 100)
    assert found["epsilon"] == rdp_epsilon(release, 1e-5)[0]
    assert found["exact"] == gaussian_epsilon(release.mu, 1e-5)
    text = call("privacy", "--sigma", "40", "--steps", "100")[1]
    assert f"epsilon {found['epsilon']:.4g}" in text
    assert "docs/privacy.md" in text


def test_privacy_finds_the_noise_for_a_target(call):
    words = ("--clip", "2", "--steps", "100", "--delta", "1e-6")
    found = json.loads(call("privacy", "--epsilon", "3", *words, "--json")[1])
    assert found["epsilon"] == pytest.approx(3.0, rel=1e-6)
    again = json.loads(call("privacy", "--sigma", str(found["sigma"]), *words, "--json")[1])
    assert again == found


def test_privacy_wants_either_noise_or_a_target(call):
    assert call("privacy", "--steps", "3")[0] == 64
    assert call("privacy", "--steps", "3", "--sigma", "1", "--epsilon", "1")[0] == 64
    assert "nothing is promised" in call("privacy", "--sigma", "0", "--steps", "3")[1]
    assert json.loads(call("privacy", "--sigma", "0", "--steps", "3", "--json")[1])["exact"] is None


def test_a_worker_warns_once_of_a_schedule_that_does_not_fit(caplog):
    recipe = preset("server-adam").with_adam(theta=OneMinusPower(0.9, 0.5))
    with caplog.at_level(logging.WARNING, "psq.torch"):
        for rank in range(3):
            warn_of_schedule(WorkerConfig(rank=rank, world_size=3), recipe, None)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "step size fails" in caplog.text
    caplog.clear()
    warn_of_schedule(WorkerConfig(rank=0, world_size=3), preset("server-adam"), None)
    warn_of_schedule(WorkerConfig(rank=0, world_size=3), recipe, lambda _: 0.1)
    assert not caplog.records


class Joined:
    """As much of a worker as is asked for what theory says."""

    def __init__(self, recipe, rank=0):
        self.plan = SimpleNamespace(recipe=recipe)
        self.rank = rank


def test_a_noisy_job_says_what_its_noise_hides_and_others_say_nothing(caplog):
    noisy = preset("dp-sign").with_options(direction={"clip": 1.0, "sigma": 80.0})
    with caplog.at_level(logging.INFO, "psq.worker"):
        runner._say_theory(Joined(noisy, rank=3), Job(steps=100, batch_size=1, lr=0.1))
        runner._say_theory(Joined(preset("ef-sgd")), Job(steps=100, batch_size=1, lr=0.1))
    (said,) = caplog.records
    assert said.levelname == "INFO"
    epsilon = rdp_epsilon(Release(1.0, 80.0, 100), 1e-5)[0]
    assert f"over 100 steps: epsilon {epsilon:.4g} at delta 1e-05" in said.message


def test_a_task_is_warned_of_by_the_rate_and_the_steps_it_has(caplog):
    recipe = preset("server-adam").with_adam(theta=0.9)
    job = Job(steps=100, batch_size=1, lr=0.1, schedule="linear")
    with caplog.at_level(logging.INFO, "psq.worker"):
        for rank in (0, 1):
            runner._say_theory(Joined(recipe, rank=rank), job)
        runner._say_theory(Joined(preset("server-adam")), job)
    (said,) = caplog.records
    assert said.levelname == "WARNING"
    assert "over 100 steps: sum stalls" in said.message

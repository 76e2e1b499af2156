"""A training run as a value: where its rounds and evaluations fall."""

import pytest

from psq.config import WorkerConfig
from psq.errors import ConfigError
from psq.recipe import register_schedule
from psq_worker.job import Job
from psq_worker.recipes import check_job, recipe_of


def evaluated(job: Job) -> list[int]:
    return [done for done in range(1, job.steps + 1) if job.is_evaluated(done)]


def test_a_job_is_evaluated_every_so_many_steps_and_at_its_end():
    assert evaluated(Job(steps=25, batch_size=1, lr=1.0, eval_every=10)) == [10, 20, 25]


def test_with_local_steps_it_is_evaluated_when_a_round_ends():
    job = Job(steps=32, batch_size=1, lr=1.0, eval_every=10).in_rounds(4)
    assert evaluated(job) == [12, 20, 32]


def test_with_local_steps_it_ends_with_a_round():
    assert Job(steps=30, batch_size=1, lr=1.0).in_rounds(4).steps == 32
    assert Job(steps=30, batch_size=1, lr=1.0).in_rounds(1).steps == 30


def test_the_rhythm_of_pushes_is_a_setting():
    told = WorkerConfig(recipe="qadam-1bit", local_steps=4, every=2)
    recipe = recipe_of(told)
    assert (recipe.direction.local_steps, recipe.uplink.every) == (4, 2)
    usual = recipe_of(WorkerConfig(recipe="local-adam"))
    assert (usual.direction.local_steps, usual.uplink.every) == (8, 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"local_steps": 2}, "local_steps=2 needs Adam on the workers"),
        ({"recipe": "fp32", "every": 2}, "every=2 needs error feedback"),
        ({"recipe": "server-adam", "every": 2, "consistency": "ssp:1"}, "every=2 needs bsp"),
        ({"every": 2}, "moves every shard in every round, got every=2: take server-adam"),
        ({"recipe": "qadam", "local_steps": 1001}, "local_steps: expected a whole number"),
        ({"every": 0}, "every: expected a whole number"),
    ],
)
def test_a_rhythm_that_no_job_can_have_is_refused_before_anything_starts(settings, words):
    with pytest.raises(ConfigError, match=words):
        check_job(WorkerConfig(**settings))


def test_a_learning_rate_may_follow_a_schedule_of_a_family_or_of_the_user_s_own():
    falling = Job(steps=9, batch_size=1, lr=0.5, schedule="power:1:0.5")
    assert [falling.lr_at(step) for step in (0, 3, 8)] == [0.5, 0.25, 0.5 / 3]
    register_schedule("test-rise", lambda t, steps: min(1.0, t / steps))
    rising = Job(steps=9, batch_size=1, lr=0.5, schedule="test-rise:4")
    assert [rising.lr_at(step) for step in (0, 3, 8)] == [0.125, 0.5, 0.5]
    assert WorkerConfig(schedule="test-rise:4").schedule == "test-rise:4"


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("power:1", "constant, linear, cosine, or a factor"),
        ("power:-1:0.5", "asks for the learning rate -0.5 in step 0"),
        ("one-minus-power:1.5:0", "asks for the learning rate -0.25 in step 0"),
        ("sawtooth", "no schedule 'sawtooth' here; there are: .*power"),
    ],
)
def test_a_schedule_that_gives_no_rate_is_refused(schedule, words):
    with pytest.raises(ConfigError, match=words):
        Job(steps=9, batch_size=1, lr=0.5, schedule=schedule)


def test_a_schedule_that_is_none_is_refused_with_the_settings():
    words = "schedule: expected constant, linear, cosine, or a factor"
    with pytest.raises(ConfigError, match=words):
        WorkerConfig(schedule="power:1")
    with pytest.raises(ConfigError, match=f"{words}; no schedule 'sawtooth' here"):
        WorkerConfig(schedule="sawtooth")


def test_a_part_that_needs_more_workers_is_refused_before_anything_starts():
    krum = {"recipe": "ef-sgd", "options": "aggregate=krum aggregate.f=1"}
    with pytest.raises(ConfigError, match="krum"):
        check_job(WorkerConfig(**krum, world_size=4))
    check_job(WorkerConfig(**krum, world_size=5))

"""A training run as a value: where its rounds and evaluations fall."""

from psq_worker.job import Job


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

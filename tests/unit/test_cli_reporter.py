"""The reporter: adds up steps, speaks now and then, leaves untypical steps out of the times."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from psq_worker.events import PHASES, Evaluation, Progress, Started
from psq_worker.reporter import Reporter


@dataclass(frozen=True)
class Step:
    left_out: tuple = ()
    staleness: int = 0
    exposed_s: float = 0.25
    applied: bool = True
    reason: str = ""
    sent_bytes: int = 10
    received_bytes: int = 20
    payload_bytes: int = 5
    said_numel: int = 40
    compute_s: float = 1.0
    encode_s: float = 2.0
    wire_s: float = 3.0
    server_s: float = 4.0
    decode_s: float = 5.0


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def make(steps=0, every_s=0.0):
    said, clock = [], Clock()
    started = Started(rank=1, world_size=2, task="t", recipe="r", steps=steps, numel=7)
    return Reporter(said.append, started, every_s=every_s, clock=clock), said, clock


def test_it_says_who_it_is_first():
    _, said, _ = make(steps=3)
    assert said == [Started(rank=1, world_size=2, task="t", recipe="r", steps=3, numel=7)]


def test_it_adds_up_steps():
    reporter, said, clock = make()
    for _ in range(3):
        clock.now_s += 0.5
        reporter.step(Step(), 2.0, 8)
    last = said[-1]
    assert (last.step, last.samples, last.sent_bytes, last.received_bytes) == (3, 24, 30, 60)
    assert (last.elapsed_s, last.loss, last.skipped, last.numel) == (1.5, 2.0, 0, 7)
    assert (last.payload_bytes, last.said_numel) == (15, 120)
    end = reporter.summary()
    assert (end.payload_bytes, end.said_numel) == (15, 120)


def test_it_speaks_no_more_often_than_told_but_always_at_the_last_step():
    reporter, said, clock = make(steps=5, every_s=10.0)
    for _ in range(5):
        clock.now_s += 4.0
        reporter.step(Step(), 1.0, 1)
    assert [event.step for event in said if isinstance(event, Progress)] == [1, 4, 5]


def test_a_loss_is_the_mean_since_the_last_word():
    reporter, said, clock = make(steps=4, every_s=10.0)
    for loss in (1.0, 2.0, 4.0, 6.0):
        clock.now_s += 1.0
        reporter.step(Step(), loss, 1)
    assert [event.loss for event in said[1:]] == [1.0, 4.0]


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_a_loss_that_is_missing_or_no_number_leaves_the_mean_alone(loss):
    reporter, said, _ = make()
    reporter.step(Step(), 3.0, 1)
    reporter.step(Step(), loss, 1)
    assert said[-1].loss == 3.0


def test_a_step_that_was_not_applied_is_counted_by_its_reason():
    reporter, said, _ = make()
    reporter.step(Step(applied=False, left_out=(3,)), None, 1)
    assert (said[-1].skipped, said[-1].rejected, said[-1].loss) == (1, 0, None)
    reporter.step(Step(applied=False, reason="the server refused shards 0"), None, 1)
    reporter.step(Step(applied=False, reason="local"), None, 1)
    reporter.step(Step(applied=False, reason="sat out"), None, 1)
    reporter.step(Step(), None, 1)
    assert (said[-1].skipped, said[-1].rejected) == (1, 1)
    assert (reporter.summary().skipped, reporter.summary().rejected) == (1, 1)


def test_the_first_step_and_the_one_after_an_evaluation_are_not_timed():
    reporter, said, _ = make()
    for _ in range(3):
        reporter.step(Step(), 1.0, 1)
    reporter.evaluated("accuracy", {"accuracy": 0.5})
    for _ in range(2):
        reporter.step(Step(), 1.0, 1)
    assert said[-1].step == 5
    assert said[-1].timed_steps == 3
    assert said[-1].phases_s == {phase: 3 * getattr(Step(), f"{phase}_s") for phase in PHASES}


def test_exposed_waits_are_added_up_over_the_timed_steps_only():
    reporter, said, _ = make()
    for _ in range(3):
        reporter.step(Step(), 1.0, 1)
    assert (said[-1].timed_steps, said[-1].exposed_s) == (2, 0.5)
    assert reporter.summary().exposed_s == 0.5


def test_staleness_is_added_up_and_its_most_is_kept():
    reporter, said, _ = make()
    for staleness in (0, 2, 1):
        reporter.step(Step(staleness=staleness), 1.0, 1)
    assert (said[-1].staleness_sum, said[-1].staleness_max) == (3, 2)
    assert (reporter.summary().staleness_sum, reporter.summary().staleness_max) == (3, 2)


def test_an_evaluation_is_said_with_the_bytes_so_far():
    reporter, said, _ = make()
    reporter.step(Step(), 1.0, 1)
    reporter.evaluated("accuracy", {"accuracy": 0.5})
    assert said[-1] == Evaluation(
        rank=1,
        step=1,
        metric="accuracy",
        scores={"accuracy": 0.5},
        sent_bytes=10,
        received_bytes=20,
    )


def test_a_rank_that_does_not_evaluate_says_nothing_but_leaves_the_pause_out():
    reporter, said, _ = make()
    reporter.step(Step(), 1.0, 1)
    reporter.evaluated("accuracy", {})
    assert not any(isinstance(event, Evaluation) for event in said)
    reporter.step(Step(), 1.0, 1)
    assert said[-1].timed_steps == 0


def test_a_pause_for_evaluation_is_no_reason_to_speak_after_a_single_step():
    reporter, said, clock = make(every_s=10.0)
    reporter.step(Step(), 1.0, 1)
    clock.now_s += 60.0
    reporter.evaluated("accuracy", {"accuracy": 0.5})
    clock.now_s += 1.0
    reporter.step(Step(), 1.0, 1)
    assert [event.step for event in said if isinstance(event, Progress)] == [1]


def test_it_says_that_an_evaluation_comes_next():
    said, clock = [], Clock()
    due = {3}.__contains__
    reporter = Reporter(said.append, Started(), every_s=10.0, clock=clock, evaluates_after=due)
    for _ in range(4):
        reporter.step(Step(), 1.0, 1)
    assert [(e.step, e.doing) for e in said[1:]] == [(1, "training"), (3, "evaluating")]


def test_the_summary_repeats_the_last_numbers_and_scores():
    reporter, _, clock = make()
    reporter.step(Step(), 1.5, 8)
    reporter.evaluated("accuracy", {"accuracy": 0.25})
    clock.now_s += 2.0
    summary = reporter.summary()
    assert (summary.rank, summary.world_size, summary.task, summary.recipe) == (1, 2, "t", "r")
    assert (summary.step, summary.samples, summary.loss) == (1, 8, 1.5)
    assert (summary.metric, summary.scores) == ("accuracy", {"accuracy": 0.25})
    assert summary.elapsed_s == 2.0

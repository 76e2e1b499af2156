"""The board: workers' events put together, and the job's numbers from them."""

from __future__ import annotations

import json

import pytest

from psq_worker.board import Board
from psq_worker.events import PHASES, Evaluation, Progress, Started, Summary


def progress(rank=0, step=10, **fields):
    return Progress(rank=rank, step=step, steps=100, numel=1000, **fields)


def summary(rank=0, **fields):
    plain = {
        "world_size": 2,
        "task": "t",
        "recipe": "r",
        "step": 100,
        "loss": 1.0,
        "samples": 800,
        "elapsed_s": 4.0,
        "sent_bytes": 50_000,
        "received_bytes": 12_500,
        "numel": 1000,
        "timed_steps": 50,
        "phases_s": dict.fromkeys(PHASES, 1.0),
        "exposed_s": 0.5,
    }
    return Summary(rank=rank, **{**plain, **fields})


def filled():
    board = Board(2)
    board.add(summary(0, metric="accuracy", scores={"accuracy": 0.75}), 0.0)
    board.add(summary(1, loss=3.0, elapsed_s=5.0), 0.0)
    return board


def test_the_job_is_as_far_as_its_slowest_worker():
    board = Board(2)
    board.add(progress(0, 10), 0.0)
    assert (board.step, board.steps, board.numel) == (0, 100, 1000)
    board.add(progress(1, 7), 0.0)
    assert board.step == 7


def test_a_rank_outside_the_job_is_ignored():
    board = Board(1)
    board.add(progress(5), 0.0)
    assert board.step == 0


def test_a_rate_is_that_of_the_time_between_two_words():
    board = Board(1)
    board.add(progress(step=1, samples=100, elapsed_s=0.001), 0.0)
    assert board.samples_per_s == 0.0
    board.add(progress(step=2, samples=200, elapsed_s=1.001), 0.0)
    assert board.samples_per_s == pytest.approx(100.0)
    board.add(progress(step=3, samples=500, elapsed_s=2.001), 0.0)
    assert 100.0 < board.samples_per_s < 300.0


def test_the_end_of_a_script_says_how_far_it_came_and_keeps_the_rate():
    board = Board(1)
    board.add(progress(step=1, elapsed_s=0.5), 0.0)
    board.add(progress(step=2, samples=100, elapsed_s=1.5), 0.0)
    board.add(summary(step=2, samples=100, elapsed_s=9.0), 0.0)
    assert (board.step, board.samples_per_s) == (2, 100.0)
    board.add(summary(step=3, samples=200, elapsed_s=2.5, sent_bytes=7), 0.0)
    assert (board.step, board.steps, board.ranks[0].progress.sent_bytes) == (3, 100, 7)
    assert board.ranks[0].state(0.0) == "done"


def test_a_worker_waits_until_it_speaks_again():
    board = Board(2)
    board.add(progress(1), 0.0)
    board.waits(1, "waiting for rank 0 for 5 s")
    assert board.ranks[1].state(5.0) == "waiting for rank 0 for 5 s"
    board.add(progress(1, 11), 5.0)
    assert board.ranks[1].state(5.0) == "training"


def test_saved_bytes_are_what_fp32_both_ways_would_have_taken_more():
    board = Board(2)
    board.add(progress(0, 10, sent_bytes=300, received_bytes=700), 0.0)
    assert board.saved_bytes == 2 * 4 * 1000 * 10 - 1000


@pytest.mark.parametrize(
    ("events", "now_s", "state"),
    [
        ([], 9.0, "starting"),
        ([Started()], 1.0, "joining"),
        ([Started()], 9.0, "joining 9 s"),
        ([progress()], 1.0, "training"),
        ([progress()], 12.4, "quiet 12 s"),
        ([progress(), summary()], 60.0, "done"),
    ],
)
def test_a_worker_is_described_by_what_it_said_last_and_when(events, now_s, state):
    board = Board(1)
    for event in events:
        board.add(event, 0.0)
    assert board.ranks[0].state(now_s) == state


def test_a_point_covers_the_steps_since_the_one_before():
    board = Board(1)
    board.add(progress(step=4, loss=2.0, sent_bytes=40), 0.0)
    board.add(progress(step=10, loss=1.0, sent_bytes=100), 0.0)
    board.add(progress(step=10, loss=1.0, sent_bytes=100), 0.0)
    assert [(p.step, p.steps, p.loss, p.sent_bytes) for p in board.points] == [
        (4, 4, 2.0, 40),
        (10, 6, 1.0, 100),
    ]


def test_evaluations_are_kept_in_order():
    board = Board(2)
    for step in (1, 2):
        board.add(Evaluation(step=step, metric="m", scores={"m": 0.5}), 0.0)
    assert [evaluation.step for evaluation in board.evaluations] == [1, 2]


def test_a_job_that_ended_nowhere_has_no_summary():
    assert Board(2).summary() == {}


def test_the_summary_counts_samples_of_all_and_means_of_bytes():
    job = filled().summary()
    assert (job["task"], job["recipe"], job["workers"], job["steps"]) == ("t", "r", 2, 100)
    assert (job["samples"], job["elapsed_s"]) == (1600, 5.0)
    assert (job["loss"], job["metric"], job["score"]) == (2.0, "accuracy", 0.75)
    assert (job["wire"]["sent_bytes"], job["wire"]["received_bytes"]) == (50_000, 12_500)


def test_the_loss_is_the_mean_of_the_last_tenth_of_the_steps():
    board = Board(1)
    for step, loss in ((80, 9.0), (94, 3.0), (100, 1.0)):
        board.add(progress(step=step, loss=loss), 0.0)
    board.add(summary(loss=1.0), 0.0)
    assert board.summary()["loss"] == pytest.approx((4 * 3.0 + 6 * 1.0) / 10)


def test_bits_of_what_was_said_count_payloads_alone():
    assert filled().summary()["payload_bits"] is None
    board = Board(2)
    for rank, nbytes in ((0, 500), (1, 1500)):
        board.add(summary(rank, payload_bytes=nbytes, said_numel=2000), 0.0)
    assert board.summary()["payload_bits"] == 4.0


def test_the_curve_of_bits_has_the_mean_of_all_workers_by_steps():
    board = Board(2)
    for rank in (0, 1):
        for step, nbytes in ((40, 1000), (80, 1500), (100, 1500)):
            said = {"payload_bytes": nbytes + 100 * rank, "said_numel": 10 * step}
            board.add(progress(rank, step, loss=1.0, **said), 0.0)
    board.add(summary(0), 0.0)
    curve = board.summary()["bits_curve"]
    assert curve == [
        {"step": 40, "bits": pytest.approx(8 * 2100 / 800)},
        {"step": 80, "bits": pytest.approx(8 * 1000 / 800)},
        {"step": 100, "bits": 0.0},
    ]
    assert json.loads(json.dumps(curve)) == curve


def test_bits_per_parameter_are_those_of_the_wire():
    wire = filled().summary()["wire"]
    assert (wire["bits_per_parameter_up"], wire["bits_per_parameter_down"]) == (4.0, 1.0)
    assert (wire["compression_ratio_up"], wire["compression_ratio_down"]) == (8.0, 32.0)
    assert wire["compression_ratio"] == pytest.approx(64 / 5)


def test_a_step_is_split_into_its_phases():
    step_s = filled().summary()["step_s"]
    assert step_s["compute"] == 2.0 / 100
    assert step_s["total"] == pytest.approx(0.1)
    assert filled().summary()["samples_per_s"] == pytest.approx(16 / 0.1)


def test_the_summary_says_servers_exposed_waits_and_staleness():
    board = Board(2, servers=4)
    board.add(summary(0, consistency="ssp:2", staleness_sum=30, staleness_max=2), 0.0)
    board.add(
        summary(1, consistency="ssp:2", staleness_sum=10, staleness_max=1, exposed_s=1.5), 0.0
    )
    job = board.summary()
    assert (job["servers"], job["consistency"]) == (4, "ssp:2")
    assert job["exposed_s"] == pytest.approx(2.0 / 100)
    assert job["staleness"] == {"mean": 40 / 200, "max": 2}
    assert filled().summary()["servers"] == 1
    assert filled().summary()["staleness"] == {"mean": 0.0, "max": 0}


def test_what_is_exposed_now_is_that_of_the_last_steps():
    board = Board(2)
    assert board.exposed_s is None
    board.add(progress(0, 1, timed_steps=0, exposed_s=0.0), 0.0)
    assert board.exposed_s is None
    board.add(progress(0, 3, timed_steps=2, exposed_s=0.2), 0.0)
    board.add(progress(0, 7, timed_steps=6, exposed_s=0.3), 0.0)
    assert board.exposed_s == pytest.approx(0.1 / 4)
    board.add(progress(1, 3, timed_steps=2, exposed_s=0.15), 0.0)
    assert board.exposed_s == pytest.approx((0.025 + 0.075) / 2)


def test_the_rule_of_a_job_is_what_its_workers_say():
    board = Board(2)
    assert board.consistency == "bsp"
    board.add(Started(rank=1, consistency="asp"), 0.0)
    assert board.consistency == "asp"


def test_a_process_alone_has_no_server():
    board = Board(1, alone=True)
    board.add(Summary(step=1), 0.0)
    assert board.summary()["servers"] == 0


def test_a_job_without_bytes_or_steps_divides_by_nothing():
    board = Board(1)
    board.add(Summary(), 0.0)
    job = board.summary()
    assert job["wire"]["compression_ratio"] == 0.0
    assert job["step_s"]["total"] == 0.0

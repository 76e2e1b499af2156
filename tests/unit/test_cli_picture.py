"""The picture: lines from a board, drawn without a display."""

from __future__ import annotations

import numpy as np
import pytest

from psq_worker.board import Board
from psq_worker.events import Evaluation, Progress
from psq_worker.picture import BINS, curve_of, draw


def filled(steps=600, ranks=2, *, scored=True):
    board = Board(ranks)
    for step in range(10, steps + 1, 10):
        for rank in range(ranks):
            board.add(
                Progress(rank=rank, step=step, loss=1.0 + rank, sent_bytes=1000 * step, numel=10),
                0.0,
            )
    if scored:
        for step in (steps // 2, steps):
            scores = {"accuracy": step / steps, "val_loss": 1.0}
            board.add(
                Evaluation(step=step, metric="accuracy", scores=scores, sent_bytes=1000 * step), 0.0
            )
    return board


def test_losses_are_means_over_all_ranks_and_equal_ranges_of_steps():
    curve = curve_of("psq", filled())
    assert len(curve.losses) == BINS
    assert set(curve.losses) == {1.5}
    assert curve.loss_steps[0] == 10
    assert curve.loss_bytes[-1] == 1000 * curve.loss_steps[-1]


def test_a_point_counts_by_the_steps_behind_it():
    board = Board(1)
    for step, loss in ((BINS, 0.0), (BINS + 1, 4.0), (BINS + 4, 2.0), (4 * BINS, 0.0)):
        board.add(Progress(step=step, loss=loss), 0.0)
    # The second and third point fall into ranges of four steps each: 61 into one, 64 as well.
    assert curve_of("psq", board).losses[1] == (4.0 * 1 + 2.0 * 3) / 4


def test_scores_are_those_of_the_metric_that_counts():
    curve = curve_of("psq", filled())
    assert (curve.metric, curve.scores) == ("accuracy", (0.5, 1.0))
    assert (curve.score_steps, curve.score_bytes) == ((300.0, 600.0), (300_000.0, 600_000.0))


@pytest.mark.parametrize("scored", [True, False])
def test_a_picture_is_drawn_even_where_nothing_was_scored(tmp_path, scored):
    path = tmp_path / "new" / "demo.png"
    board = filled(scored=scored)
    draw(path, "title", "subtitle", curve_of("psq", board), curve_of("plain", board))
    assert path.read_bytes().startswith(b"\x89PNG")


def said_in(bits_of_step):
    """A board of a worker whose values took so many bits, ten steps at a time."""
    board, payload_bytes = Board(1), 0
    for step in range(10, 601, 10):
        payload_bytes += 10 * 1000 * bits_of_step(step) // 8
        board.add(
            Progress(step=step, loss=1.0, payload_bytes=payload_bytes, said_numel=1000 * step), 0.0
        )
    return board


def test_bits_are_those_of_the_values_said_in_a_range_of_steps():
    curve = curve_of("psq", said_in(lambda step: 8 if step <= 300 else 2))
    assert curve.bits == (8.0,) * 30 + (2.0,) * 30
    assert curve.bits_steps == curve.loss_steps
    assert curve_of("psq", filled()).bits == ()


def test_bits_are_drawn_below_where_they_change(tmp_path):
    sizes = {}
    for name, bits in (("constant", lambda _: 4), ("changing", lambda step: 2 + 2 * (step > 300))):
        path, curve = tmp_path / f"{name}.png", curve_of("psq", said_in(bits))
        draw(path, "title", "subtitle", curve, curve_of("plain", filled()))
        sizes[name] = np.frombuffer(path.read_bytes()[16:24], ">u4").tolist()
    assert sizes["changing"][0] == sizes["constant"][0]
    assert sizes["changing"][1] > sizes["constant"][1]


def test_a_job_that_said_nothing_can_be_drawn(tmp_path):
    empty = curve_of("psq", Board(1))
    draw(tmp_path / "demo.png", "title", "subtitle", empty, empty)
    assert (tmp_path / "demo.png").exists()

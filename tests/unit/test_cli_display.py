"""The display: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from psq_worker.board import Board
from psq_worker.display import (
    LiveView,
    PlainView,
    QuietView,
    format_bytes,
    format_ms,
    format_score,
    format_seconds,
    make_view,
    plain_line,
)
from psq_worker.events import Evaluation, Progress, Started, Summary


class Clock:
    now_s = 50.0

    def __call__(self):
        return self.now_s


def make_console(*, terminal, width=110):
    return Console(
        file=io.StringIO(),
        force_terminal=terminal,
        width=width,
        color_system=None,
        legacy_windows=False,
    )


def filled(step=40, *, alone=False):
    board = Board(1 if alone else 2, alone=alone)
    for rank in range(1 if alone else 2):
        board.add(Started(rank=rank, world_size=2), 50.0)
        for moment in (1, step):
            progress = Progress(
                rank=rank,
                step=moment,
                steps=100,
                loss=0.5 + rank,
                samples=32 * moment,
                elapsed_s=0.1 * moment,
                sent_bytes=100 * moment,
                received_bytes=50 * moment,
                numel=1_000_000,
            )
            board.add(progress, 50.0)
    return board


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (81_300_000, "81.3 MB"),
        (999_600, "1.0 MB"),
        (127_000_000, "127 MB"),
        (2.94e9, "2.9 GB"),
        (5.5e12, "5.5 TB"),
    ],
)
def test_bytes_are_written_with_decimal_units(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (6.6, "0:07"), (151, "2:31"), (3751, "1:02:31")]
)
def test_seconds_are_written_as_a_clock(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.0, "0.00 ms"), (0.0099949, "9.99 ms"), (0.0125, "12.5 ms"), (0.3, "300 ms")],
)
def test_short_times_are_written_in_milliseconds(seconds, text):
    assert format_ms(seconds) == text


def exposed_board(rule="bsp"):
    board = filled()
    for rank in range(2):
        board.add(Started(rank=rank, consistency=rule), 50.0)
        board.add(Progress(rank=rank, step=40, timed_steps=4, exposed_s=0.05), 50.0)
        board.add(Progress(rank=rank, step=44, timed_steps=8, exposed_s=0.1, staleness_max=2), 50.0)
    return board


def test_a_plain_line_says_what_is_exposed_and_how_far_workers_were_apart():
    assert "  12.5 ms exposed" in plain_line(exposed_board())
    assert "stale" not in plain_line(exposed_board())
    assert "  2 rounds stale at most" in plain_line(exposed_board("ssp:3"))


@pytest.mark.parametrize(("width", "shown"), [(110, True), (80, False)])
def test_the_live_view_shows_what_is_exposed_where_there_is_room(width, shown):
    console, clock = make_console(terminal=True, width=width), Clock()
    with LiveView(console, "", clock=clock) as view:
        view.refresh(exposed_board())
    text = console.file.getvalue()
    assert ("exposed" in text) == shown
    assert ("12.5 ms" in text) == shown
    assert "training" in text


def test_an_accuracy_is_written_in_percent_and_any_other_score_as_it_is():
    assert format_score("accuracy", 0.87654) == "87.65 %"
    assert format_score("val_loss", 1.5) == "1.5000"


def test_a_plain_line_holds_step_loss_rate_and_savings():
    assert plain_line(filled()) == ("step 40/100  loss 1.0000  640 samples/s  640 MB saved")


def test_a_rate_that_is_not_known_yet_is_left_out():
    board = Board(1)
    board.add(Progress(step=1, steps=9, loss=1.0, samples=64), 50.0)
    assert plain_line(board) == "step 1/9  loss 1.0000"


def test_a_plain_line_ends_with_the_last_scores():
    board = filled()
    board.add(Evaluation(step=30, metric="accuracy", scores={"accuracy": 0.8}), 50.0)
    assert plain_line(board).endswith("accuracy 80.00 % at step 30")


def test_nothing_is_saved_by_a_process_that_sends_nothing():
    assert "saved" not in plain_line(filled(alone=True))


def test_the_plain_view_speaks_every_few_seconds_and_once_more_at_the_end():
    console, clock = make_console(terminal=False), Clock()
    with PlainView(console, "the title", every_s=5.0, clock=clock) as view:
        for seconds in range(12):
            clock.now_s = 50.0 + seconds
            view.refresh(filled(10 + seconds))
        view.say("rank 0", "hello")
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "the title"
    assert [line.split()[1] for line in lines if line.startswith("step")] == [
        "15/100",
        "20/100",
        "21/100",
    ]
    assert "rank 0 | hello" in lines


def test_the_plain_view_does_not_repeat_a_step():
    console, clock = make_console(terminal=False), Clock()
    with PlainView(console, "", every_s=1.0, clock=clock) as view:
        for _ in range(5):
            clock.now_s += 2.0
            view.refresh(filled(10))
    assert console.file.getvalue().count("step 10/100") == 1


def test_the_plain_view_ends_with_the_last_scores_even_if_no_step_was_made_since():
    console, clock = make_console(terminal=False), Clock()
    board = filled(10)
    with PlainView(console, "", every_s=1.0, clock=clock) as view:
        clock.now_s += 2.0
        view.refresh(board)
        board.add(Evaluation(step=10, metric="accuracy", scores={"accuracy": 0.8}), 50.0)
        view.refresh(board)
    assert console.file.getvalue().splitlines()[-1].endswith("accuracy 80.00 % at step 10")


def test_the_live_view_shows_every_worker_the_bar_and_what_was_said():
    console, clock = make_console(terminal=True), Clock()
    with LiveView(console, "the title", clock=clock) as view:
        clock.now_s += 1.0
        view.refresh(filled())
        view.say("rank 1", "\x1b[31mred words\x1b[0m")
    text = console.file.getvalue()
    for part in ("the title", "rank 0", "rank 1", "40/100", "4.0 kB", "2.0 kB", "320 MB", "320"):
        assert part in text
    assert "40%" in text
    assert "rank 1 | red words" in text
    assert "0:01 elapsed, 0:06 left" in text


def test_the_live_view_is_redrawn_a_few_times_a_second_at_most():
    console, clock = make_console(terminal=True), Clock()
    with LiveView(console, "the title", clock=clock) as view:
        for _ in range(100):
            clock.now_s += 0.01
            view.refresh(filled())
    assert console.file.getvalue().count("the title") < 15


def test_a_script_of_unknown_length_has_no_bar():
    console, clock = make_console(terminal=True), Clock()
    board = Board(1)
    board.add(Progress(step=5), 50.0)
    with LiveView(console, "", clock=clock) as view:
        view.refresh(board)
    assert "%" not in console.file.getvalue()


def test_a_single_process_has_no_wire():
    console, clock = make_console(terminal=True), Clock()
    with LiveView(console, "", clock=clock) as view:
        view.refresh(filled(alone=True))
    assert "process" in console.file.getvalue()
    assert "received" not in console.file.getvalue()


def test_a_worker_that_ended_is_done():
    console, clock = make_console(terminal=True), Clock()
    board = filled()
    board.add(Summary(rank=0), 50.0)
    with LiveView(console, "", clock=clock) as view:
        view.refresh(board)
    assert "done" in console.file.getvalue()


def test_markup_in_what_a_process_says_is_left_as_it_is():
    console = make_console(terminal=False)
    PlainView(console, "").say("rank 0", "shape [3, 4] [/bold]")
    assert console.file.getvalue() == "rank 0 | shape [3, 4] [/bold]\n"


def test_the_view_fits_the_stream(monkeypatch):
    assert isinstance(make_view("", quiet=True), QuietView)
    assert isinstance(make_view(""), PlainView)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(make_view(""), LiveView)


def test_the_quiet_view_passes_on_what_processes_say_only(capsys):
    with QuietView() as view:
        view.refresh(filled())
        view.say("", "our own words")
        view.say("rank 0", "a warning")
    assert capsys.readouterr().err == "rank 0 | a warning\n"

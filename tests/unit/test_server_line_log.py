from __future__ import annotations

import io

import pytest

from psq_server.line_log import BURST, LINES_PER_S, LineLog


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def stream():
    return io.StringIO()


@pytest.fixture
def log(stream, clock):
    return LineLog(stream, wall=lambda: 0.0, clock=clock)


def test_a_log_line_is_an_event_and_its_fields(log, stream):
    log.write("info", "joined", {"rank": 0, "host": "node-1", "waited_s": 0.25})
    assert stream.getvalue() == (
        "1970-01-01T00:00:00Z info event=joined rank=0 host=node-1 waited_s=0.25\n"
    )


@pytest.mark.parametrize(
    ("value", "written"),
    [("two words", '"two words"'), ("a=b", '"a=b"'), ("", '""'), ("line\nbreak", '"line\\nbreak"')],
)
def test_a_value_that_could_be_misread_is_quoted(log, stream, value, written):
    log.write("info", "e", {"text": value})
    assert stream.getvalue().endswith(f" text={written}\n")
    assert stream.getvalue().count("\n") == 1


def test_a_flood_of_lines_is_cut_and_counted(log, stream, clock):
    for _ in range(int(BURST) + 50):
        log.write("warning", "refused", {})
    assert stream.getvalue().count("\n") == BURST
    clock.now_s += 1 / LINES_PER_S
    log.write("warning", "refused", {})
    assert stream.getvalue().endswith("event=refused suppressed_lines=50\n")


def test_a_broken_stderr_breaks_nothing(clock):
    stream = io.StringIO()
    stream.close()
    LineLog(stream, clock=clock).write("info", "e", {})

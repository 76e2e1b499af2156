"""Events: one JSON line each, and anything else is a user's own output."""

from __future__ import annotations

import json

import pytest

from psq_worker.events import (
    MAX_LINE_CHARS,
    Evaluation,
    Progress,
    Started,
    Summary,
    format_event,
    parse_event,
)

EVENTS = [
    Started(rank=1, world_size=2, task="t", recipe="r", steps=10, numel=7, text="words"),
    Progress(rank=1, step=3, loss=0.5, phases_s={"compute": 1.5}),
    Evaluation(rank=0, step=3, metric="accuracy", scores={"accuracy": 0.5}),
    Summary(rank=0, scores={"accuracy": 0.5}),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_an_event_survives_its_line(event):
    line = format_event(event)
    assert "\n" not in line
    assert parse_event(line) == event


@pytest.mark.parametrize(
    "line",
    [
        "",
        "epoch 3",
        '{"loss": 3}',
        '{"psq":"unheard-of"}',
        '{"psq":"progress","unknown":1}',
        '{"psq":"progress"',
        '{"psq":["progress"]}',
        '{"psq":"progress","rank":"one"}',
        '{"psq":"progress","step":null}',
        '{"psq":"progress","phases_s":{"compute":"long"}}',
        '{"psq":"summary","scores":[]}',
        '{"psq":"progress","step":' + "1" * MAX_LINE_CHARS + "}",
    ],
)
def test_any_other_line_is_no_event(line):
    assert parse_event(line) is None


def test_a_line_says_what_it_is_first():
    assert next(iter(json.loads(format_event(Progress())))) == "psq"

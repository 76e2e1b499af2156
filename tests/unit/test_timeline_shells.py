"""What a worker and a server record, and how they find each other's clock."""

import time
from collections import defaultdict
from itertools import pairwise

import pytest
import torch

from psq.timeline import NOWHERE, Phase, Timeline
from psq.trace import merge

STEPS = 4
SKEW_S = 5000.0


class Listener:
    """Keeps what an observer is told."""

    def __init__(self):
        self.steps_s, self.phases_s = [], defaultdict(list)

    def observe_step(self, duration_s):
        self.steps_s.append(duration_s)

    def observe_phase(self, phase, duration_s):
        self.phases_s[phase].append(duration_s)

    def observe_staleness(self, steps):
        assert steps == 0


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(6)))


def train(worker, model, steps=STEPS):
    for _ in range(steps):
        model(torch.ones(2, 512)).square().mean().backward()
        assert worker.step().applied
    worker.close()


def spans_of(recorder):
    found = defaultdict(list)
    for span in recorder.spans():
        found[span.phase].append(span)
    return found


def said(spans, *, rounds=STEPS):
    """(shard, round) of spans that belong to a round."""
    return sorted((span.shard, span.round) for span in spans if 0 <= span.round < rounds)


def test_a_server_records_every_shard_of_every_round(serve, join):
    recorder = Timeline()
    server, model = serve(timeline=recorder), make_model()
    worker = join(model, connect=server.endpoint)
    shards = len(worker.plan.layout.shards)
    train(worker, model)
    server.wait()
    spans = spans_of(recorder)
    every = sorted((shard, step) for shard in range(shards) for step in range(STEPS))
    for phase in (Phase.RECEIVE, Phase.REDUCE, Phase.BROADCAST):
        assert said(spans[phase]) == every
        assert all(span.nbytes > 0 for span in spans[phase])
    assert {span.rank for span in spans[Phase.RECEIVE]} == {0}
    assert spans[Phase.WAIT]
    for phase in spans.values():  # one thread: what is in a row comes one after another
        assert all(a.end_s <= b.start_s for a, b in pairwise(phase))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_worker_records_every_shard_of_every_round(serve, join, tmp_path, monkeypatch, overlap):
    monkeypatch.setenv("PSQ_TIMELINE_FILENAME", str(tmp_path / "t.json"))
    model = make_model()
    worker = join(model, connect=serve().endpoint, overlap=overlap)
    shards, recorder = len(worker.plan.layout.shards), worker._timeline
    train(worker, model)
    spans = spans_of(recorder)
    every = sorted((shard, step) for shard in range(shards) for step in range(STEPS))
    for phase in (Phase.ENCODE, Phase.PUSH, Phase.DECODE):
        assert said(spans[phase]) == every
        assert all(span.nbytes > 0 for span in spans[phase])
    for phase in (Phase.COMPUTE, Phase.ZERO):
        assert said(spans[phase]) == [(NOWHERE, step) for step in range(STEPS)]
    early = [
        span
        for span in spans[Phase.ENCODE]
        if any(c.start_s <= span.start_s and span.end_s <= c.end_s for c in spans[Phase.COMPUTE])
    ]
    assert bool(early) == overlap
    assert (tmp_path / "t.rank0.json").exists()


def test_without_the_setting_nothing_is_recorded_or_written(serve, join, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server, model = serve(), make_model()
    worker = join(model, connect=server.endpoint)
    assert worker._timeline is None
    assert server.loop.timeline is None
    train(worker, model)
    assert not list(tmp_path.iterdir())


def test_local_steps_have_a_row_of_their_own(serve, join, tmp_path, monkeypatch):
    monkeypatch.setenv("PSQ_LOCAL_STEPS", "2")
    monkeypatch.setenv("PSQ_TIMELINE_FILENAME", str(tmp_path / "t.json"))
    model = make_model()
    worker = join(model, connect=serve().endpoint, recipe="local-adam")
    recorder = worker._timeline
    for _ in range(4):
        model(torch.ones(2, 512)).square().mean().backward()
        worker.step()
    worker.close()
    spans = spans_of(recorder)
    assert [span.round for span in spans[Phase.LOCAL]] == [0, 1]
    assert [span.round for span in spans[Phase.COMPUTE]] == [0, 0, 1, 1]


def test_a_skewed_server_is_moved_to_its_place(serve, join, tmp_path, monkeypatch):
    """The offset that the worker measures is right within half the round trip it says."""
    monkeypatch.setenv("PSQ_TIMELINE_FILENAME", str(tmp_path / "t.json"))
    model = make_model()
    server = serve(clock=lambda: time.monotonic() + SKEW_S)
    worker = join(model, connect=server.endpoint)
    train(worker, model)
    [offset] = worker._client.clock_offsets
    assert abs(offset.offset_s - SKEW_S) <= 0.5 * offset.round_trip_s
    assert offset.round_trip_s < 10.0
    assert merge([tmp_path / "t.rank0.json"], tmp_path / "t.json") > 0


def test_prometheus_hears_of_every_phase_of_every_round_and_of_no_second_twice(serve, join):
    listener, model = Listener(), make_model()
    began_s = time.monotonic()
    server = serve(observer=listener)
    worker = join(model, connect=server.endpoint)
    train(worker, model)
    server.wait()
    lasted_s = time.monotonic() - began_s
    assert len(listener.steps_s) == STEPS
    assert set(listener.phases_s) == {"wait", "receive", "reduce", "send"}
    for phase, durations_s in listener.phases_s.items():
        assert len(durations_s) == STEPS, phase
        if phase != "wait":
            assert min(durations_s) > 0.0, phase
    assert sum(map(sum, listener.phases_s.values())) <= lasted_s

"""The loop around the machine, over a link that is two lists: what it sends, and what it keeps."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest

from psq import layout
from psq.codec import get_codec
from psq.link import Sent
from psq.presets import preset
from psq.recipe import Aggregate
from psq_proto.frames import HEADER_BYTES, decode_frame
from psq_proto.messages import Bye, Flags, MessageType, Verdict
from psq_server.line_log import LineLog
from psq_server.loop import Loop
from psq_server.state import ServerState, Settings

RUN_ID = bytes(range(16))
ROUNDS = 20


class Line:
    """A link without a network: what is put into `came` is drained, what is sent is delivered."""

    def __init__(self, shell):
        self.shell = shell
        self.came, self.full, self.lent = [], set(), []
        self.sent_bytes = self.received_bytes = 0
        self.keeps_lent = 0

    def watch(self, fd):
        pass

    def wait(self, _):
        return bool(self.came)

    key = None

    def notes(self):
        return []

    def drain(self, limit):
        taken, self.came = self.came[:limit], self.came[limit:]
        yield from taken

    def ended(self):
        return []

    def is_lent(self, frame):
        return any(lent is frame for lent in self.lent)

    def send(self, peer, frame, *, lend=False):  # noqa: ARG002 - as it likes
        if peer in self.full:
            return Sent.FULL
        if self.keeps_lent:
            self.lent = [*self.lent, frame][-self.keeps_lent :]
        self.shell.deliver(peer, bytes(frame))
        return Sent.QUEUED


class Quiet:
    """Nobody's wishes, and nobody who wants to know."""

    fd = -1
    stale = ()

    def take(self):
        return None

    def observe_step(self, duration_s):
        pass

    def observe_phase(self, phase, duration_s):
        pass

    def observe_staleness(self, steps):
        self.stale = (*self.stale, steps)


class Shell:
    """A server's loop with scripted workers; stands in their `cluster`."""

    def __init__(self, plan, worker):
        self.now_s = 100.0
        self.plan, self.peers, self.replicas, self.headers = plan, {}, {}, []
        self.line, self.quiet, self.log = Line(self), Quiet(), io.StringIO()
        self.state = ServerState(Settings(RUN_ID), self.now_s)
        self.loop = Loop(
            self.line,
            self.state,
            log=LineLog(self.log),
            signals=self.quiet,
            observer=self.quiet,
            save=None,
            clock=lambda: self.now_s,
        )
        self._worker = worker

    @property
    def version(self):
        return self.state._world.version

    @property
    def weights(self):
        return self.loop._weights

    def connect(self, rank):
        name = b"peer-%d" % rank
        self.peers[name] = self._worker(self, name, rank, self.plan)
        self.replicas[name] = []
        return self.peers[name]

    def started(self):
        workers = [self.connect(rank) for rank in range(self.plan.world_size)]
        for worker in workers:
            worker.join(lineage=10 + worker.rank)
        workers[0].init()
        for worker in workers:
            worker.pull()
        return workers

    def frame(self, name, frame):
        self.line.came.append((name, memoryview(bytes(frame))))
        self.turn()

    def pass_time(self, seconds):
        self.now_s += seconds

    def turn(self):
        self.loop._turn()
        self.state.validate()

    def deliver(self, name, frame):
        header = decode_frame(frame).header
        if header.type is MessageType.WEIGHTS:
            self.replicas[name].append((header.version, header.shard, header.part, header.flags))
            self.headers.append(header)
        self.peers[name].deliver(frame)


@pytest.fixture
def shell(monkeypatch, worker_kind, plan_of):
    monkeypatch.setattr(layout, "MAX_SHARD_NUMEL", 64)
    specs = [(f"w{i}", (64,)) for i in range(3)]

    def make(**settings):
        world_size = settings.pop("world_size", 2)
        return Shell(plan_of(world_size, specs=specs, **settings), worker_kind)

    return make


def test_a_worker_gets_every_shard_whole_and_then_what_each_round_adds(shell):
    job = shell()
    first, second = job.started()
    for worker in (first, second):
        worker.push_all()
    full = [(0, shard, 0, Flags.FULL) for shard in range(3)]
    added = [(1, shard, 0, Flags.DELTA) for shard in range(3)]
    assert list(job.replicas.values()) == [full + added] * 2


@pytest.mark.parametrize("keeps_lent", [0, 3])
def test_after_the_first_rounds_no_new_buffer_is_made(shell, keeps_lent):
    job = shell()
    workers = job.started()
    job.line.keeps_lent = keeps_lent
    made = []
    for number in range(ROUNDS):
        for worker in workers:
            worker.push_all(number)
        made.append(job.weights.buffers)
    assert made[3] == made[-1] <= 3 * 3


def test_a_buffer_that_somebody_still_waits_for_is_not_written_to(shell):
    job = shell(consistency="asp")
    first, second = job.started()
    job.line.full = {second.name}
    first.push_all()
    first.push_all()
    job.line.full = set()
    job.turn()
    news = [(v, s) for v, s, _, flags in job.replicas[second.name] if flags == Flags.DELTA]
    assert news == [(v, s) for v in (1, 2) for s in range(3)], "whole frames, each its version's"


def test_whole_weights_are_made_only_as_the_reader_takes_them(shell):
    job = shell()
    first, second = job.started()
    second_before = len(job.replicas[second.name])
    job.line.full = {second.name}
    second.pull()
    for worker in (first,):
        worker.push_all()
    second.push_all(0)
    assert job.version == 1
    job.line.full = set()
    job.turn()
    assert job.replicas[second.name][second_before:] == [
        (0, 0, 0, Flags.FULL),
        (1, 0, 0, Flags.DELTA),
        (1, 1, 0, Flags.FULL),
        (1, 2, 0, Flags.FULL),
    ], "the shards that were not made yet come as they are when their turn comes"


def test_the_observer_is_told_how_stale_contributions_were(shell):
    job = shell(consistency="asp")
    first, second = job.started()
    first.push_all(0)
    second.push_all(0)
    assert job.quiet.stale == (0, 1)


def test_a_server_that_fails_tells_its_workers_before_it_ends(shell, monkeypatch):
    job = shell()
    first, second = job.started()

    def fail(*_):
        msg = "no such kernel"
        raise RuntimeError(msg)

    monkeypatch.setattr(job.weights.reducer, "step", fail)
    monkeypatch.setattr(
        "psq_server.loop.time.sleep", lambda s: setattr(job, "now_s", job.now_s + s)
    )
    first.push_all()
    frame = second.session.send(MessageType.PUSH, second.payload(0), codec=0x100, rate=0.1, shard=0)
    job.line.came.append((second.name, memoryview(frame)))
    with pytest.raises(RuntimeError, match="no such kernel"):
        job.loop.run()
    for worker in (first, second):
        bye = worker.take(Bye)[0]
        assert (bye.reason, bye.text) == (
            "failed",
            "the server failed: RuntimeError: no such kernel",
        )
        assert not worker.take(Verdict)
    assert "event=failed" in job.log.getvalue()


def test_a_probe_is_echoed_and_changes_nothing(shell):
    job = shell()
    worker = job.connect(0)
    worker.hello()
    probe = worker.session.send(MessageType.PROBE, bytes(range(200)), seq=5, part=100)
    job.frame(worker.name, probe)
    echo = worker.heard[-1]
    assert (echo.header.type, echo.header.seq) == (MessageType.ECHO, 5)
    assert bytes(echo.body) == bytes(range(100))
    assert not job.state._world.members


def test_an_echo_is_not_queued_for_who_does_not_read(shell):
    job = shell()
    worker = job.connect(0)
    worker.hello()
    job.line.full = {worker.name}
    for _ in range(100):
        job.frame(worker.name, worker.session.send(MessageType.PROBE, bytes(1000), part=1000))
    assert job.loop.dropped_frames == 100
    assert len(job.peers[worker.name].heard) == 1
    assert HEADER_BYTES == 100


# ---- recipes by rules


def test_a_mean_goes_out_with_the_rate_to_apply_it_with(shell):
    job = shell(recipe=preset("sign-majority"))
    for worker in job.started():
        worker.push_all(rate=0.25)
    news = [header for header in job.headers if header.version == 1]
    assert {(header.flags, header.rate) for header in news} == {(Flags.MEAN, 0.25)}
    assert {header.codec for header in news} == {get_codec("sign").wire_id}
    assert len(news) == 2 * 3


def test_a_mean_of_nothing_has_no_body(shell):
    job = shell(recipe=preset("sign-majority"))
    for worker in job.started():
        worker.skip()
    news = [header for header in job.headers if header.version == 1]
    assert {header.flags for header in news} == {Flags.MEAN | Flags.SKIP}
    assert {(header.codec, header.rate, header.body_len) for header in news} == {(0, 0.0, 0)}


def test_a_newcomer_gets_the_rules_vectors_as_further_planes(shell):
    recipe = preset("sign-majority").with_options("apply.momentum=0.9")
    job = shell(recipe=recipe)
    for worker in job.started():
        worker.push_all()
    job.headers.clear()
    newer = job.connect(1)
    newer.join(lineage=99)
    newer.pull()
    came = [(h.version, h.shard, h.part, h.flags) for h in job.headers]
    assert came == [(1, shard, plane, Flags.FULL) for shard in range(3) for plane in (0, 1)]


def test_buffers_of_different_codecs_are_used_again_as_well(shell):
    soon = ("uplink.choice.steps=3", "downlink.choice.steps=3")
    job = shell(recipe=preset("onebit-adam").with_options(*soon))
    workers = job.started()
    made = []
    for number in range(ROUNDS):
        codec = get_codec("fp32" if number < 3 else "sign").wire_id
        for worker in workers:
            for shard in range(3):
                body = bytes(256) if number < 3 else worker.payload(shard)
                worker.push(shard, codec=codec, body=body)
        made.append(job.weights.buffers)
    assert job.version == ROUNDS
    assert made[6] == made[-1] <= 3 * 6


def test_a_round_is_judged_by_the_recipes_rule_and_who_is_refused_is_counted(shell):
    recipe = dataclasses.replace(preset("fp32-sgd"), aggregate=Aggregate("krum", (("f", 0),)))
    job = shell(recipe=recipe, world_size=4)
    workers = job.started()
    for worker in workers:
        for shard in range(3):
            scale = 100.0 if worker.rank == 2 else 0.01 * worker.rank
            worker.push(shard, body=np.full(64, scale, np.float32).tobytes())
    outcomes = [v.outcome for worker in workers for v in worker.take(Verdict)]
    assert sorted(outcomes) == ["applied", "rejected", "rejected", "rejected"]
    assert outcomes[2] == "rejected"
    totals = job.loop.totals()
    assert sum(totals.rejected.values()) == 3
    assert totals.rejected[2, "krum"] == 1
    assert "krum" in job.log.getvalue()
    moved = job.weights.reducer.state_arrays()["x"]
    assert np.abs(moved).max() < 0.01

"""The parts of a simulation: time, ports, shared replicas, gradients of many workers at once."""

from __future__ import annotations

import dataclasses
import gc

import numpy as np
import pytest
import torch
from torch import nn

from psq.codec import get_codec
from psq.errors import ConfigError
from psq.layout import cut
from psq_proto.frames import Header
from psq_proto.messages import Flags, MessageType
from psq_worker.simulate import SimConfig, simulate
from psq_worker.simulate.clock import Events
from psq_worker.simulate.gradients import OneByOne, Vectorised
from psq_worker.simulate.network import Port
from psq_worker.simulate.table import Replicas, Table

SPECS = [("a.weight", (4, 3)), ("a.bias", (4,))]


class Lines:
    """Fit a plane; with batch norm or without."""

    name = "lines"
    metric = "error"

    def __init__(self, *, norm=False, widths=(3,)):
        self.norm, self.widths = norm, widths

    def model(self, seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = [nn.Linear(3, 4)]
            layers += [nn.BatchNorm1d(4)] if self.norm else []
            return nn.Sequential(*layers)

    def loss(self, model, batch):
        return (model(batch) - batch.sum(1, keepdim=True)).square().mean()

    def batches(self, *, rank, world_size, batch_size, seed, start_step=0):
        del world_size
        step = start_step
        while True:
            rng = np.random.default_rng([seed, rank, step])
            size = batch_size + (rank if len(self.widths) > 1 else 0)
            yield torch.from_numpy(rng.standard_normal((size, 3), np.float32))
            step += 1

    def evaluate(self, model):
        del model
        return {"error": 0.0}


class Busy:
    """A worker in the middle of a step."""

    def __init__(self, rank, table, task):
        self.rank, self.table, self.made = rank, table, 0
        self._batches = task.batches(rank=rank, world_size=8, batch_size=6, seed=1)

    def next_batch(self):
        return next(self._batches)


def test_things_happen_in_the_order_of_their_time_and_then_of_their_asking():
    events, seen = Events(), []
    for when_s, name in ((2.0, "late"), (1.0, "first"), (1.0, "second"), (-5.0, "now")):
        events.at(when_s, lambda name=name: seen.append((name, events.now_s)))
    while events.turn():
        pass
    assert seen == [("now", 0.0), ("first", 1.0), ("second", 1.0), ("late", 2.0)]


def test_a_port_passes_one_frame_after_another():
    port = Port(8000.0)
    assert [port.passes(now_s, 500) for now_s in (0.0, 0.0, 3.0)] == [0.5, 1.0, 3.5]
    into = Port(8000.0)
    assert into.takes_in(1.0, 500) == 1.0  # came at the rate of the port: nothing to wait for
    assert into.takes_in(1.0, 500) == 1.5


def header(version: int, flags: Flags = Flags.DELTA, codec: int = 1, part: int = 0) -> Header:
    """Of a WEIGHTS frame of shard 0."""
    kind, run_id = MessageType.WEIGHTS, b"r" * 16
    return Header(kind, codec=codec, run_id=run_id, flags=flags, version=version, part=part)


def tables(count: int, *, shared: bool = True) -> list[Table]:
    layout = cut(SPECS, [lambda numel: 4 * numel])
    replicas = Replicas([np.arange(16, dtype=np.float32)], shared=shared)
    return [Table(layout, replicas, apart=False) for _ in range(count)]


def move(table: Table, version: int) -> None:
    table.take(header(version), lambda: [part.__iadd__(1.0) for part in table.weights(0)])


def test_workers_of_the_same_version_share_one_array():
    first, second, third = tables(3)
    move(first, 1)
    assert second.flat[0][0] == 0.0
    move(second, 1)
    assert second.flat[0] is first.flat[0]
    assert third.flat[0][0] == 0.0
    move(first, 2)
    assert (first.flat[0][0], second.flat[0][0]) == (2.0, 1.0)


def test_a_version_goes_with_its_last_holder():
    first, second = tables(2)
    held = first._replicas._held
    move(first, 1)
    move(second, 1)
    move(first, 2)
    gc.collect()
    assert sorted(version for _, version in held) == [1, 2]
    move(second, 2)
    gc.collect()
    assert sorted(version for _, version in held) == [2]


def test_weights_in_parts_are_shared_once_all_of_them_are_there(monkeypatch):
    monkeypatch.setattr("psq_worker.simulate.table.part_count", lambda _: 2)
    first, second = tables(2)
    dense = get_codec("fp32").wire_id
    for part in (0, 0, 1):
        news = header(1, Flags.FULL, codec=dense, part=part)
        assert first._replicas.get(0, 1) is None
        first.take(news, lambda: first.write_part(0, 0, np.ones(16, np.float32)))
    second.take(header(1, Flags.FULL, codec=dense), lambda: pytest.fail("it is there already"))
    assert second.flat[0] is first.flat[0]


def test_where_replicas_have_state_each_worker_decodes_for_itself():
    first, second = tables(2, shared=False)
    move(first, 1)
    move(second, 1)
    assert second.flat[0] is not first.flat[0]
    assert np.array_equal(second.flat[0], first.flat[0])
    assert np.shares_memory(first.whole, first.flat[0])


@pytest.mark.parametrize("apart", [False, True])
def test_gradients_of_many_at_once_are_those_of_each(apart):
    task = Lines()
    model = task.model(0)
    specs = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    layout = cut(specs, [lambda numel: 4 * numel])
    start = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
    seen = []
    for kind in (OneByOne(task, model, layout), Vectorised(task, model, layout, chunk=2)):
        replicas = Replicas([start], shared=True)
        made = [Table(layout, replicas, apart=apart) for _ in range(3)]
        workers = [Busy(rank, table, task) for rank, table in enumerate(made)]
        found = []
        for worker in workers:
            if apart:
                worker.table.flat_local[0][:] += np.float32(0.1 * worker.rank)
        for worker in workers:
            loss = kind.compute(worker, lambda made=workers: made)
            found.append((loss, np.concatenate([t.ravel() for t in worker.table.tensors]).copy()))
        seen.append(found)
    for (loss, gradient), (loss_at_once, at_once) in zip(*seen, strict=True):
        assert loss_at_once == pytest.approx(loss, rel=1e-5)
        np.testing.assert_allclose(at_once, gradient, rtol=1e-4, atol=1e-6)


def run(**changes):
    base = SimConfig(task=Lines(), recipe="qadam", workers=5, steps=6, batch_size=6, lr=0.05)
    return simulate(dataclasses.replace(base, **changes))


@pytest.mark.parametrize("recipe", ["qadam", "local-adam"])
def test_a_vectorised_run_goes_as_one_by_one(recipe):
    one, many = (run(recipe=recipe, vectorised=on, chunk=2) for on in (False, True))
    for a, b in zip(one.points, many.points, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-3)
        assert b.usage == a.usage


def test_buffers_are_each_workers_own_and_cannot_be_vectorised():
    with pytest.raises(ConfigError, match=r"buffers.*--no-vectorised"):
        run(task=Lines(norm=True), vectorised=True)
    result = run(task=Lines(norm=True))
    assert result.points[-1].loss < result.points[0].loss


def test_batches_of_different_sizes_cannot_be_vectorised():
    with pytest.raises(ConfigError, match=r"shapes.*--no-vectorised"):
        run(task=Lines(widths=(3, 4)), vectorised=True)


def test_a_bf16_residual_is_another_run_but_learns_as_well():
    f32, bf16 = run(), run(residual="bf16")
    assert f32.points[0].losses == bf16.points[0].losses
    assert f32.points[-1].losses != bf16.points[-1].losses
    assert bf16.points[-1].loss == pytest.approx(f32.points[-1].loss, rel=0.05)

"""Shards that take turns: each speaks in every so many rounds, and moves in these only."""

import numpy as np
import pytest
import torch
from torch import nn

import psq.torch
from psq.codec import ShardCodec, get_codec
from psq.presets import preset
from psq.recipe import Recipe

EVERY = 3
WIDTH = 400


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2)
    )


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    rng = np.random.default_rng(step)
    x = torch.from_numpy(rng.standard_normal((8, 8), np.float32))
    return nn.functional.mse_loss(model(x), torch.sin(x[:, :2]))


def parameters(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().copy()


def gradients(model: nn.Module) -> np.ndarray:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()]).numpy().copy()


def recipe(name: str = "server-adam", **rhythm: int) -> Recipe:
    made = preset(name).with_codecs(uplink="sign", downlink="delta:sign")
    return made.with_rhythm(**{"every": EVERY, **rhythm})


def parts(worker: psq.torch.Worker, flat: np.ndarray) -> dict[int, bytes]:
    shards = worker.plan.layout.shards
    return {s.index: flat[s.offset : s.offset + s.numel].tobytes() for s in shards}


@pytest.fixture
def heard(monkeypatch):
    """What a worker has said in all, decoded, and which shards in each round."""

    def listen(worker: psq.torch.Worker) -> tuple[np.ndarray, list[tuple[int, int]]]:
        said, order = np.zeros(worker.plan.layout.numel, np.float32), []
        codec, push = get_codec(worker.plan.recipe.uplink.codec), worker._client.push

        def note(shard: int, number: int = 0) -> None:
            cut = worker.plan.layout.shards[shard]
            payload = worker._client.said(shard)
            ShardCodec(codec, cut).decode_add(payload, said[cut.offset :][: cut.numel])
            order.append((worker._exchange.step, shard))
            push(shard, number)

        monkeypatch.setattr(worker._client, "push", note)
        return said, order

    return listen


@pytest.mark.parametrize("overlap", [False, True])
def test_a_round_pushes_and_moves_the_shards_that_are_due_and_no_others(join, heard, overlap):
    model = make_model()
    worker = join(model, recipe=recipe(), overlap=overlap)
    _, order = heard(worker)
    assert len(worker.plan.layout.shards) >= 2 * EVERY
    for step in range(2 * EVERY):
        before = parts(worker, parameters(model))
        loss_of(model, step).backward()
        report = worker.step()
        assert (report.applied, report.version) == (True, step + 1)
        due = worker.plan.due_shards(step)
        assert sorted(shard for round_, shard in order if round_ == step) == list(due)
        after = parts(worker, parameters(model))
        assert {shard for shard in after if after[shard] != before[shard]} == set(due)


def test_what_is_said_and_the_residual_are_all_gradients_together(join, heard):
    model = make_model()
    worker = join(model, recipe=recipe())
    said, _ = heard(worker)
    total = np.zeros_like(said)
    for step in range(2 * EVERY + 1):
        loss_of(model, step).backward()
        total += gradients(model)
        worker.step()
    residual = worker._compressor.state_arrays()["residual"]
    assert said.any()
    np.testing.assert_allclose(said + residual, total, rtol=1e-4, atol=1e-5)


def test_adam_on_the_worker_steps_in_every_round_whether_due_or_not(join):
    model = make_model()
    worker = join(model, recipe=recipe("qadam-1bit"))
    for step in range(EVERY + 1):
        loss_of(model, step).backward()
        worker.step()
    assert {adam.count for adam in worker._compressor._adams} == {EVERY + 1}


def test_turns_and_local_steps_go_together(join):
    model = make_model()
    worker = join(model, recipe=recipe("qadam-1bit", local_steps=2))
    moved = np.zeros(parameters(model).size, bool)
    for round_ in range(EVERY):
        before = parameters(model)
        for step in (0, 1):
            loss_of(model, 2 * round_ + step).backward()
            report = worker.step()
        assert report.applied
        after = parameters(model)
        changed = {k for k, v in parts(worker, after).items() if v != parts(worker, before)[k]}
        assert changed == set(worker.plan.due_shards(round_))
        moved |= after != before
        residual = parts(worker, worker._compressor.state_arrays()["residual"])
        assert all(any(part) for part in residual.values())  # the drift of those that rest
    assert moved.mean() > 0.9


def test_overlap_changes_no_byte(join, serve):
    ended = []
    for overlap in (False, True):
        model = make_model()
        options = {"recipe": recipe("qadam-1bit"), "connect": serve().endpoint}
        worker = join(model, overlap=overlap, **options)
        for step in range(2 * EVERY):
            loss_of(model, step).backward()
            worker.step()
        ended.append(parameters(model).tobytes())
    assert ended[0] == ended[1]


@pytest.mark.parametrize("name", ["server-adam", "qadam-1bit"])
def test_replicas_of_a_job_are_equal_after_every_round(join_many, name):
    runs = join_many(3, recipe=recipe(name, every=2), steps=6, width=6000)
    for step in range(6):
        assert len({each.weights[step].tobytes() for each in runs}) == 1
    assert len({weights.tobytes() for weights in runs[0].weights}) == 6


def test_two_servers_take_turns_with_their_own_shards(join, serve):
    model = make_model()
    endpoints = [serve().endpoint, serve().endpoint]
    worker = join(model, recipe=recipe(every=2), connect=endpoints)
    for step in range(4):
        before = parts(worker, parameters(model))
        loss_of(model, step).backward()
        assert worker.step().applied
        after = parts(worker, parameters(model))
        due = {k for server in (0, 1) for k in worker.plan.for_server(server).due_shards(step)}
        assert {shard for shard in after if after[shard] != before[shard]} == due


def test_a_worker_that_comes_late_gets_every_shard_as_it_is(join):
    model, late = make_model(), make_model()
    worker = join(model, recipe=recipe())
    for step in range(4):
        loss_of(model, step).backward()
        worker.step()
    second = join(late, recipe=recipe())  # takes the rank over
    assert second.version == 4
    assert parameters(late).tobytes() == parameters(model).tobytes()
    for step in range(4, 4 + EVERY):
        loss_of(late, step).backward()
        assert second.step().applied


@pytest.mark.parametrize("name", ["server-adam", "qadam-1bit"])
def test_a_shard_that_rests_keeps_nothing_that_is_not_finite(join, name):
    model = make_model()
    worker = join(model, recipe=recipe(name))
    loss_of(model, 0).backward()
    worker.step()
    resting = worker.plan.due_shards(2)[0]  # neither in round 0 nor in round 1
    state = worker._compressor.state_arrays()
    loss_of(model, 1).backward()
    cut = worker.plan.layout.shards[resting]
    flat = list(model.parameters())[cut.segments[0].tensor].grad.reshape(-1)
    flat[cut.segments[0].start] = float("inf")
    report = worker.step()
    assert (report.applied, report.left_out, report.rejected) == (False, (resting,), ())
    assert "is not finite" in report.reason
    assert all(np.isfinite(array).all() for array in state.values())
    loss_of(model, 2).backward()
    assert worker.step().applied


@pytest.mark.parametrize("name", ["server-adam", "qadam", "local-adam"])
def test_topk_goes_both_ways(join_many, name):
    codecs = {"uplink": "topk:k=4", "downlink": "delta:topk:k=4"}
    made = (
        preset(name)
        .with_codecs(**codecs)
        .with_rhythm(local_steps=2 if name == "local-adam" else None)
    )
    runs = join_many(2, recipe=made, steps=8, width=1000)
    assert runs[0].weights[-1].tobytes() == runs[1].weights[-1].tobytes()
    moved = runs[0].weights[-1] != runs[0].weights[1]
    assert 0 < moved.mean() < 0.2  # of each block a few values a round
    assert all(report.applied or report.reason == "local" for report in runs[0].reports)

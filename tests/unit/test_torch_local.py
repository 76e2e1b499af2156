"""Local steps: a worker moves its own weights, and says every so often how far they have come."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

import psq.torch
from psq.codec import ShardCodec, get_codec
from psq.errors import ConfigError
from psq.layout import cut
from psq.presets import preset
from psq.recipe import AdamConfig, Recipe
from psq.torch.parameters import ParameterTable

LR = 0.02
H = 4


def make_model(seed: int = 0, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 2))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    rng = np.random.default_rng(step)
    x = torch.from_numpy(rng.standard_normal((8, 8), np.float32))
    return nn.functional.mse_loss(model(x), torch.sin(x[:, :2]))


def parameters(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().copy()


def recipe(adam: AdamConfig | None = None, steps: int = H, **codecs: str) -> Recipe:
    return preset("local-adam", adam).with_codecs(**codecs).with_rhythm(local_steps=steps)


def dense(adam: AdamConfig | None = None) -> Recipe:
    return recipe(adam, uplink="fp32", downlink="weights:fp32")


def replica(worker: psq.torch.Worker) -> np.ndarray:
    """What the server has, as far as this worker knows."""
    table = worker._table
    return np.concatenate([table.flat_weights(s.index) for s in worker.plan.layout.shards])


def run(worker: psq.torch.Worker, model: nn.Module, steps: range) -> list[psq.torch.StepReport]:
    reports = []
    for step in steps:
        loss_of(model, step).backward()
        reports.append(worker.step())
    return reports


def test_three_of_four_steps_are_local_and_send_no_message(join):
    model = make_model()
    worker = join(model, recipe=recipe())
    before = replica(worker)
    reports = run(worker, model, range(2 * H))
    assert [r.reason for r in reports] == (["local"] * (H - 1) + [""]) * 2
    assert [r.applied for r in reports] == ([False] * (H - 1) + [True]) * 2
    assert [r.version for r in reports] == [0, 0, 0, 1, 1, 1, 1, 2]
    assert (worker.version, worker.steps) == (2, 2 * H)
    assert (replica(worker) != before).any()
    assert all(r.sent_bytes < 1000 for r in reports if r.reason)  # heartbeats at most


def test_a_local_step_moves_the_model_and_not_the_replica(join):
    model = make_model()
    worker = join(model, recipe=recipe())
    before = replica(worker)
    for step in range(H - 1):
        at = parameters(model)
        run(worker, model, range(step, step + 1))
        assert (parameters(model) != at).any()
        assert replica(worker).tobytes() == before.tobytes()
    run(worker, model, range(H - 1, H))
    assert parameters(model).tobytes() == replica(worker).tobytes()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_one_worker_without_compression_is_torch_adam(join, decay):
    twin, model = make_model(), make_model()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=LR, weight_decay=decay)
    worker = join(model, lr=LR, recipe=dense(AdamConfig(weight_decay=decay)))
    for step in range(3 * H):
        loss_of(twin, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        run(worker, model, range(step, step + 1))
        np.testing.assert_allclose(parameters(model), parameters(twin), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("overlap", [False, True])
def test_what_is_pushed_and_the_residual_are_what_local_steps_have_moved(
    join, overlap, monkeypatch
):
    model = make_model()
    worker = join(model, recipe=recipe(), overlap=overlap)
    codec = get_codec(worker.plan.recipe.uplink.codec)
    shards = worker.plan.layout.shards
    said = np.zeros(worker.plan.layout.numel, np.float32)
    moved = np.zeros_like(said)
    push = worker._client.push

    def note(shard: int, number: int = 0) -> None:
        push(shard, number)
        part = said[shards[shard].offset :][: shards[shard].numel]
        ShardCodec(codec, shards[shard]).decode_add(worker._client.said(shard), part)

    monkeypatch.setattr(worker._client, "push", note)
    adams = worker._compressor._adams
    for step in range(3 * H):
        loss_of(model, step).backward()
        start, own = replica(worker), parameters(model)
        worker.step()
        if worker._steps.local_step:
            assert replica(worker).tobytes() == start.tobytes()
            continue
        # The last direction is in the payload only; Adam's state gives it once more.
        moved += start - own + _direction(adams[0], own.size)
    residual = worker._compressor.state_arrays()["residual"]
    assert moved.any()
    assert said.any()
    np.testing.assert_allclose(said + residual, moved, rtol=1e-4, atol=2e-5)


def _direction(adam, numel: int) -> np.ndarray:
    """What the step that `adam` took last has subtracted, from its state."""
    state, now = adam.state_arrays(), adam.coefficients
    scale = now.step_size * now.root  # alpha / m_rest * sqrt(v_rest)
    u = scale * state["m"] / (np.sqrt(state["v"]) + now.root * now.eps_outside)
    return u.astype(np.float32)[:numel]


def test_workers_of_one_job_are_equal_after_each_round_and_apart_between(join_many):
    runs = join_many(3, recipe=recipe(), steps=4 * H)
    for step in range(4 * H):
        states = {each.weights[step].tobytes() for each in runs}
        assert len(states) == (1 if (step + 1) % H == 0 else 3)


def test_a_job_with_local_steps_comes_out_the_same_twice(join_many):
    first, second = (join_many(2, recipe=recipe(), steps=3 * H) for _ in range(2))
    assert first[0].weights[-1].tobytes() == second[0].weights[-1].tobytes()


def test_overlap_changes_no_byte_and_pushes_in_backward_of_the_last_step_only(
    join, serve, monkeypatch
):
    ended = []
    for overlap in (False, True):
        model = make_model()
        worker = join(model, recipe=recipe(), overlap=overlap, connect=serve().endpoint)
        pushed: list[int] = []
        push = worker._client.push
        monkeypatch.setattr(
            worker._client, "push", lambda k, c=0, p=push, o=pushed: (o.append(k), p(k, c))
        )
        for step in range(2 * H):
            before = len(pushed)
            loss_of(model, step).backward()
            assert (len(pushed) > before) == (overlap and step % H == H - 1)
            worker.step()
        ended.append(parameters(model))
    assert ended[0].tobytes() == ended[1].tobytes()


def test_a_local_step_with_a_gradient_that_is_not_finite_touches_nothing(join, caplog):
    caplog.set_level(logging.WARNING, "psq.torch")
    model = make_model()
    worker = join(model, recipe=recipe())
    run(worker, model, range(H + 1))
    state = {k: v.copy() for k, v in worker._compressor.state_arrays().items()}
    weights = parameters(model)
    loss_of(model, H + 1).backward()
    model[2].bias.grad[1] = float("nan")
    report = worker.step()
    assert (report.applied, report.left_out, worker.skipped) == (False, (0,), 1)
    assert report.reason == "the gradient of '2.bias' is not finite"
    assert "rank 0 does not take this step" in caplog.text
    assert parameters(model).tobytes() == weights.tobytes()
    for name, array in worker._compressor.state_arrays().items():
        assert array.tobytes() == state[name].tobytes(), name
    assert worker.steps == H + 2  # it was a step all the same: the round keeps its place
    assert [r.applied for r in run(worker, model, range(H + 2, 2 * H))] == [False, True]


def test_a_last_step_that_is_not_finite_says_how_far_the_steps_before_it_went(join):
    model, worker = make_model(), None
    worker = join(model, recipe=dense())
    run(worker, model, range(H - 1))
    drifted = parameters(model)
    loss_of(model, H - 1).backward()
    model[0].weight.grad[0, 0] = float("inf")
    report = worker.step()
    assert (report.applied, report.version, report.left_out) == (False, 1, (0,))
    np.testing.assert_allclose(parameters(model), drifted, rtol=1e-6, atol=1e-7)


def test_a_schedule_counts_local_steps(join):
    model, asked = make_model(), []

    def schedule(step: int) -> float:
        asked.append(step)
        return 0.1 / (1 + step)

    worker = join(model, lr=schedule, recipe=recipe())
    reports = run(worker, model, range(2 * H))
    assert asked == list(range(2 * H))
    assert [r.lr for r in reports] == [0.1 / (1 + step) for step in range(2 * H)]


def test_accumulated_batches_are_one_local_step(join, serve):
    ended = []
    for parts in (1, 2):
        model = make_model()
        worker = join(model, recipe=dense(), connect=serve().endpoint)
        for step in range(2 * H):
            for part in range(parts - 1):
                with worker.no_sync():
                    (loss_of(model, step) / parts).backward()
                    assert worker.step().reason == "accumulating", part
            (loss_of(model, step) / parts).backward()
            worker.step()
        assert worker.steps == 2 * H
        ended.append(parameters(model))
    np.testing.assert_allclose(ended[0], ended[1], rtol=1e-5, atol=1e-6)


def test_steps_after_the_last_round_are_dropped_and_the_model_is_the_jobs(join, caplog):
    caplog.set_level(logging.INFO, "psq.torch")
    model = make_model()
    worker = join(model, recipe=recipe())
    run(worker, model, range(H))
    kept = parameters(model)
    run(worker, model, range(H, H + 2))
    assert (parameters(model) != kept).any()
    worker.close()
    assert parameters(model).tobytes() == kept.tobytes()
    assert "2 local steps of rank 0 came after the last round" in caplog.text


def test_a_worker_that_comes_late_starts_at_the_rounds_beginning(join):
    model, late = make_model(), make_model(seed=1)
    worker = join(model, recipe=recipe())
    run(worker, model, range(H + 2))  # two steps into a round that it does not end
    kept = replica(worker)
    second = join(late, recipe=recipe())  # takes the rank over
    assert (second.version, second.steps) == (1, H)
    assert parameters(late).tobytes() == kept.tobytes()
    assert run(second, late, range(H, 2 * H))[-1].applied


def test_a_reset_forgets_the_residual_and_the_next_round_starts_from_the_replica(join):
    model = make_model()
    worker = join(model, recipe=recipe())
    run(worker, model, range(2 * H))
    assert worker._compressor.state_arrays()["residual"].any()
    worker._exchange.reset([0])
    assert not worker._compressor.state_arrays()["residual"].any()
    assert run(worker, model, range(2 * H, 3 * H))[-1].applied
    assert parameters(model).tobytes() == replica(worker).tobytes()


def test_parameters_without_a_view_have_weights_of_their_own_too(join, serve):
    ended = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
            assert not model[0].weight.is_contiguous()
        worker = join(model, recipe=dense(), connect=serve().endpoint)
        for step in range(2 * H + 1):
            rng = np.random.default_rng(step)
            x = torch.from_numpy(rng.standard_normal((4, 3, 4, 4), np.float32))
            model(x).square().sum().backward()
            worker.step()
        ended.append(parameters(model))
    np.testing.assert_allclose(ended[0], ended[1], rtol=1e-4, atol=1e-5)


def test_a_table_keeps_the_replica_apart_until_it_is_published():
    model = nn.Linear(3, 2)
    table = ParameterTable(model, apart=True)
    table.bind(cut(table.specs, [lambda numel: 4 * numel]))
    before = parameters(model)
    version = model.weight._version
    table.local(0)[0][:] = 5.0
    table.publish_local()
    assert model.weight._version > version
    assert (model.weight == 5.0).all()
    np.testing.assert_array_equal(table.flat_weights(0), before)
    table.publish()
    np.testing.assert_array_equal(parameters(model), before)


def test_the_number_of_local_steps_may_be_a_setting(join, monkeypatch):
    monkeypatch.setenv("PSQ_LOCAL_STEPS", "3")
    worker = join(make_model(), recipe="qadam-1bit")
    assert worker.plan.recipe.direction.local_steps == 3


def test_local_steps_are_refused_where_workers_push_gradients(monkeypatch):
    monkeypatch.setenv("PSQ_LOCAL_STEPS", "3")
    with pytest.raises(ConfigError, match="local_steps=3 needs Adam on the workers"):
        psq.torch.Worker(make_model(), recipe="server-adam")

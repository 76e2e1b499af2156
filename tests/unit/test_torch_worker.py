"""`psq.torch.Worker` on ordinary training loops, against a server in a thread."""

import contextlib
import logging
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

import psq.torch
from psq.codec import get_codec
from psq.errors import ConfigError, GaveUpError, RemotePayloadError, RemotePlanError, UsageError
from psq.presets import preset
from psq.recipe import AdamConfig
from psq_proto.frames import Header
from psq_proto.messages import Flags, MessageType

LR = 0.05
FIRST = torch.tensor([0])


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def batch(step: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(step)
    x = torch.from_numpy(rng.standard_normal((size, 4), np.float32))
    return x, torch.sin(x[:, :2])


def loss_of(model: nn.Module, step: int, part: slice = slice(None)) -> torch.Tensor:
    x, y = batch(step)
    return nn.functional.mse_loss(model(x[part]), y[part])


def parameters(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().copy()


@pytest.fixture
def adam():
    """A twin of `make_model` trained by torch alone."""
    model = make_model()
    return model, torch.optim.Adam(model.parameters(), lr=LR)


def test_without_compression_a_worker_is_torch_adam(join, adam):
    """Each step within 2 units in the last place of float32, so a few after ten steps."""
    twin, optimizer = adam
    model = make_model()
    worker = join(model)
    for step in range(10):
        optimizer.zero_grad()
        loss_of(twin, step).backward()
        optimizer.step()
        loss_of(model, step).backward()
        report = worker.step()
        assert report.applied
        np.testing.assert_allclose(parameters(model), parameters(twin), rtol=2e-6, atol=2e-7)


def test_adams_settings_reach_the_server(join):
    twin, model = make_model(), make_model()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=LR, betas=(0.8, 0.9), weight_decay=0.1)
    worker = join(model, adam=AdamConfig(beta=0.8, theta=0.9, weight_decay=0.1))
    for step in range(5):
        optimizer.zero_grad()
        loss_of(twin, step).backward()
        optimizer.step()
        loss_of(model, step).backward()
        worker.step()
    np.testing.assert_allclose(parameters(model), parameters(twin), rtol=2e-6, atol=2e-7)


def test_weight_decay_on_the_worker_is_adamws(join):
    twin, model = make_model(), make_model()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=LR, weight_decay=0.1)
    recipe = preset("qadam", AdamConfig(weight_decay=0.1)).with_codecs(
        uplink="fp32", downlink="weights:fp32"
    )
    worker = join(model, recipe=recipe)
    for step in range(5):
        optimizer.zero_grad()
        loss_of(twin, step).backward()
        optimizer.step()
        loss_of(model, step).backward()
        worker.step()
    np.testing.assert_allclose(parameters(model), parameters(twin), rtol=5e-6, atol=5e-7)


def test_gradients_are_zero_and_in_place_after_a_step(join):
    model = make_model()
    worker = join(model)
    loss_of(model, 0).backward()
    address = model[0].weight.grad.data_ptr()
    worker.step()
    assert not model[0].weight.grad.any()
    assert model[0].weight.grad.data_ptr() == address


@pytest.mark.parametrize("bad", [1.0, np.nan, -np.inf])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("recipe", ["server-adam", "qadam-1bit"])
def test_gradients_are_zero_after_a_step_finite_or_not(join, recipe, bad, overlap):
    model = make_model()
    worker = join(model, recipe=recipe, overlap=overlap)
    loss_of(model, 0).backward()
    worker.step()
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad.flatten().index_fill(0, FIRST, bad).view_as(grad))
    loss_of(model, 1).backward()
    assert np.isfinite(bad) == worker.step().applied
    assert not any(parameter.grad.any() for parameter in model.parameters())


def test_a_loop_that_sets_gradients_to_none_itself_works_the_same(join, serve):
    model, other = make_model(), make_model()
    worker, second = join(model), join(other, connect=serve().endpoint)
    for step in range(3):
        for each, its in ((model, worker), (other, second)):
            if each is other:
                each.zero_grad(set_to_none=True)
            loss_of(each, step).backward()
            its.step()
    assert parameters(model).tobytes() == parameters(other).tobytes()


def test_accumulation_under_no_sync_is_one_step_of_the_sum(join, adam):
    twin, optimizer = adam
    model = make_model()
    worker = join(model)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(twin, step).backward()
        optimizer.step()
        for micro in range(4):
            last = micro == 3
            with contextlib.nullcontext() if last else worker.no_sync():
                (loss_of(model, step, slice(2 * micro, 2 * micro + 2)) / 4).backward()
                report = worker.step()
            assert report.applied == last
    assert worker.version == 3
    np.testing.assert_allclose(parameters(model), parameters(twin), rtol=1e-4, atol=1e-5)


def test_no_sync_ends_with_its_block_even_by_an_error(join):
    model = make_model()
    worker = join(model)
    with pytest.raises(ValueError, match="inside"), worker.no_sync():
        raise ValueError("inside")  # noqa: EM101 - the shortest error there is
    loss_of(model, 0).backward()
    assert worker.step().applied


def test_clipping_works_as_with_any_optimizer(join, adam):
    twin, optimizer = adam
    model = make_model()
    worker = join(model)
    for step in range(3):
        for each in (twin, model):
            (100.0 * loss_of(each, step)).backward()
            nn.utils.clip_grad_norm_(each.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        worker.step()
    np.testing.assert_allclose(parameters(model), parameters(twin), rtol=2e-6, atol=2e-7)


def test_the_learning_rate_may_be_a_function_and_may_be_set(join):
    model = make_model()
    worker = join(model, lr=lambda step: 0.1 / (1 + step))
    rates = []
    for step in range(3):
        loss_of(model, step).backward()
        rates.append(worker.step().lr)
    assert rates == [0.1, 0.05, 0.1 / 3]
    worker.lr = 0.02
    loss_of(model, 3).backward()
    assert worker.step().lr == worker.lr == 0.02


@pytest.mark.parametrize("rate", [-0.1, 1e7, float("nan"), float("inf")])
def test_a_learning_rate_that_is_none_is_refused_and_nothing_is_sent(join, rate):
    model = make_model()
    worker = join(model)
    worker.lr = rate
    loss_of(model, 0).backward()
    with pytest.raises(UsageError, match="lr must be a number from 0 to"):
        worker.step()


def test_a_gradient_that_is_not_finite_is_skipped_with_the_residual_and_moments_intact(
    join, caplog
):
    caplog.set_level(logging.WARNING, "psq.torch")
    model = make_model()
    worker = join(model, recipe="qadam-1bit")
    for step in range(3):
        loss_of(model, step).backward()
        worker.step()
    state = {k: v.copy() for k, v in worker._compressor.state_arrays().items()}
    weights = parameters(model)
    loss_of(model, 3).backward()
    model[2].bias.grad[1] = float("inf")
    report = worker.step()
    assert (report.applied, worker.skipped, worker.version) == (False, 1, 4)
    assert "'2.bias' is not finite" in report.reason
    assert "the gradient of '2.bias' is not finite; rank 0 sits this round out" in caplog.text
    assert parameters(model).tobytes() == weights.tobytes()
    for name, array in worker._compressor.state_arrays().items():
        assert array.tobytes() == state[name].tobytes(), name
    loss_of(model, 4).backward()
    assert worker.step().applied


def test_what_is_finite_in_a_shard_that_is_left_out_waits_in_the_residual(join, caplog):
    model = make_model()
    worker = join(model, recipe=preset("server-adam").with_codecs(uplink="sign"))
    loss_of(model, 0).backward()
    worker.step()
    residual = worker._compressor.state_arrays()["residual"]
    before = residual.copy()
    loss_of(model, 1).backward()
    model[0].weight.grad.fill_(3e38)  # finite, but the mean of the block is not
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()][1:]).numpy().copy()
    report = worker.step()
    assert (report.applied, report.left_out, worker.skipped) == (False, (0,), 1)
    assert report.reason == "the gradients of shard 0 are too large for float32"
    assert f"{report.reason}; rank 0 sits this round out for 1 of 1 shards" in caplog.text
    numel = model[0].weight.numel()
    np.testing.assert_array_equal(residual[:numel], before[:numel])
    np.testing.assert_allclose(residual[numel:], before[numel:] + gradient, atol=1e-6)
    loss_of(model, 2).backward()
    assert worker.step().applied


def test_a_gradient_too_large_to_be_added_up_costs_one_round_and_its_residual(join, caplog):
    model = make_model()
    worker = join(model, recipe=preset("server-adam").with_codecs(uplink="sign"))
    loss_of(model, 0).backward()
    model[0].weight.grad[0, 0] = 1e30
    report = worker.step()
    assert not report.applied
    assert "clip the gradients or lower the learning rate" in report.reason
    assert "shard 0 of rank 0 has exploded; its residual starts from zero" in caplog.text
    for step in range(1, 4):
        loss_of(model, step).backward()
        assert worker.step().applied
    assert np.isfinite(parameters(model)).all()


def two_shards(join, **options):
    """A worker whose weight is in both its shards; the first ends within it."""
    torch.manual_seed(0)
    model = nn.Linear(600, 600)
    worker = join(model, recipe=preset("server-adam").with_codecs(uplink="fp32"), **options)
    first, second = worker.plan.layout.shards
    assert second.numel > 0
    return model, worker, first.numel


def gradients(model: nn.Module) -> np.ndarray:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()]).numpy().copy()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_shard_that_the_server_refuses_is_restored_alone_and_the_others_count(join, overlap):
    model, worker, first = two_shards(join, overlap=overlap)
    residual = worker._compressor.state_arrays()["residual"]
    residual[:] = 0.25
    before = parameters(model)
    scale = torch.ones(600, 600)
    scale[-1, -1] = 1e30  # in the second shard
    model.weight.register_hook(lambda grad: grad * scale)
    model(torch.ones(1, 600)).sum().backward()
    report = worker.step()
    assert (report.applied, report.rejected, report.left_out) == (False, (1,), ())
    assert "clip the gradients" in report.reason
    changed = parameters(model) != before
    assert changed[:first].all()
    assert not changed[first:].any()
    assert not residual.any()  # said, or exploded


@pytest.mark.parametrize("overlap", [False, True])
def test_a_shard_that_is_not_finite_is_left_out_alone_and_the_others_count(join, overlap, caplog):
    model, worker, first = two_shards(join, overlap=overlap)
    before = parameters(model)
    scale = torch.ones(600, 600)
    scale[-1, -1] = float("nan")  # in the second shard
    handle = model.weight.register_hook(lambda grad: grad * scale)
    model(torch.ones(1, 600)).sum().backward()
    said = gradients(model)
    report = worker.step()
    assert (report.applied, report.rejected, report.left_out) == (False, (), (1,))
    assert report.reason == "the gradient of 'weight' is not finite"
    assert "rank 0 sits this round out for 1 of 2 shards" in caplog.text
    assert (worker.skipped, worker.version) == (1, 1)
    changed = parameters(model) != before
    assert changed[:first].all()
    assert not changed[first:].any()
    residual = worker._compressor.state_arrays()["residual"]
    waiting = np.where(np.isfinite(said), said, 0.0)
    np.testing.assert_array_equal(residual[first:], waiting[first:])
    assert not residual[:first].any()
    handle.remove()
    model(torch.ones(1, 600)).sum().backward()
    assert worker.step().applied
    assert (parameters(model) != before).all()
    assert not residual.any()


def test_a_residual_in_bf16_takes_half_the_memory_and_trains_on(join, serve):
    losses = {}
    for residual in ("f32", "bf16"):
        model = make_model()
        recipe = preset("server-adam").with_codecs(uplink="sign")
        worker = join(model, recipe=recipe, residual=residual, connect=serve().endpoint)
        for step in range(30):
            loss = loss_of(model, step)
            loss.backward()
            assert worker.step().applied
        kept = worker._compressor.state_arrays()["residual"]
        assert kept.nbytes == {"f32": 4, "bf16": 2}[residual] * parameters(model).size
        assert kept.any()
        losses[residual] = loss.item()
        worker._exchange.reset([0])
        assert not kept.any()
    assert losses["bf16"] != losses["f32"]
    assert losses["bf16"] == pytest.approx(losses["f32"], rel=0.1)


def test_a_residual_in_bf16_is_refused_where_there_is_none():
    with pytest.raises(ConfigError, match="recipe 'fp32' has no error feedback"):
        psq.torch.Worker(make_model(), recipe="fp32", residual="bf16")


def test_a_reset_zeroes_the_residual_and_keeps_the_moments(join):
    model = make_model()
    worker = join(model, recipe="qadam-1bit")
    loss_of(model, 0).backward()
    worker.step()
    state = worker._compressor.state_arrays()
    moments = {name: state[name].tobytes() for name in ("m", "v")}
    assert state["residual"].any()
    worker._exchange.reset(range(len(worker.plan.layout.shards)))
    assert not state["residual"].any()
    assert {name: state[name].tobytes() for name in moments} == moments


@pytest.mark.parametrize(
    ("downlink", "flags", "codec"),
    [
        ("delta:sign", Flags.DELTA, "sign"),
        ("weights:sign", Flags.FULL, "sign"),
        ("delta:sign", Flags.FULL, "fp32"),
    ],
)
def test_weights_that_are_not_finite_are_refused_and_touch_no_parameter(
    join, downlink, flags, codec
):
    model = make_model()
    worker = join(model, recipe=preset("server-adam").with_codecs(downlink=downlink))
    before = parameters(model)
    size = before.nbytes if codec == "fp32" else worker._exchange.decoder.payload_bytes(0)
    header = Header(MessageType.WEIGHTS, flags=flags, codec=get_codec(codec).wire_id)
    with pytest.raises(RemotePayloadError, match="NaN or Inf"):
        worker._exchange.decode(header, memoryview(np.float32(np.nan).tobytes() + bytes(size - 4)))
    assert parameters(model).tobytes() == before.tobytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_trains_like_one_on_the_cpu(join, serve):
    plain, device = make_model(), make_model().cuda()
    workers = [join(plain, connect=serve().endpoint), join(device, connect=serve().endpoint)]
    for step in range(4):
        loss_of(plain, step).backward()
        for a, b in zip(plain.parameters(), device.parameters(), strict=True):
            b.grad = a.grad.cuda()
        for worker in workers:
            worker.step()
    assert parameters(plain).tobytes() == parameters(device.cpu()).tobytes()


def test_a_step_without_any_gradient_is_warned_of_and_not_each_time(join, caplog):
    worker = join(make_model())
    worker.step()
    assert "no parameter has a gradient; was backward called?" in caplog.text
    for _ in range(10):
        worker.step()
    assert [record.args for record in caplog.records] == [(0,), (9,)]


def test_reports_say_where_time_and_bytes_went(join):
    model = make_model()
    worker = join(model)
    loss_of(model, 0).backward()
    before = (worker.sent_bytes, worker.received_bytes)
    report = worker.step()
    assert (report.step, report.version, report.applied, report.reason) == (0, 1, True, "")
    assert min(report.compute_s, report.encode_s, report.decode_s, report.server_s) > 0
    assert report.wire_s >= 0
    assert 0 <= report.exposed_s <= report.wire_s + report.server_s + 1e-3  # two clocks
    assert report.sent_bytes >= worker.sent_bytes - before[0] > 4 * parameters(model).size
    assert report.received_bytes >= worker.received_bytes - before[1] > 4 * parameters(model).size


def test_waiting_for_another_worker_is_exposed_communication(join, serve, eventually):
    endpoint = serve().endpoint
    reports = {}
    said_s = []

    def run(rank: int) -> None:
        worker = join(make_model(), rank=rank, world_size=2, connect=endpoint)
        if rank == 1:
            eventually(lambda: said_s and time.perf_counter() > said_s[0] + 0.1, "a late push")
        else:
            said_s.append(time.perf_counter())
        reports[rank] = worker.step()

    in_two_threads(run)
    assert 0.09 < reports[0].exposed_s <= reports[0].wire_s + reports[0].server_s + 1e-3
    assert reports[1].exposed_s < 0.09


def test_observers_hear_of_each_step(join, monkeypatch):
    heard = []
    monkeypatch.setattr("psq.torch.observers", psq.torch.observers)
    psq.torch.observers.append(lambda *said: heard.append(said))
    try:
        model = make_model()
        worker = join(model)
        loss = loss_of(model, 0)
        loss.backward()
        report = worker.step(loss=loss, samples=8)
        worker.step()
    finally:
        psq.torch.observers.pop()
    assert heard[0] == (worker, report, pytest.approx(loss.item()), 8)
    assert heard[1][2:] == (None, 0)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"loss": "abc"}, "expected a number, or a tensor that holds one, got str 'abc'"),
        ({"loss": torch.ones(2)}, r"got Tensor of shape \(2,\)"),
        ({"loss": [1.0]}, "got list"),
        ({"samples": 1.5}, "samples: expected how many were in the batch"),
        ({"samples": -1}, "a whole number, got -1"),
    ],
)
def test_what_no_observer_could_read_is_refused_before_anything_is_sent(join, said, words):
    model = make_model()
    worker = join(model)
    loss_of(model, 0).backward()
    with pytest.raises(UsageError, match=words):
        worker.step(**said)
    assert worker.step(loss=1.0, samples=8).applied


@pytest.mark.parametrize("loss", [1, True, np.float32(1.0), torch.ones(1, 1), torch.tensor(1)])
def test_observers_hear_of_a_loss_as_a_plain_number(join, loss):
    heard = []
    psq.torch.observers.append(lambda *said: heard.append(said[2]))
    try:
        model = make_model()
        worker = join(model)
        loss_of(model, 0).backward()
        worker.step(loss=loss)
    finally:
        psq.torch.observers.pop()
    assert heard == [1.0]
    assert type(heard[0]) is float


def test_observers_hear_of_all_samples_of_an_accumulated_step(join):
    heard = []
    psq.torch.observers.append(lambda *said: heard.append(said[3]))
    try:
        model = make_model()
        worker = join(model)
        for _ in range(2):
            with worker.no_sync():
                loss_of(model, 0).backward()
                worker.step(samples=8)
            loss_of(model, 1).backward()
            worker.step(samples=4)
    finally:
        psq.torch.observers.pop()
    assert heard == [12, 12]


def test_the_seed_reaches_the_codecs_that_draw_numbers(join, serve):
    recipe = preset("server-adam").with_codecs(uplink="uniform:bits=2,stochastic=true")
    ends = []
    for seed in (1, 1, 2):
        model = make_model()
        worker = join(model, recipe=recipe, seed=seed, connect=serve().endpoint)
        loss_of(model, 0).backward()
        worker.step()
        ends.append(parameters(model).tobytes())
    assert ends[0] == ends[1] != ends[2]


def test_buffers_and_modes_are_left_alone(join):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    worker = join(model)
    loss_of(model, 0).backward()
    mean = model[1].running_mean.clone()
    worker.step()
    assert torch.equal(model[1].running_mean, mean)
    assert model.training


def train_two(join, recipe: str, steps: int, **options) -> list[nn.Module]:
    """Two workers in two threads, with different weights at first."""
    models = [make_model(seed) for seed in range(2)]
    endpoint = options["connect"]

    def run(rank: int) -> None:
        worker = join(models[rank], recipe=recipe, rank=rank, world_size=2, connect=endpoint)
        for step in range(steps):
            part = slice(4 * rank, 4 * rank + 4)
            loss_of(models[rank], step, part).backward()
            worker.step()

    in_two_threads(run)
    return models


@pytest.mark.parametrize("recipe", ["server-adam", "qadam", "qadam-1bit", "fp32"])
def test_replicas_are_equal_byte_for_byte(join, serve, recipe):
    server = serve()
    first, second = train_two(join, recipe, 4, connect=server.endpoint)
    assert parameters(first).tobytes() == parameters(second).tobytes()
    if recipe != "qadam":
        server_weights = server.loop._weights.reducer.weights()
        for name, parameter in first.named_parameters():
            assert parameter.detach().numpy().tobytes() == server_weights[name].tobytes()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("consistency", ["bsp", "ssp:2"])
def test_replicas_of_two_servers_are_equal_too(join, serve, consistency, overlap):
    endpoints = [serve().endpoint, serve().endpoint]
    models = [wide(seed) for seed in range(2)]

    def run(rank: int) -> None:
        options = {"rank": rank, "world_size": 2, "connect": endpoints, "recipe": "qadam-1bit"}
        worker = join(models[rank], consistency=consistency, overlap=overlap, **options)
        assert worker.plan.servers == 2
        assert set(worker.plan.layout.owners) == {0, 1}
        for step in range(4):
            loss_of(models[rank], step, slice(4 * rank, 4 * rank + 4)).backward()
            report = worker.step()
            assert report.applied, report
            assert report.version == worker.version == step + 1 or consistency != "bsp"

    in_two_threads(run)
    if consistency == "bsp":
        assert parameters(models[0]).tobytes() == parameters(models[1]).tobytes()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_server_that_is_ahead_sits_a_step_out(join, serve, eventually, overlap):
    """The process before died when one server had its whole contribution, the other nothing."""
    endpoints = [serve().endpoint, serve().endpoint]
    model, heir = wide(0), wide(1)
    before = join(model, connect=endpoints)
    loss_of(model, 0).backward()
    before._table.refresh()
    before._exchange.begin(before._asked())
    owners = before.plan.layout.owners
    ahead = [shard for shard, owner in enumerate(owners) if owner == 0]
    for shard in ahead:
        before._exchange.say(shard)

    def has_closed() -> bool:
        before._client.poll()
        return all(before._client.versions[shard] == 1 for shard in ahead)

    eventually(has_closed, "the round of the first server")
    before.close("error", "killed")
    worker = join(heir, connect=endpoints, overlap=overlap)
    assert sorted(set(worker._client.versions)) == [0, 1]
    weights = [np.concatenate(worker._table.weights(k)) for k in range(len(owners))]
    loss_of(heir, 0).backward()
    report = worker.step()
    assert (report.step, report.version, report.applied) == (0, 1, True)
    for shard, owner in enumerate(owners):
        same = np.concatenate(worker._table.weights(shard)) == weights[shard]
        assert same.all() if owner == 0 else not same.any()
    loss_of(heir, 1).backward()
    assert worker.step().version == 2
    assert set(worker._client.versions) == {2}


def wide(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 800), nn.Tanh(), nn.Linear(800, 800), nn.Linear(800, 2))


def in_two_threads(run) -> None:
    failures: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            run(rank)
        except BaseException as error:  # noqa: BLE001 - told to the test below
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_two_workers_are_one_with_twice_the_batch(join, serve, adam):
    twin, optimizer = adam
    for step in range(4):
        optimizer.zero_grad()
        loss_of(twin, step).backward()
        optimizer.step()
    first, _ = train_two(join, "fp32", 4, connect=serve().endpoint)
    np.testing.assert_allclose(parameters(first), parameters(twin), rtol=1e-4, atol=1e-5)


def test_channels_last_models_train_like_others(join, serve):
    def convolution() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 2))

    plain, last = convolution(), convolution().to(memory_format=torch.channels_last)
    workers = [join(plain, recipe="qadam-1bit", connect=serve().endpoint),
               join(last, recipe="qadam-1bit", connect=serve().endpoint)]  # fmt: skip
    for step in range(4):
        x = torch.from_numpy(np.random.default_rng(step).standard_normal((3, 2, 4, 4), np.float32))
        grads = []
        for model in (plain, last):
            model(x).pow(2).mean().backward()
            grads.append([p.grad for p in model.parameters()])
        for a, b in zip(*grads, strict=True):
            b.copy_(a)  # convolution kernels differ in the last bits between the formats
        for worker in workers:
            worker.step()
    assert parameters(plain).tobytes() == parameters(last).tobytes()


def test_tied_weights_train_like_torch(join):
    def tied() -> nn.Sequential:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        model[2].weight = model[0].weight
        return model

    twin, model = tied(), tied()
    optimizer = torch.optim.Adam(twin.parameters(), lr=LR)
    worker = join(model)
    for step in range(4):
        x, _ = batch(step)
        for each in (twin, model):
            each(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        worker.step()
    assert model[2].weight is model[0].weight
    np.testing.assert_allclose(parameters(model), parameters(twin), rtol=2e-6, atol=2e-7)


def test_a_replaced_parameter_is_refused_and_nothing_is_lost(join):
    model = make_model()
    worker = join(model)
    kept = model[0].weight
    model[0].weight = nn.Parameter(torch.zeros(8, 4))
    with pytest.raises(UsageError, match=r"'0\.weight' was replaced"):
        worker.step()
    model[0].weight = kept
    loss_of(model, 0).backward()
    assert worker.step().version == 1


def test_a_closed_worker_says_so(join):
    model = make_model()
    worker = join(model)
    worker.close()
    worker.close()
    with pytest.raises(UsageError, match="this worker is closed"):
        worker.step()


def test_a_context_leaves_with_the_reason_of_its_end(join, serve):
    servers = [serve(), serve(), serve()]
    errors: tuple[type[BaseException] | None, ...] = (None, KeyboardInterrupt, RuntimeError)
    for server, error in zip(servers, errors, strict=True):
        caught = pytest.raises(error) if error else contextlib.nullcontext()
        with caught, join(make_model(), connect=server.endpoint):
            if error:
                raise error
    servers[0].wait()
    for server in servers[1:]:
        server.vanish()
    reasons = ["reason=done", "reason=interrupted", "reason=error"]
    assert [reason in server.log for reason, server in zip(reasons, servers, strict=True)]
    assert all(reason in server.log for reason, server in zip(reasons, servers, strict=True))


def test_after_an_error_the_worker_says_to_close_it_and_leaves_as_failed(join, serve):
    server = serve()
    model = make_model()
    worker = join(model, connect=server.endpoint, give_up_after_s=2.5, world_size=2)
    with pytest.raises(GaveUpError, match="waiting for rank 1"):
        worker.step()
    with pytest.raises(UsageError, match=r"stopped working [(]GaveUpError"):
        worker.step()
    worker.close()
    server.vanish()
    assert "reason=error" in server.log


def test_a_worker_with_another_model_is_told_the_first_difference(join):
    join(make_model(), world_size=2)
    other = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2))
    with pytest.raises(RemotePlanError, match=r"tensor 0: the job has '0.weight' \[8, 4\]"):
        join(other, rank=1, world_size=2)


def test_workers_left_open_can_all_be_closed_at_once(join, serve):
    server = serve()
    join(make_model(), connect=server.endpoint)
    psq.torch.close_workers("interrupted", "Ctrl-C")
    server.vanish()
    assert "reason=interrupted text=Ctrl-C" in server.log

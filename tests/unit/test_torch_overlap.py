"""Gradients that are pushed while backward still runs: the same training, or a loud error."""

import contextlib
import threading

import numpy as np
import pytest
import torch
from torch import nn

import psq.torch
from psq.errors import UsageError
from psq.layout import Layout, cut
from psq.presets import preset
from psq.torch.overlap import Overlap
from psq.torch.parameters import ParameterTable

WIDTH = 600  # a layer of this width is more than one shard of float32


def make_model(seed: int = 0, width: int = WIDTH) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
    )


def loss_of(model: nn.Module, step: int, part: slice = slice(None)) -> torch.Tensor:
    rng = np.random.default_rng(step)
    x = torch.from_numpy(rng.standard_normal((8, 8), np.float32))[part]
    return nn.functional.mse_loss(model(x), torch.sin(x[:, :2]))


def parameters(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().copy()


@pytest.fixture
def both(join, serve):
    """Two models trained side by side, `both(make)`: the second worker's pushes overlap."""

    def start(make=make_model, **options):
        models = [make(), make()]
        workers = [
            join(model, overlap=overlap, connect=serve().endpoint, **options)
            for model, overlap in zip(models, (False, True), strict=True)
        ]
        return list(zip(models, workers, strict=True))

    return start


@pytest.fixture
def pushed(monkeypatch):
    """The shards pushed so far, in order, of every worker that is `watched`."""

    def watch(worker: psq.torch.Worker) -> list[int]:
        order: list[int] = []
        push = worker._client.push

        def note(shard: int, codec: int = 0) -> None:
            order.append(shard)
            push(shard, codec)

        monkeypatch.setattr(worker._client, "push", note)
        return order

    return watch


@pytest.mark.parametrize(
    "recipe",
    [
        "server-adam",
        "qadam",
        "qadam-1bit",
        "efficient-adam",
        "fp32",
        preset("server-adam").with_codecs(uplink="uniform:bits=2,stochastic=true"),
    ],
    ids=lambda recipe: recipe if isinstance(recipe, str) else recipe.uplink.codec,
)
def test_training_is_the_same_byte_for_byte(both, pushed, recipe):
    # One layer is more than one shard of any codec.
    (plain, first), (model, second) = both(lambda: make_model(width=1100), recipe=recipe)
    assert len(second.plan.layout.shards) > 1
    order = pushed(second)
    for step in range(3):
        loss_of(plain, step).backward()
        first.step()
        loss_of(model, step).backward()
        assert len(order) == len(second.plan.layout.shards) * (step + 1)
        second.step()
    assert parameters(plain).tobytes() == parameters(model).tobytes()


def test_shards_are_pushed_in_backward_as_their_last_gradient_comes(join, pushed):
    model = make_model()
    worker = join(model, overlap=True)
    shards = worker.plan.layout.shards
    assert len(shards) > 1
    order = pushed(worker)
    seen = []
    model[0].bias.register_hook(lambda _: seen.extend(order))
    loss_of(model, 0).backward()
    assert shards[-1].index in seen  # the last layer's, before backward has come to the first
    assert 0 not in seen
    assert sorted(order) == [shard.index for shard in shards]
    before = list(order)
    worker.step()
    assert order == before


def test_of_shards_that_are_ready_at_once_the_first_goes_first():
    model = nn.Linear(WIDTH, WIDTH, bias=False)
    table = ParameterTable(model)
    layout = cut(table.specs, [lambda numel: 64 * numel])
    assert len(layout.shards) > 10
    table.bind(layout)
    said = []
    overlap = Overlap(table, layout, armed=lambda: True, say=said.append, fail=said.append)
    model(torch.ones(1, WIDTH)).sum().backward()
    overlap.close()
    assert said == [list(range(len(layout.shards)))]


def test_weights_that_come_while_backward_runs_wait_for_the_step(join, eventually):
    """Were they written at once, the gradients still to come would be wrong without a sound."""
    model = make_model()
    worker = join(model, overlap=True)
    last = worker.plan.layout.shards[-1]
    before, received = parameters(model), worker.received_bytes
    seen = []

    def wait(_: torch.Tensor) -> None:
        """Backward has come to the first layer; the last shard's new weights are here."""
        eventually(lambda: worker.received_bytes > received + 4 * last.numel, "the new weights")
        seen.append(parameters(model))

    model[0].weight.register_hook(wait)
    loss_of(model, 0).backward()
    assert [each.tobytes() for each in seen] == [before.tobytes()]
    assert parameters(model).tobytes() == before.tobytes()
    assert worker.step().version == 1
    assert parameters(model).tobytes() != before.tobytes()


def test_two_workers_that_overlap_have_the_same_weights(join, serve):
    endpoint = serve().endpoint
    models = [make_model(seed) for seed in range(2)]
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            options = {"rank": rank, "world_size": 2, "connect": endpoint, "overlap": True}
            worker = join(models[rank], recipe="server-adam", **options)
            for step in range(4):
                loss_of(models[rank], step, slice(4 * rank, 4 * rank + 4)).backward()
                worker.step()
        except BaseException as error:  # noqa: BLE001 - told to the test below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert parameters(models[0]).tobytes() == parameters(models[1]).tobytes()


def test_accumulation_under_no_sync_sends_the_sum_once(both, pushed):
    pairs = both(recipe="qadam-1bit")
    order = pushed(pairs[1][1])
    for step in range(3):
        for micro in range(4):
            for model, worker in pairs:
                last = micro == 3
                with contextlib.nullcontext() if last else worker.no_sync():
                    (loss_of(model, step, slice(2 * micro, 2 * micro + 2)) / 4).backward()
                    if not last:
                        assert len(order) == len(worker.plan.layout.shards) * step
                    worker.step()
    assert parameters(pairs[0][0]).tobytes() == parameters(pairs[1][0]).tobytes()


class Branches(nn.Module):
    """Two layers of a shard or more each, of which a step may use one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)


def test_parameters_that_are_not_used_count_as_zero_and_are_said_in_step(both, pushed):
    pairs = both(Branches)
    order = pushed(pairs[1][1])
    shards = len(pairs[1][1].plan.layout.shards)
    x = torch.linspace(-1, 1, WIDTH)[None]
    assert shards > 1
    for names in (["left"], ["left", "right"], ["right"], []):
        order.clear()
        for model, worker in pairs:
            loss = sum(model.get_submodule(name)(x).pow(2).mean() for name in names)
            if names:
                loss.backward()
            early = len(order)
            worker.step()
        assert early == shards if len(names) == 2 else early < shards
        assert sorted(order) == list(range(shards))
    assert parameters(pairs[0][0]).tobytes() == parameters(pairs[1][0]).tobytes()


def test_gradients_set_to_none_before_each_forward_work_the_same(both):
    pairs = both(recipe="server-adam")
    for step in range(4):
        for model, worker in pairs:
            model.zero_grad(set_to_none=True)
            loss_of(model, step).backward()
            worker.step()
    assert parameters(pairs[0][0]).tobytes() == parameters(pairs[1][0]).tobytes()


def tied() -> nn.Sequential:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2))
    model[2].weight = model[0].weight
    return model


def channels_last() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 2), nn.Flatten(),
                          nn.Linear(4, 2))  # fmt: skip
    return model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("make", [tied, channels_last])
def test_models_with_memory_of_their_own_kind_train_the_same(both, make):
    pairs = both(make, recipe="server-adam")
    for step in range(4):
        for model, worker in pairs:
            loss_of(model, step).backward()
            worker.step()
    assert parameters(pairs[0][0]).tobytes() == parameters(pairs[1][0]).tobytes()


def test_autocast_trains_the_same(both):
    pairs = both(recipe="server-adam")
    for step in range(3):
        for model, worker in pairs:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, step)
            loss.backward()
            assert worker.step().applied
    assert parameters(pairs[0][0]).tobytes() == parameters(pairs[1][0]).tobytes()


def test_a_gradient_may_be_changed_by_its_own_hook_before_it_is_sent(both):
    pairs = both()
    for model, worker in pairs:
        model[0].weight.register_hook(lambda grad: grad * 0.5)
        loss_of(model, 0).backward()
        assert worker.step().applied
    assert parameters(pairs[0][0]).tobytes() == parameters(pairs[1][0]).tobytes()


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def scale_one(model: nn.Module) -> None:
    model[2].bias.grad.mul_(0.5)


def take_away(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)


def put_another(model: nn.Module) -> None:
    model[0].weight.grad = model[0].weight.grad.clone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (clip, r"the gradient of '0.weight' changed between backward and step.*overlap=False"),
        (scale_one, r"the gradient of '2.bias' changed"),
        (put_another, r"the gradient of '0.weight' changed"),
        (take_away, r"the gradient of '0.weight' was taken away"),
    ],
)
def test_a_gradient_that_changes_after_it_was_sent_is_refused(join, change, words):
    model = make_model()
    worker = join(model, overlap=True)
    loss_of(model, 0).backward()
    change(model)
    with pytest.raises(UsageError, match=words):
        worker.step()
    with pytest.raises(UsageError, match="this worker stopped working"):
        worker.step()


def test_what_clipping_does_is_allowed_without_overlap(join):
    model = make_model()
    worker = join(model)
    loss_of(model, 0).backward()
    clip(model)
    assert worker.step().applied


def test_a_second_backward_before_the_step_is_refused_where_it_happens(join):
    model = make_model()
    worker = join(model, overlap=True)
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    with pytest.raises(UsageError, match=r"backward ran a second time before step.*no_sync"):
        loss.backward()
    with pytest.raises(UsageError, match="this worker stopped working"):
        worker.step()


def test_two_losses_are_one_step_if_the_first_backward_is_under_no_sync(both):
    pairs = both()
    for model, worker in pairs:
        with worker.no_sync():
            loss_of(model, 0).backward()
        loss_of(model, 1).backward()
        assert worker.step().applied
    assert parameters(pairs[0][0]).tobytes() == parameters(pairs[1][0]).tobytes()


def test_a_learning_rate_that_changes_after_the_first_push_is_refused(join):
    model = make_model()
    worker = join(model, overlap=True)
    loss_of(model, 0).backward()
    worker.lr = 0.01
    with pytest.raises(UsageError, match=r"lr changed from 0.05 to 0.01 .*set lr before backward"):
        worker.step()


def test_a_learning_rate_set_before_backward_counts(join):
    model = make_model()
    worker = join(model, overlap=True, lr=lambda step: 0.1 / (1 + step))
    rates = []
    for step in range(3):
        loss_of(model, step).backward()
        rates.append(worker.step().lr)
    worker.lr = 0.02
    loss_of(model, 3).backward()
    assert [*rates, worker.step().lr] == [0.1, 0.05, 0.1 / 3, 0.02]


def test_a_learning_rate_that_is_none_is_refused_in_backward_and_nothing_is_sent(join, pushed):
    model = make_model()
    worker = join(model, overlap=True)
    order = pushed(worker)
    worker.lr = float("nan")
    with pytest.raises(UsageError, match="lr must be a number from 0 to"):
        loss_of(model, 0).backward()
    assert not order


def test_a_replaced_parameter_is_refused(join):
    model = make_model()
    worker = join(model, overlap=True)
    loss = loss_of(model, 0)
    model[0].weight = nn.Parameter(torch.zeros(WIDTH, 8))
    with pytest.raises(UsageError, match=r"'0\.weight' was replaced"):
        loss.backward()
    with pytest.raises(UsageError, match="this worker stopped working"):
        worker.step()


def test_after_the_worker_is_closed_backward_sends_nothing(join, pushed):
    model = make_model()
    worker = join(model, overlap=True)
    order = pushed(worker)
    worker.close()
    loss_of(model, 0).backward()
    loss_of(model, 0).backward()
    assert not order


def test_a_forked_child_leaves_its_parents_worker_alone(join, pushed, monkeypatch):
    model = make_model()
    worker = join(model, overlap=True)
    order = pushed(worker)
    with monkeypatch.context() as child:
        child.setattr("os.getpid", lambda: -1)
        loss_of(model, 0).backward()
    assert not order
    model.zero_grad()
    loss_of(model, 0).backward()
    assert order
    assert worker.step().applied


def test_an_error_of_the_link_ends_backward_and_the_worker(join, monkeypatch):
    model = make_model()
    worker = join(model, overlap=True)

    def broken(*_: int) -> None:
        raise ConnectionError

    with monkeypatch.context() as cable:
        cable.setattr(worker._client, "push", broken)
        with pytest.raises(ConnectionError):
            loss_of(model, 0).backward()
    with pytest.raises(UsageError, match=r"stopped working [(]ConnectionError"):
        worker.step()


def test_times_in_backward_are_encoding_not_computing(join, monkeypatch):
    """On a clock that moves by a second whenever it is read, and by 100 in each compression."""
    clock = {"s": 0.0}

    def now() -> float:
        if threading.current_thread() is threading.main_thread():  # the server's looks all the time
            clock["s"] += 1.0
        return clock["s"]

    model = make_model()
    worker = join(model, overlap=True)
    compress = worker._compressor.compress

    def slow(*args, **options) -> int:
        clock["s"] += 100.0
        return compress(*args, **options)

    monkeypatch.setattr("time.monotonic", now)
    monkeypatch.setattr(worker._compressor, "compress", slow)
    worker._steps.returned_s = began_s = now()
    loss_of(model, 0).backward()
    report = worker.step()
    shards = len(worker.plan.layout.shards)
    assert 100.0 * shards <= report.encode_s < 110.0 * shards
    assert report.compute_s < 100.0
    phases = ("compute_s", "encode_s", "wire_s", "server_s", "decode_s")
    total_s = sum(getattr(report, name) for name in phases)
    assert total_s == pytest.approx(worker._steps.returned_s - began_s, abs=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_trains_the_same(both):
    pairs = both(lambda: make_model().cuda(), recipe="server-adam")
    for step in range(4):
        for model, worker in pairs:
            x = torch.from_numpy(np.random.default_rng(step).standard_normal((8, 8), np.float32))
            model(x.cuda()).pow(2).mean().backward()
            worker.step()
    first, second = (parameters(model.cpu()) for model, _ in pairs)
    assert first.tobytes() == second.tobytes()


class Event:
    """A copy on a device that ends when the test says so."""

    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done


def test_a_shard_waits_for_its_copy_from_the_device_and_the_hook_does_not(monkeypatch):
    """What a GPU does, without one: `arrive` says what to wait for."""
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(4)])
    table = ParameterTable(model)
    layout: Layout = cut(table.specs, [lambda _: 1 << 20])
    table.bind(layout)
    assert len(layout.shards) == 4
    events = [Event() for _ in range(4)]
    arrive = table.arrive

    def copy(index: int) -> Event:
        arrive(index)
        return events[index]

    monkeypatch.setattr(table, "arrive", copy)
    said: list[list[int]] = []
    overlap = Overlap(table, layout, armed=lambda: True, say=said.append, fail=said.append)

    def end_copies(_: torch.Tensor) -> None:
        events[2].done = events[3].done = True

    model[1].weight.register_hook(end_copies)
    model(torch.ones(1, 1)).sum().backward()
    assert said == [[2, 3]]  # 1 and 0 are left to the step, which waits for the device
    overlap.close()

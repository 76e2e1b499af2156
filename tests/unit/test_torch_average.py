"""Recipe `average`: the mean gradient comes back, torch optimizers step on every worker alike."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import psq.torch
from psq.errors import ConfigError, RefusedError, UsageError
from psq.presets import preset
from psq.torch import Group

LR = 0.05
DENSE = preset("average").with_codecs(uplink="fp32", downlink="mean:fp32")


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def loss_of(model: nn.Module, seed) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((8, 4), np.float32))
    return nn.functional.mse_loss(model(x), torch.sin(x[:, :2]))


def values(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().copy()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, nesterov=True)


def train(serve, workers: int, make, *, steps: int = 6, sits=lambda *_: False, **options):
    endpoint = serve().endpoint
    models = [make_model() for _ in range(workers)]  # torch's seed belongs to all threads

    def work(rank: int) -> list[np.ndarray]:
        model, seen = models[rank], []
        settings = {"recipe": "average", "give_up_after_s": 20.0, "connect": endpoint, **options}
        optimizer = make(model)
        with psq.torch.Worker(
            model, optimizer=optimizer, rank=rank, world_size=workers, **settings
        ) as worker:
            for step in range(steps):
                if sits(rank, step):
                    worker.sit_out()
                else:
                    loss_of(model, (step, rank)).backward()
                    assert worker.step().applied
                assert not any(p.grad.any() for p in model.parameters())
                seen.append(values(model))
        return seen

    with ThreadPoolExecutor(workers) as pool:
        return [each.result(60) for each in [pool.submit(work, r) for r in range(workers)]]


@pytest.mark.parametrize("make", [adam, momentum])
def test_workers_stay_equal_to_the_bit_whatever_optimizer_steps(serve, make):
    runs = train(serve, 3, make, sits=lambda rank, step: rank == 1 and step == 2)
    for step in range(6):
        assert len({run[step].tobytes() for run in runs}) == 1
    assert len({each.tobytes() for each in runs[0]}) == 6


@pytest.mark.parametrize("make", [adam, momentum])
def test_without_compression_it_is_the_optimizer_on_the_mean_gradient(serve, make):
    twin = make_model()
    optimizer = make(twin)
    expected = []
    for step in range(6):
        (0.5 * (loss_of(twin, (step, 0)) + loss_of(twin, (step, 1)))).backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(values(twin))
    runs = train(serve, 2, make, recipe=DENSE)
    np.testing.assert_allclose(runs[0], expected, rtol=1e-4, atol=1e-5)


def test_workers_that_were_built_differently_start_with_rank_0s_weights(serve):
    """And parameters without a view of their memory keep what the optimizer made of them."""
    endpoint, models = serve().endpoint, []
    for _ in range(2):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        models.append(model.to(memory_format=torch.channels_last))
        assert not model[0].weight.is_contiguous()
    assert values(models[0]).tobytes() != values(models[1]).tobytes()

    def work(rank: int) -> list[bytes]:
        model = models[rank]
        options = {"connect": endpoint, "rank": rank, "world_size": 2, "give_up_after_s": 20.0}
        with psq.torch.Worker(
            model, recipe="average", optimizer=momentum(model), **options
        ) as worker:
            seen = [values(model).tobytes()]
            for step in range(4):
                rng = np.random.default_rng((step, rank))
                x = torch.from_numpy(rng.standard_normal((4, 3, 4, 4), np.float32))
                model(x).square().mean().backward()
                assert worker.step().applied
                seen.append(values(model).tobytes())
        return seen

    with ThreadPoolExecutor(2) as pool:
        first, second = (each.result(60) for each in [pool.submit(work, r) for r in range(2)])
    assert first == second
    assert len(set(first)) == 5


@pytest.mark.parametrize("overlap", [False, True])
def test_overlap_sends_the_same_gradients_and_the_optimizer_steps_the_same(serve, overlap):
    alone = train(serve, 2, momentum)
    assert [each.tobytes() for each in train(serve, 2, momentum, overlap=overlap)[1]] == [
        each.tobytes() for each in alone[0]
    ]


def test_the_mean_is_in_grad_when_the_optimizer_steps(join):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    seen: list[torch.Tensor] = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in model.parameters())
    )
    worker = psq_worker(join, model, optimizer, recipe=DENSE)
    loss_of(model, 0).backward()
    own = [p.grad.clone() for p in model.parameters()]
    assert worker.step().applied
    assert all(torch.equal(a, b) for a, b in zip(seen, own, strict=True))  # one worker's mean


def test_a_round_in_which_nobody_speaks_is_no_step_of_the_optimizer(join):
    model = make_model()
    worker = psq_worker(join, model, momentum(model))
    loss_of(model, 0).backward()
    worker.step()
    before = values(model)
    assert worker.sit_out().version == 2
    assert values(model).tobytes() == before.tobytes()  # momentum would have moved it
    loss_of(model, 1).backward()
    assert worker.step().applied


def test_the_optimizers_scheduler_works_and_its_rate_is_the_workers(join):
    model = make_model()
    optimizer = momentum(model)
    worker = psq_worker(join, model, optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for step in range(3):
        loss_of(model, step).backward()
        assert worker.step().lr == optimizer.param_groups[0]["lr"]
        schedule.step()
    assert worker.lr < LR
    with pytest.raises(UsageError, match="schedule that one"):
        _ = worker.optimizer
    with pytest.raises(UsageError, match="set it in the optimizer that you gave"):
        worker.lr = 0.1


def test_who_comes_late_is_refused_in_words(serve):
    endpoint = serve().endpoint
    model, late = make_model(), make_model(seed=1)
    options = {"recipe": "average", "connect": endpoint, "rank": 0, "world_size": 1}
    with psq.torch.Worker(model, optimizer=adam(model), **options) as worker:
        loss_of(model, 0).backward()
        worker.step()
        with pytest.raises(RefusedError, match="rank 0 joins at round 1, and this server has no"):
            psq.torch.Worker(late, optimizer=adam(late), give_up_after_s=10.0, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "leaves the step to an optimizer of yours: give it"),
        ({"lr": 0.1}, "the optimizer has the learning rate: leave lr out"),
        ({"consistency": "ssp:2"}, "needs consistency=bsp without a quorum"),
        ({"consistency": "bsp,quorum=1"}, "needs consistency=bsp without a quorum"),
    ],
)
def test_what_cannot_be_the_same_on_every_worker_is_refused(options, words):
    model = make_model()
    optimizer = adam(model) if options else None
    with pytest.raises(ConfigError, match=words):
        psq.torch.Worker(model, recipe="average", optimizer=optimizer, **options)


def test_an_optimizer_is_refused_by_recipes_that_step_themselves():
    model = make_model()
    with pytest.raises(ConfigError, match="takes its own steps"):
        psq.torch.Worker(model, recipe="server-adam", optimizer=adam(model))


def test_a_parameter_that_the_optimizer_does_not_have_is_named():
    model = make_model()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=LR)
    with pytest.raises(ConfigError, match=r"parameter '2.weight' is in none of the optimizer's"):
        psq.torch.Worker(model, recipe="average", optimizer=optimizer)


def test_local_parameters_of_the_optimizer_step_with_their_own_gradient(join):
    model = make_model()
    worker = psq_worker(
        join, model, torch.optim.SGD(model.parameters(), lr=LR), groups=[Group("2.*", local=True)]
    )
    loss_of(model, 0).backward()
    head = values(model[2])
    gradient = torch.cat([p.grad.ravel() for p in model[2].parameters()]).clone()
    worker.step()
    np.testing.assert_allclose(values(model[2]), head - LR * gradient.numpy(), rtol=1e-6)


def psq_worker(join, model, optimizer, **options) -> psq.torch.Worker:
    return join(model, optimizer=optimizer, **{"recipe": "average", "lr": None, **options})

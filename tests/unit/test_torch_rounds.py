"""Rounds that are not everybody's, and workers that count differently."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import psq.torch
from psq import layout
from psq.errors import UsageError
from psq.presets import preset

LR = 0.05


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def loss_of(model: nn.Module, seed) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((8, 4), np.float32))
    return nn.functional.mse_loss(model(x), torch.sin(x[:, :2]))


def values(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().copy()


def together(serve, workers: int, work, **options) -> list:
    """Run work(rank, model, worker) in a thread for each rank; returns what they return."""
    endpoint = serve().endpoint
    models = [make_model() for _ in range(workers)]  # torch's seed belongs to all threads

    def run(rank: int):
        model = models[rank]
        mine = {k: v[rank] if isinstance(v, list) else v for k, v in options.items()}
        mine = {"lr": LR, "recipe": "fp32", "give_up_after_s": 20.0, **mine}
        settings = {"rank": rank, "world_size": workers, **mine}
        with psq.torch.Worker(model, **{"connect": endpoint, **settings}) as worker:
            return work(rank, model, worker)

    with ThreadPoolExecutor(workers) as pool:
        return [each.result(60) for each in [pool.submit(run, rank) for rank in range(workers)]]


def test_a_round_that_one_sits_out_is_the_others_and_all_have_the_same_weights(serve):
    def work(rank, model, worker):
        seen, reports = [], []
        for step in range(6):
            if rank == step % 3:
                reports.append(worker.sit_out())
            else:
                loss_of(model, (step, rank)).backward()
                assert worker.step().applied
            seen.append(values(model).tobytes())
        return seen, reports

    runs = together(serve, 3, work, recipe="server-adam")
    assert runs[0][0] == runs[1][0] == runs[2][0]
    for report in (report for _, reports in runs for report in reports):
        assert (report.applied, report.reason) == (False, psq.torch.SAT_OUT)
        assert report.version == report.step + 1
    assert [len(reports) for _, reports in runs] == [2, 2, 2]


def test_who_sits_out_does_not_count_in_the_mean(serve):
    def work(rank, model, worker):
        if rank == 1:
            worker.sit_out()
        else:
            loss_of(model, 0).backward()
            worker.step()
        return values(model)

    def alone(_, model, worker):
        loss_of(model, 0).backward()
        worker.step()
        return values(model)

    both, [one] = together(serve, 2, work), together(serve, 1, alone)
    assert both[0].tobytes() == both[1].tobytes() == one.tobytes()


@pytest.mark.parametrize("consistency", ["ssp:2", "asp", "bsp,quorum=1"])
def test_a_round_can_be_sat_out_where_workers_are_apart_too(serve, consistency):
    def work(rank, model, worker):
        for step in range(6):
            if (step + rank) % 2:
                assert worker.sit_out().reason
            else:
                loss_of(model, (step, rank)).backward()
                worker.step()
        return np.isfinite(values(model)).all()

    assert all(together(serve, 2, work, recipe="server-adam", consistency=consistency))


def test_a_round_is_sat_out_at_every_server(serve, monkeypatch):
    monkeypatch.setattr(layout, "SPLIT_NUMEL", 8)
    monkeypatch.setattr(layout, "MAX_SHARD_NUMEL", 16)
    servers = [serve().endpoint for _ in range(2)]

    def work(rank, model, worker):
        assert worker.plan.servers == 2
        seen = []
        for step in range(4):
            if rank == step % 2:
                assert worker.sit_out().version == step + 1
            else:
                loss_of(model, (step, rank)).backward()
                assert worker.step().applied
            seen.append(values(model).tobytes())
        return seen

    first, second = together(serve, 2, work, recipe="server-adam", connect=[servers, servers])
    assert first == second
    assert len(set(first)) == 4


def test_who_sits_out_keeps_residual_and_moments_and_loses_old_gradients(join):
    model = make_model()
    worker = join(model, recipe="qadam-1bit")
    for step in range(3):
        loss_of(model, step).backward()
        worker.step()
    state = {k: v.copy() for k, v in worker._compressor.state_arrays().items()}
    before = values(model)
    loss_of(model, 3).backward()
    report = worker.sit_out()
    assert (report.version, worker.skipped) == (4, 0)
    assert not any(p.grad.any() for p in model.parameters())
    assert values(model).tobytes() == before.tobytes()  # nobody said anything
    for name, array in worker._compressor.state_arrays().items():
        assert array.tobytes() == state[name].tobytes(), name
    loss_of(model, 4).backward()
    assert worker.step().applied


def test_with_local_steps_a_whole_round_is_sat_out_or_none(join):
    model = make_model()
    recipe = preset("local-adam").with_rhythm(local_steps=3)
    worker = join(model, recipe=recipe)
    worker.sit_out()
    assert (worker.version, worker.steps) == (1, 3)
    loss_of(model, 0).backward()
    worker.step()
    with pytest.raises(UsageError, match="1 local steps of this round are not said yet"):
        worker.sit_out()
    for step in (1, 2):
        loss_of(model, step).backward()
        report = worker.step()
    assert (report.applied, worker.version) == (True, 2)


def test_a_round_that_backward_has_spoken_in_cannot_be_sat_out(join):
    model = make_model()
    worker = join(model, overlap=True)
    worker.sit_out()
    loss_of(model, 0).backward()
    with pytest.raises(UsageError, match="backward has sent gradients of this round"):
        worker.sit_out()
    assert worker.step().applied


def test_gradients_that_are_being_accumulated_are_not_dropped(join):
    worker = join(make_model())
    with worker.no_sync(), pytest.raises(UsageError, match="being accumulated"):
        worker.sit_out()


def test_a_worker_counts_as_often_as_its_weight_says(serve):
    """SGD of the weighted mean, which is 3/4 of one gradient and 1/4 of the other."""
    recipe = dense_sgd()

    def work(rank, model, worker):
        loss_of(model, rank).backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).numpy().copy()
        before = values(model)
        assert worker.step().applied
        return gradient, before - values(model)

    [(first, moved), (second, _)] = together(serve, 2, work, recipe=recipe, weight=[3, 1])
    np.testing.assert_allclose(moved, LR * (3 * first + second) / 4, rtol=1e-3, atol=1e-7)


def test_a_weight_may_change_between_steps(serve):
    def work(rank, model, worker):
        moves = []
        for step in range(2):
            worker.weight = 1 + 4 * rank * step
            loss_of(model, (rank, step)).backward()
            gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).numpy().copy()
            before = values(model)
            worker.step()
            moves.append((gradient, before - values(model)))
        return moves

    first, second = together(serve, 2, work, recipe=dense_sgd())
    for step, (one, other) in enumerate(((0.5, 0.5), (1 / 6, 5 / 6))):
        expected = LR * (one * first[step][0] + other * second[step][0])
        np.testing.assert_allclose(first[step][1], expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("weight", [0, -1, 1.5, True, 2**32])
def test_a_weight_that_is_no_count_is_refused(join, weight):
    worker = join(make_model())
    with pytest.raises(UsageError, match="a worker that is to count nothing sits out"):
        worker.weight = weight


def test_a_weight_is_refused_where_every_worker_counts_once(join):
    worker = join(make_model(), recipe=preset("ef-sgd").with_options("aggregate=median"))
    worker.weight = 1
    with pytest.raises(UsageError, match="aggregate=median counts every worker once"):
        worker.weight = 2


def dense_sgd():
    return (
        preset("dist-ef-sgdm")
        .with_options("direction.beta=0")
        .with_codecs(uplink="fp32", downlink="weights:fp32")
    )

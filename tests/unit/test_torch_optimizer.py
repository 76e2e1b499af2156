"""`ps.optimizer`: torch's schedulers and loops drive a worker."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from psq.errors import UsageError
from psq.presets import preset
from psq.torch import Group

LR = 0.05
STEPS = 12


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    rng = np.random.default_rng(step)
    x = torch.from_numpy(rng.standard_normal((8, 4), np.float32))
    return nn.functional.mse_loss(model(x), torch.sin(x[:, :2]))


def values(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().copy()


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, 2 * LR, total_steps=STEPS, cycle_momentum=False)


def plateau(optimizer):
    return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)


@pytest.mark.parametrize("make", [cosine, one_cycle, plateau])
@pytest.mark.parametrize("through", ["worker", "optimizer"])
def test_a_scheduler_of_torch_moves_the_rate_as_it_does_for_torchs_own_adam(join, make, through):
    twin, model = make_model(), make_model()
    own = torch.optim.Adam(twin.parameters(), lr=LR)
    worker = join(model, lr=LR)
    schedules = make(own), make(worker.optimizer)
    rates = set()
    for step in range(STEPS - 1):
        losses = [loss_of(each, step) for each in (twin, model)]
        for loss in losses:
            loss.backward()
        own.step()
        own.zero_grad()
        rates.add(worker.lr)
        assert worker.lr == own.param_groups[0]["lr"]
        if through == "worker":
            assert worker.step().lr == own.param_groups[0]["lr"]
        else:
            worker.optimizer.step()
            worker.optimizer.zero_grad()
        for schedule in schedules:
            schedule.step(*([losses[0].item()] if make is plateau else []))
    assert len(rates) > 3
    assert worker.version == STEPS - 1
    np.testing.assert_allclose(values(model), values(twin), rtol=1e-5, atol=1e-6)


def test_groups_keep_their_proportions_under_a_scheduler(join):
    twin, model = make_model(), make_model()
    head = [*twin[2].parameters()]
    own = torch.optim.Adam(
        [{"params": twin[0].parameters()}, {"params": head, "lr": LR / 4}], lr=LR
    )
    worker = join(model, lr=LR, groups=[Group("2.*", name="head", lr_factor=0.25)])
    assert [g["lr"] for g in worker.optimizer.param_groups] == [LR, LR / 4]
    assert [g["name"] for g in worker.optimizer.param_groups] == ["default", "head"]
    schedules = cosine(own), cosine(worker.optimizer)
    for step in range(STEPS - 1):
        loss_of(twin, step).backward()
        own.step()
        own.zero_grad()
        loss_of(model, step).backward()
        assert worker.step().applied
        for schedule in schedules:
            schedule.step()
    np.testing.assert_allclose(values(model), values(twin), rtol=1e-5, atol=1e-6)


def test_groups_that_leave_their_proportions_are_refused_where_the_server_has_the_rate(join):
    model = make_model()
    worker = join(model, lr=LR, groups=[Group("2.*", name="head", lr_factor=0.25)])
    worker.optimizer.param_groups[1]["lr"] = LR
    loss_of(model, 0).backward()
    with pytest.raises(UsageError, match=r"group 'head' has the rate 0.05, its lr_factor of 0.25"):
        worker.step()
    assert worker.version == 0
    worker.optimizer.param_groups[1]["lr"] = LR / 4
    assert worker.step().applied


def test_where_workers_have_the_rate_groups_may_go_their_own_way(join):
    """Adam on the worker, nothing compressed: as torch's with the same rates in each step."""
    twin, model = make_model(), make_model()
    groups = [{"params": twin[0].parameters()}, {"params": twin[2].parameters(), "lr": LR / 4}]
    own = torch.optim.Adam(groups, lr=LR)
    recipe = preset("qadam").with_codecs(uplink="fp32", downlink="weights:fp32")
    worker = join(model, recipe=recipe, lr=LR, groups=[Group("2.*", lr_factor=0.25)])
    for step in range(6):
        for optimizer in (own, worker.optimizer):
            optimizer.param_groups[0]["lr"] = 0.0 if step == 3 else LR / (1 + step)
            optimizer.param_groups[1]["lr"] = LR * (1 + step) / 10
        loss_of(twin, step).backward()
        own.step()
        own.zero_grad()
        loss_of(model, step).backward()
        assert worker.step().applied
    np.testing.assert_allclose(values(model), values(twin), rtol=1e-5, atol=1e-6)


def test_a_scheduler_never_says_that_steps_were_taken_out_of_order(join):
    model = make_model()
    worker = join(model)
    schedule = lr_scheduler.StepLR(worker.optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model, 0).backward()
        worker.step()
        schedule.step()
    assert worker.lr == pytest.approx(0.1 * LR)


def test_a_closure_computes_the_gradients_and_its_loss_comes_back(join):
    model = make_model()
    worker = join(model)

    def closure() -> torch.Tensor:
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    expected = loss_of(model, 0).item()
    with torch.no_grad():
        assert worker.optimizer.step(closure).item() == expected
    assert worker.version == 1


def test_the_rate_that_is_set_on_the_worker_is_the_optimizers(join):
    worker = join(make_model(), groups=[Group("2.*", lr_factor=0.5)])
    assert worker.optimizer is worker.optimizer
    worker.lr = 0.02
    assert [g["lr"] for g in worker.optimizer.param_groups] == [0.02, 0.01]
    with pytest.raises(UsageError, match=r"ps\.optimizer has the rates now"):
        worker.lr = lambda step: 1.0 / (1 + step)


def test_a_rate_that_is_a_function_leaves_schedulers_nothing(join):
    worker = join(make_model(), lr=lambda step: 0.1 / (1 + step))
    with pytest.raises(UsageError, match="leaves an optimizer's scheduler nothing"):
        _ = worker.optimizer


def test_its_state_is_the_rates_and_another_optimizers_state_is_refused(join):
    model = make_model()
    worker = join(model, lr=LR)
    worker.optimizer.param_groups[0]["lr"] = 0.007
    state = worker.optimizer.state_dict()
    assert state["state"] == {}
    worker.lr = LR
    worker.optimizer.load_state_dict(state)
    assert worker.lr == 0.007
    adam = torch.optim.Adam(model.parameters())
    loss_of(model, 0).backward()
    adam.step()
    with pytest.raises(UsageError, match="another optimizer's moments"):
        worker.optimizer.load_state_dict(adam.state_dict())


def test_its_groups_are_fixed_and_local_parameters_are_in_none(join):
    model = make_model()
    worker = join(model, groups=[Group("2.*", local=True)])
    assert [p.shape for g in worker.optimizer.param_groups for p in g["params"]] == [(8, 4), (8,)]
    with pytest.raises(UsageError, match="groups of a job are fixed"):
        worker.optimizer.add_param_group({"params": [*model[2].parameters()]})


def test_a_momentum_that_cycles_is_refused_by_torch(join):
    worker = join(make_model())
    with pytest.raises(ValueError, match="momentum"):
        lr_scheduler.OneCycleLR(worker.optimizer, LR, total_steps=STEPS)


def test_vectors_go_through_the_optimizer_too(join):
    model = make_model()
    worker = join(model)
    schedule = cosine(worker.optimizer)
    vectors = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    assert worker.step(vectors=vectors).applied
    schedule.step()
    assert worker.lr < LR

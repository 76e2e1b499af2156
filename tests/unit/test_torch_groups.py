"""Parameter groups: local, received, with rates and codecs of their own."""

import numpy as np
import pytest
import torch
from torch import nn

import psq.torch
from psq.errors import ConfigError
from psq.recipe import AdamConfig
from psq.torch import Group
from psq.torch.groups import group_up

LR = 0.05


def make_model(seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict({"body": nn.Linear(4, 8), "head": nn.Linear(8, 2)})


def loss_of(model: nn.ModuleDict, step: int) -> torch.Tensor:
    rng = np.random.default_rng(step)
    x = torch.from_numpy(rng.standard_normal((8, 4), np.float32))
    return nn.functional.mse_loss(model["head"](torch.tanh(model["body"](x))), torch.sin(x[:, :2]))


def values(module: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).numpy().copy()


def run(model: nn.ModuleDict, worker: psq.torch.Worker, steps: int) -> None:
    for step in range(steps):
        loss_of(model, step).backward()
        assert worker.step().applied


def test_names_are_found_by_pattern_and_parameters_by_identity():
    model = make_model()
    grouping = group_up(
        model, [Group("head.*", lr_factor=0.5), Group(model["body"].bias, local=True)]
    )
    assert grouping.numbers == {"head.weight": 1, "head.bias": 1}
    assert grouping.local == {"body.bias"}
    assert [group.lr for group in grouping.groups] == [1.0, 0.5]
    assert grouping.groups[1].name == "group1"


def test_a_parameter_with_two_names_answers_to_both():
    model = make_model()
    model["again"] = model["head"]
    grouping = group_up(model, [Group("again.*", lr_factor=0.5)])
    assert set(grouping.numbers) == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (lambda _: [Group("tail.*")], "no parameter is called 'tail.*'; there are body.weight"),
        (lambda _: [Group(nn.Parameter(torch.ones(3)))], r"of shape \[3\] is not in the model"),
        (lambda _: [Group("head.*"), Group("*.bias")], "'head.bias' is in group of 'head.*' and"),
        (lambda _: [Group("head.*", name="x"), Group("body.*", name="x")], "two groups are called"),
        (lambda m: [Group(m["head"].requires_grad_(False).weight)], "are frozen"),  # noqa: FBT003
    ],
)
def test_groups_that_cannot_be_told_apart_are_refused(groups, words):
    model = make_model()
    with pytest.raises(ConfigError, match=words):
        group_up(model, groups(model))


@pytest.mark.parametrize("which", [[], 3, ["head.*", object()]])
def test_a_group_of_something_else_is_refused(which):
    with pytest.raises(ConfigError, match="made of parameter names or parameters, got"):
        Group(which)


def test_of_local_parameters_nothing_can_be_said():
    with pytest.raises(ConfigError, match="the user's own optimizer's: lr_factor"):
        Group("head.*", local=True, uplink="sign")


def test_a_model_that_is_all_local_has_nothing_to_train(join):
    with pytest.raises(ConfigError, match="nothing to train"):
        join(make_model(), groups=[Group("*", local=True)])


def test_local_parameters_are_in_no_plan_and_stepped_by_their_own_optimizer(join):
    model, start = make_model(), values(make_model()["head"])
    worker = join(model, groups=[Group("head.*", local=True)])
    own = torch.optim.SGD(model["head"].parameters(), lr=0.1)
    assert [name for name, _ in worker.plan.tensors] == ["body.weight", "body.bias"]
    loss_of(model, 0).backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in model["head"].parameters()]).numpy().copy()
    body = values(model["body"])
    assert worker.step().applied
    assert values(model["head"]).tobytes() == start.tobytes()
    assert (values(model["body"]) != body).any()
    own.step()
    np.testing.assert_allclose(values(model["head"]), start - 0.1 * gradient, rtol=1e-6)


def test_workers_share_what_is_not_local_and_nothing_else(serve):
    """Two workers, the same batches, other heads: bodies equal, heads apart."""
    import threading  # noqa: PLC0415 - here alone

    served, ended, models = serve(), {}, [make_model(0), make_model(1)]

    def work(rank: int) -> None:
        model = models[rank]
        options = {"connect": served.endpoint, "rank": rank, "world_size": 2, "recipe": "fp32"}
        own = torch.optim.SGD(model["head"].parameters(), lr=0.1)
        groups = [Group("head.*", local=True)]
        with psq.torch.Worker(model, lr=LR, groups=groups, **options) as worker:
            for step in range(5):
                loss_of(model, step).backward()
                worker.step()
                own.step()
                own.zero_grad()
            ended[rank] = values(model["body"]), values(model["head"])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ended[0][0].tobytes() == ended[1][0].tobytes()
    assert not np.allclose(ended[0][1], ended[1][1])


def test_frozen_parameters_are_left_out_without_a_group(join):
    model = make_model()
    model["head"].requires_grad_(False)  # noqa: FBT003 - torch's own signature
    worker = join(model)
    assert [name for name, _ in worker.plan.tensors] == ["body.weight", "body.bias"]


@pytest.mark.parametrize("recipe", ["fp32", "dense-qadam"])
def test_a_groups_rate_is_the_workers_times_its_factor(join, recipe):
    """As torch's Adam with two param groups; on the server, and on the worker."""
    if recipe == "dense-qadam":
        recipe = psq.presets.preset("qadam", AdamConfig()).with_codecs(
            uplink="fp32", downlink="weights:fp32"
        )
    twin, model = make_model(), make_model()
    optimizer = torch.optim.Adam(
        [
            {"params": [*twin["body"].parameters()], "lr": LR},
            {"params": [*twin["head"].parameters()], "lr": 0.1 * LR},
        ]
    )
    worker = join(model, recipe=recipe, lr=LR, groups=[Group("head.*", lr_factor=0.1)])
    for step in range(5):
        optimizer.zero_grad()
        loss_of(twin, step).backward()
        optimizer.step()
        loss_of(model, step).backward()
        assert worker.step().lr == LR
    np.testing.assert_allclose(values(model), values(twin), rtol=5e-6, atol=5e-7)


def test_a_groups_codecs_are_its_own_both_ways(join):
    """The head in full precision follows plain Adam, the body in one bit cannot."""
    twin, model = make_model(), make_model()
    group = Group("head.*", uplink="fp32", downlink="fp32")
    worker = join(model, recipe="server-adam", groups=[group])
    head = [shard.index for shard in worker.plan.layout.shards if shard.group == 1]
    assert [worker.plan.uplink_codecs(shard) for shard in head] == [("fp32",)]
    optimizer = torch.optim.Adam(twin.parameters(), lr=LR)
    loss_of(twin, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    run(model, worker, 1)
    np.testing.assert_allclose(values(model["head"]), values(twin["head"]), rtol=1e-6, atol=1e-7)
    for step in (1, 2):
        for each in (twin, model):
            loss_of(each, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        worker.step()
    assert not np.allclose(values(model["body"]), values(twin["body"]), rtol=1e-3)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_parameters_that_are_only_received_stay_as_the_server_has_them(join, overlap, trainable):
    """They need no gradient here, and one that they have is not sent."""
    model = make_model()
    model["body"].requires_grad_(trainable)
    worker = join(model, groups=[Group("body.*", pushed=False)], overlap=overlap)
    assert [name for name, _ in worker.plan.tensors][:2] == ["body.weight", "body.bias"]
    before = values(model["body"])
    head = values(model["head"])
    run(model, worker, 3)
    assert values(model["body"]).tobytes() == before.tobytes()
    assert (values(model["head"]) != head).any()


def test_a_worker_that_comes_later_receives_what_is_only_received(join):
    model, late = make_model(), make_model(seed=1)
    groups = [Group("body.*", pushed=False)]
    worker = join(model, groups=groups)
    run(model, worker, 2)
    join(late, groups=groups)  # takes the rank over
    assert values(late).tobytes() == values(model).tobytes()

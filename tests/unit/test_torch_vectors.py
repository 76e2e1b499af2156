"""Vectors of the user's own in the place of gradients."""

import numpy as np
import pytest
import torch
from torch import nn

from psq.errors import UsageError
from psq.torch import Group


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    rng = np.random.default_rng(step)
    x = torch.from_numpy(rng.standard_normal((8, 4), np.float32))
    return nn.functional.mse_loss(model(x), torch.sin(x[:, :2]))


def gradients_of(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    names = [name for name, _ in model.named_parameters()]
    return dict(
        zip(names, torch.autograd.grad(loss_of(model, step), [*model.parameters()]), strict=True)
    )


def values(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().copy()


@pytest.mark.parametrize("recipe", ["server-adam", "qadam-1bit", "local-adam"])
def test_vectors_are_treated_as_gradients_are(join, serve, recipe):
    ended = []
    for given in (False, True):
        model = make_model()
        worker = join(model, recipe=recipe, connect=serve().endpoint)
        for step in range(9):
            if given:
                worker.step(vectors=gradients_of(model, step))
            else:
                loss_of(model, step).backward()
                worker.step()
        ended.append(values(model))
    assert ended[0].tobytes() == ended[1].tobytes()


def test_vectors_are_only_read_and_gradients_are_zero_afterwards(join):
    model = make_model()
    worker = join(model)
    loss_of(model, 0).backward()
    vectors = {name: torch.full_like(p, 2.0) for name, p in model.named_parameters()}
    assert worker.step(vectors=vectors).applied
    assert all((vector == 2.0).all() for vector in vectors.values())
    assert not any(p.grad.any() for p in model.parameters())
    loss_of(model, 1).backward()
    before = values(model)
    assert worker.step().applied
    assert (values(model) != before).any()


def test_a_vector_in_another_order_of_memory_is_read_in_the_tensors_order(join, serve):
    ended = []
    for turned in (False, True):
        model = make_model()
        worker = join(model, connect=serve().endpoint)
        vectors = gradients_of(model, 0)
        if turned:
            vectors = {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in vectors.items()}
            assert not vectors["0.weight"].is_contiguous()
        worker.step(vectors=vectors)
        ended.append(values(model))
    assert ended[0].tobytes() == ended[1].tobytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.pop("2.bias"), "none for '2.bias'; give zeros"),
        (
            lambda v: v.update(more=torch.ones(1)),
            "'more' is no parameter that is pushed; there are",
        ),
        (lambda v: v.update({"2.bias": torch.ones(3)}), r"'2.bias' has the shape \[3\], the param"),
        (lambda v: v.update({"2.bias": torch.ones(2, dtype=torch.float64)}), "is torch.float64"),
        (lambda v: v.update({"2.bias": [1.0, 2.0]}), "is a list, expected a tensor"),
        (lambda v: v["2.bias"].fill_(float("nan")), "'2.bias' holds NaN or Inf; nothing was sent"),
    ],
)
def test_vectors_that_are_not_what_they_should_be_are_refused_before_anything_is_sent(
    join, change, words
):
    model = make_model()
    worker = join(model)
    vectors = gradients_of(model, 0)
    change(vectors)
    with pytest.raises(UsageError, match=words):
        worker.step(vectors=vectors)
    assert worker.version == 0
    assert worker.step(vectors=gradients_of(model, 0)).applied  # the worker goes on


def test_there_are_vectors_for_what_is_pushed_only(join):
    model = make_model()
    worker = join(model, groups=[Group("0.*", pushed=False), Group("2.bias", local=True)])
    vectors = gradients_of(model, 0)
    assert worker.step(vectors={"2.weight": vectors["2.weight"]}).applied


def test_where_gradients_leave_early_vectors_come_too_late(join):
    model = make_model()
    worker = join(model, overlap=True)
    with pytest.raises(UsageError, match="use overlap=False"):
        worker.step(vectors=gradients_of(model, 0))


def test_vectors_are_not_accumulated(join):
    model = make_model()
    worker = join(model)
    with worker.no_sync(), pytest.raises(UsageError, match="add them up and push the sum"):
        worker.step(vectors=gradients_of(model, 0))

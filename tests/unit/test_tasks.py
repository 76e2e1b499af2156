"""Tasks: the order of samples, the models, and how a task is found."""

import sys
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from psq.errors import ConfigError, UsageError
from psq_worker.tasks import JobDefaults, Task, check_model, get_task, job_defaults
from psq_worker.tasks.base import EpochOrder, seeded, slice_of
from psq_worker.tasks.char_lm import CONTEXT, CharLm
from psq_worker.tasks.fashion_mnist import FashionMnist
from psq_worker.tasks.make_data import gzip_bytes

PARAMETERS = {"fashion-mnist": 1_227_274, "fashion-resnet": 695_658, "char-lm": 623_824}


@pytest.fixture(scope="module", params=sorted(PARAMETERS))
def task(request):
    return get_task(request.param, subset=True)


def draw(task, count, **where):
    settings_of_all = {"rank": 0, "world_size": 1, "batch_size": 4, "seed": 3}
    return list(islice(task.batches(**{**settings_of_all, **where}), count))


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_every_task_satisfies_the_protocol_and_describes_its_data(task):
    assert isinstance(task, Task)
    assert isinstance(task.defaults, JobDefaults)
    assert "psq" in task.description


def test_the_models_have_the_sizes_the_documentation_says(task):
    assert sum(p.numel() for p in task.model(0).parameters()) == PARAMETERS[task.name]


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before(task):
    first = weights_of(task.model(5))
    torch.rand(17)
    assert torch.equal(first, weights_of(task.model(5)))
    assert not torch.equal(first, weights_of(task.model(6)))


def test_making_a_model_leaves_the_random_numbers_outside_alone(task):
    with seeded(1):
        expected = torch.rand(3)
    with seeded(1):
        task.model(9)
        assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_slices_make_up_the_global_batch_of_one_process(task, world_size):
    whole = draw(task, 2, batch_size=8)
    parts = [
        draw(task, 2, rank=rank, world_size=world_size, batch_size=8 // world_size)
        for rank in range(world_size)
    ]
    for step, (inputs, targets) in enumerate(whole):
        assert torch.equal(inputs, torch.cat([part[step][0] for part in parts]))
        assert torch.equal(targets, torch.cat([part[step][1] for part in parts]))


def test_a_run_that_goes_on_sees_the_batches_it_would_have_seen(task):
    straight = draw(task, 4)[2:]
    resumed = draw(task, 2, start_step=2)
    assert all(
        torch.equal(a, b)
        for one, two in zip(straight, resumed, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def test_every_step_has_samples_of_its_own(task):
    first, second, third = (inputs for inputs, _ in draw(task, 3))
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_another_seed_gives_other_batches(task):
    assert not torch.equal(draw(task, 1)[0][0], draw(task, 1, seed=4)[0][0])


def test_evaluation_gives_the_metric_and_leaves_the_model_training(task):
    model = task.model(0)
    scores = task.evaluate(model)
    assert model.training
    assert np.isfinite(scores[task.metric])
    assert scores == task.evaluate(model)


def test_a_few_steps_of_descent_lower_the_loss(task):
    model = task.model(0)
    (batch,) = draw(task, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("rank", "world_size", "batch_size"), [(2, 2, 4), (-1, 2, 4), (0, 0, 4), (0, 1, 0)]
)
def test_an_impossible_slice_is_refused(rank, world_size, batch_size):
    with pytest.raises(UsageError):
        slice_of(rank=rank, world_size=world_size, batch_size=batch_size)


@given(
    samples=st.integers(1, 50),
    start=st.integers(0, 120),
    count=st.integers(0, 120),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=50, deadline=None)
def test_any_window_of_the_order_is_a_window_of_whole_permutations(samples, start, count, seed):
    epochs = -(-(start + count) // samples)
    whole = EpochOrder(samples, seed).take(0, epochs * samples)
    assert all(
        sorted(epoch) == list(range(samples)) for epoch in whole.reshape(epochs, samples).tolist()
    )
    assert EpochOrder(samples, seed).take(start, count).tolist() == whole[start:][:count].tolist()


def test_each_epoch_is_another_permutation():
    order = EpochOrder(100, seed=3)
    epochs = [order.take(start, 100).tolist() for start in (0, 100, 200)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(100))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_an_order_of_no_samples_is_refused():
    with pytest.raises(UsageError, match="at least one sample"):
        EpochOrder(0, 1)


def test_the_transformer_never_looks_ahead():
    model = CharLm().model(0)
    text = torch.zeros(1, CONTEXT, dtype=torch.long)
    other = text.clone()
    other[0, 40:] = 7
    torch.testing.assert_close(model(text)[:, :40], model(other)[:, :40])
    assert not torch.allclose(model(text)[:, 40:], model(other)[:, 40:])


def test_the_following_characters_are_the_targets():
    here, following = draw(CharLm(), 1)[0]
    assert torch.equal(here[:, 1:], following[:, :-1])


def test_the_held_out_text_is_the_last_tenth_and_never_trained_on():
    task = CharLm()
    raw_train, raw_validation = task._train, task._validation
    assert len(raw_validation) == (len(raw_train) + len(raw_validation)) // 10
    (here, following), *_ = draw(task, 1, batch_size=512)
    windows = torch.cat([here, following[:, -1:]], dim=1).numpy()
    text = raw_train.tobytes()
    assert all(window.tobytes() in text for window in windows)


def seen_by_evaluation(task):
    model, seen = task.model(0), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    task.evaluate(model)
    return torch.cat(seen)


def test_the_transformer_is_scored_on_the_held_out_text():
    task = CharLm()
    text = task._validation.tobytes()
    windows = seen_by_evaluation(task).numpy()
    assert len(np.unique(windows, axis=0)) == 256
    assert all(window.tobytes() in text for window in windows)


def test_the_convolutional_network_is_scored_on_all_test_images():
    task = FashionMnist(subset=True)
    expected = (task._data.test_images / 255 - 0.2860) / 0.3530
    np.testing.assert_allclose(seen_by_evaluation(task)[:, 0], expected, atol=1e-5)


def test_a_text_too_short_to_train_on_is_refused(tmp_path):
    short = tmp_path / "short.gz"
    short.write_bytes(gzip_bytes(b"to be or not to be"))
    with pytest.raises(ConfigError, match="18 characters"):
        CharLm(short)


@pytest.mark.parametrize("content", [None, b"not gzip", b""])
def test_a_text_that_cannot_be_read_is_refused_by_name(tmp_path, content):
    path = tmp_path / "text.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"text\.gz|0 characters"):
        CharLm(path)


def test_images_are_standardized():
    (images, labels), *_ = draw(FashionMnist(subset=True), 1, batch_size=2_000)
    assert images.shape == (2_000, 1, 28, 28)
    assert images.dtype == torch.float32
    assert abs(images.mean().item()) < 0.05
    assert abs(images.std().item() - 1) < 0.05
    assert labels.unique().tolist() == list(range(10))


class Tiny:
    """A user's task with only what the protocol asks for."""

    name = "tiny"
    metric = "score"

    def model(self, seed):  # noqa: ARG002
        return nn.Linear(1, 1)

    def loss(self, model, batch):
        return model(batch).sum()

    def batches(self, *, rank, world_size, batch_size, seed, start_step=0):  # noqa: ARG002
        yield torch.ones(batch_size, 1)

    def evaluate(self, model):  # noqa: ARG002
        return {"score": 1.0}


@pytest.fixture
def user_module(monkeypatch, tmp_path):
    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)

    yield write
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_a_users_task_is_found_as_class_instance_or_function(user_module):
    user_module("users_task", "made = made_by = Class = None\ndef make():\n    return made\n")
    module = __import__("users_task")
    module.Class, module.made = Tiny, Tiny()
    for attribute in ("Class", "made", "make"):
        task = get_task(f"users_task:{attribute}")
        assert isinstance(task, Tiny)
        assert job_defaults(task) == JobDefaults()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar", "no task 'cifar': expected one of fashion-mnist, fashion-resnet, char-lm"),
        ("no_such_module_at_all:task", "no module 'no_such_module_at_all'"),
        ("users_errors:absent", "has no attribute 'absent'"),
        ("users_errors:NUMBER", "got int without name, metric, model"),
        ("users_errors:wants_more", "calling it without arguments failed"),
        ("users_errors:makes_nothing", "got NoneType without name"),
        ("users_broken:task", "imports 'absent_library', which is missing"),
        (":task", "no module name"),
    ],
)
def test_what_is_no_task_is_refused_with_the_reason(user_module, spec, message):
    user_module(
        "users_errors",
        "NUMBER = 7\ndef wants_more(size): return size\ndef makes_nothing(): return None\n",
    )
    user_module("users_broken", "import absent_library\n")
    with pytest.raises(ConfigError, match=message):
        get_task(spec)


def test_a_data_folder_for_a_task_without_one_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="reads no data folder"):
        get_task("char-lm", data_dir=tmp_path)


@pytest.mark.parametrize(
    "model",
    [nn.ReLU(), nn.Linear(2, 2).requires_grad_(requires_grad=False)],
    ids=["none", "frozen"],
)
def test_a_model_with_nothing_to_train_is_refused(model):
    with pytest.raises(ConfigError, match="nothing to train"):
        check_model(Tiny(), model)

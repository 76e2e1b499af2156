"""The segment table: which memory is encoded and decoded, and what is refused by name."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from psq.errors import ConfigError, UsageError
from psq.layout import PART_NUMEL, Layout, cut
from psq.torch.parameters import ParameterTable


def table_of(model: nn.Module, bytes_per_value: int = 4) -> tuple[ParameterTable, Layout]:
    table = ParameterTable(model)
    layout = cut(table.specs, [lambda numel: numel * bytes_per_value])
    table.bind(layout)
    return table, layout


def flat(segments: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(segments)


def backward(model: nn.Module, *shape: int) -> None:
    model(torch.ones(shape)).sum().backward()


def test_weights_are_the_parameters_own_memory_in_order():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    table, layout = table_of(model)
    assert [name for name, _ in table.specs] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    expected = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()
    assert len(layout.shards) == 1
    np.testing.assert_array_equal(flat(table.weights(0)), expected)
    table.weights(0)[1][:] = 7.0
    assert model[0].bias.tolist() == [7.0, 7.0]


def test_a_large_tensor_is_cut_over_shards_and_stays_one_memory():
    model = nn.Linear(600, 600)
    table, layout = table_of(model)
    assert len(layout.shards) == 2
    for shard in layout.shards:
        for view in table.weights(shard.index):
            view[:] = shard.index + 1.0
    values = torch.cat([model.weight.detach().reshape(-1), model.bias.detach()])
    first = layout.shards[0].numel
    assert (values[:first] == 1.0).all()
    assert (values[first:] == 2.0).all()


def test_gradients_are_read_where_they_lie():
    model = nn.Linear(3, 2)
    table, _ = table_of(model)
    backward(model, 1, 3)
    assert table.refresh() == 2
    weight, bias = table.gradients(0)
    assert weight.__array_interface__["data"][0] == model.weight.grad.data_ptr()
    assert weight.tolist() == [1.0] * 6
    assert bias.tolist() == [1.0, 1.0]


def test_views_are_kept_while_the_gradient_stays_and_renewed_when_it_does_not():
    model = nn.Linear(3, 2)
    table, _ = table_of(model)
    backward(model, 1, 3)
    table.refresh()
    before = table.gradients(0)[0]
    table.zero_gradients()
    backward(model, 1, 3)
    table.refresh()
    assert table.gradients(0)[0] is before
    model.zero_grad(set_to_none=True)
    backward(model, 2, 3)
    table.refresh()
    assert table.gradients(0)[0] is not before
    assert table.gradients(0)[0].tolist() == [2.0] * 6


def test_gradients_that_are_new_each_step_are_not_held_on_to():
    model = nn.Linear(3, 2)
    table, _ = table_of(model)
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        backward(model, 1, 3)
        table.refresh()
        table.zero_gradients()
    last = weakref.ref(model.weight.grad.untyped_storage())
    model.zero_grad(set_to_none=True)
    gc.collect()
    assert last() is None


def test_zeroing_keeps_the_gradients_memory():
    model = nn.Linear(3, 2)
    table, _ = table_of(model)
    backward(model, 1, 3)
    table.refresh()
    address = model.weight.grad.data_ptr()
    table.zero_gradients()
    assert model.weight.grad.data_ptr() == address
    assert not model.weight.grad.any()


def test_what_was_cleared_already_is_not_zeroed_again():
    model = nn.Linear(3, 2)
    table, _ = table_of(model)
    backward(model, 1, 3)
    table.refresh()
    assert table.may_clear(0)
    table.note_cleared(0)
    version = model.weight.grad._version
    table.zero_gradients()
    assert model.weight.grad.any()  # nobody did clear it
    assert model.weight.grad._version > version
    table.refresh()
    table.zero_gradients()
    assert not model.weight.grad.any()


def test_a_gradient_that_is_not_read_where_it_lies_is_left_to_zeroing():
    model = nn.Linear(3, 2)
    table, _ = table_of(model)
    table.refresh()
    assert not table.may_clear(0)  # there is none
    model.weight.grad = torch.ones(3, 2).t()
    model.bias.grad = torch.ones(2)
    table.refresh()
    assert not table.may_clear(0)  # it is read from a copy


def test_a_parameter_without_a_gradient_counts_as_zero():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(300, 2)})
    table, _ = table_of(model)
    model["used"](torch.ones(1, 3)).sum().backward()
    assert table.refresh() == 2
    assert [bool(values.any()) for values in table.gradients(0)] == [True, True, False, False]
    model["unused"](torch.ones(1, 300)).sum().backward()
    assert table.refresh() == 4
    assert all(values.any() for values in table.gradients(0))


def test_tied_parameters_are_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    table, _ = table_of(model)
    assert [name for name, _ in table.specs] == ["0.weight", "0.bias", "1.bias"]
    backward(model, 1, 4)
    table.refresh()
    np.testing.assert_array_equal(table.gradients(0)[0], model[0].weight.grad.reshape(-1).numpy())


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(requires_grad=False)
    table, _ = table_of(model)
    assert [name for name, _ in table.specs] == ["1.weight", "1.bias"]


def test_channels_last_parameters_go_through_a_buffer_in_the_order_of_their_shape():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    assert not model.weight.is_contiguous()
    table, _ = table_of(model)
    np.testing.assert_array_equal(
        table.weights(0)[0], model.weight.detach().contiguous().view(-1).numpy()
    )
    backward(model, 1, 3, 2, 2)
    table.refresh()
    np.testing.assert_array_equal(
        table.gradients(0)[0], model.weight.grad.contiguous().view(-1).numpy()
    )
    values = np.arange(48, dtype=np.float32)
    table.weights(0)[0][:] = values
    table.publish()
    np.testing.assert_array_equal(model.weight.detach().contiguous().view(-1).numpy(), values)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_strided_gradient_of_a_contiguous_parameter_is_read_in_order():
    model = nn.Linear(3, 2)
    table, _ = table_of(model)
    model.weight.grad = torch.arange(6.0).reshape(3, 2).t()
    table.refresh()
    assert table.gradients(0)[0].tolist() == [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_that_are_not_float32_are_refused_by_name(dtype):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(dtype))
    with pytest.raises(ConfigError, match=r"parameter '1\.weight' is torch\.\w+, psq trains") as no:
        ParameterTable(model)
    assert ("autocast" in str(no.value)) == (dtype in (torch.float16, torch.bfloat16))


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ConfigError, match="no parameters that require grad"):
        ParameterTable(nn.ReLU())


def test_parameters_without_values_are_refused_by_name():
    with pytest.raises(ConfigError, match="parameter 'weight' is not initialized yet"):
        ParameterTable(nn.LazyLinear(3))
    with pytest.raises(ConfigError, match="parameter 'weight' is on the meta device"):
        ParameterTable(nn.Linear(2, 2, device="meta"))


def test_sparse_gradients_are_refused_by_name():
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True))
    table, _ = table_of(model)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(UsageError, match=r"gradient of '0\.weight' is sparse.*sparse=False"):
        table.refresh()


def replace(model: nn.Linear) -> None:
    model.weight = nn.Parameter(torch.zeros(2, 3))


def move(model: nn.Linear) -> None:
    model.weight.data = torch.zeros(2, 3)


def resize(model: nn.Linear) -> None:
    model.weight.data = model.weight.data[:1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replace, "parameter 'weight' was replaced"),
        (move, "memory of parameter 'weight' moved"),
        (resize, "memory of parameter 'weight' moved"),
    ],
)
def test_a_parameter_that_changes_its_place_is_noticed(change, words):
    model = nn.Linear(3, 2)
    table, _ = table_of(model)
    change(model)
    with pytest.raises(UsageError, match=words):
        table.refresh()


def test_loading_weights_in_place_is_fine():
    model = nn.Linear(3, 2)
    table, _ = table_of(model)
    model.load_state_dict(nn.Linear(3, 2).state_dict())
    table.refresh()
    np.testing.assert_array_equal(table.weights(0)[0], model.weight.detach().view(-1).numpy())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_gradient_that_is_not_finite_is_named(value):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    table, _ = table_of(model)
    backward(model, 1, 3)
    table.refresh()
    assert table.not_finite() == ""
    model[1].weight.grad[1, 1] = value
    table.refresh()
    assert table.not_finite() == "1.weight"


def test_a_backward_through_weights_that_changed_since_its_forward_fails_loudly():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    table, _ = table_of(model)
    loss = model(torch.ones(1, 3)).sum()
    table.weights(0)[2][:] = 0.0
    table.publish()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parts_of_dense_weights_fall_where_they_belong():
    model = nn.Sequential(nn.Linear(600, 600), nn.Linear(600, 3))
    table, layout = table_of(model, bytes_per_value=1)  # one shard of two parts
    [shard] = layout.shards
    values = np.arange(shard.numel, dtype=np.float32)
    for part in (1, 0):
        table.write_part(0, part, values[part * PART_NUMEL : (part + 1) * PART_NUMEL])
    np.testing.assert_array_equal(flat(table.weights(0)), values)
    np.testing.assert_array_equal(table.flat_weights(0), values)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
def test_gradients_that_require_grad_are_read_and_zeroed():
    model = nn.Linear(3, 2)
    table, _ = table_of(model)
    loss = model(torch.ones(1, 3)).pow(2).sum()
    loss.backward(create_graph=True)
    assert model.weight.grad.requires_grad
    table.refresh()
    table.zero_gradients()
    assert not model.weight.grad.any()

"""A model's parameters as shards of float32 memory, without flattening or copying them.

    shard 0   [ conv1.weight | conv1.bias | fc.weight[:8192] ]
    shard 1   [ fc.weight[8192:] | fc.bias ]

Each segment is a slice of a NumPy view of the tensor's own memory, so gradients are encoded, and
weights decoded, where they lie. A tensor that has no such view (on a GPU, or not contiguous) goes
through a buffer of its own: gradients are copied there before encoding; for weights the buffer
holds what the replica is, and is copied into the parameter after decoding.

A worker that takes local steps has weights of its own between two rounds, apart from the replica:
then every tensor has such a buffer (4 bytes per parameter), the parameters themselves are `local`
and move by themselves, and `publish` brings them back to the replica, whatever they were.

Views are kept between steps. A gradient's view is good as long as the gradient is the same memory,
which is checked each step; a parameter's memory must not change at all, and that is checked too,
because weights decoded into memory that the model no longer uses would be lost without a word.

While backward runs, `arrive` looks at one gradient that is complete. What was read then is what is
sent: `refresh` raises if the gradient is another one by the time of the step, which torch's version
counter of the tensor tells (a NumPy write into it cannot be seen).

NumPy writes are invisible to autograd, so `publish` tells it: a graph built from the old weights
then fails loudly in backward instead of giving a wrong gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from psq import kernels
from psq.errors import ConfigError, UsageError
from psq.layout import PART_NUMEL, Layout
from psq.torch.groups import Grouping
from psq.torch.vectors import check_vectors

__all__ = ["ParameterTable"]

Floats: TypeAlias = NDArray[np.float32]

_NO_GRADIENT: Final = 0  # no tensor with values lies at address 0
_STAGED: Final = -1
_NOT_HANDED_OVER: Final = -1
ZEROED_NUMEL: Final = 1 << 20  # zeroed between two calls of `meanwhile`


@dataclass(slots=True)
class _Slot:
    """One parameter.

    Attributes:
        name, parameter: as `named_parameters` gives them.
        owner, attribute: where the model keeps it, to notice when another takes its place.
        address: of its memory, to notice when that moves.
        weights: f32[numel]: its own memory, or `stage`'s.
        stage: the buffer of a parameter that has no view, or is not the replica, in its shape.
        local: f32[numel]: the model's own weights; the replica's where there are no others.
        local_stage: like `stage`, of a parameter that has neither a view nor the replica.
        places: (shard, segment, slice of the tensor) of each segment it has.
        gradient: f32[numel] of this step.
        tensor: the gradient that `gradient` shows, as torch has it.
        source: the address of the memory that `gradient` shows, or _NO_GRADIENT or _STAGED.
        gradient_stage: like `stage`.
        fleeting: its gradient tensor is another one each step, so no view of it is kept.
        handed_over: the version of `tensor` when `arrive` looked at it, or _NOT_HANDED_OVER.
        cleared: how many of the gradient's values are 0 already, in this step.
        is_given: in this step `gradient` shows a vector that the user gave in its place.
    """

    name: str
    parameter: nn.Parameter
    owner: nn.Module
    attribute: str
    address: int
    weights: Floats
    stage: Tensor | None
    local: Floats
    local_stage: Tensor | None = None
    places: list[tuple[int, int, slice]] = field(default_factory=list)
    gradient: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    tensor: Tensor | None = None
    source: int = _NO_GRADIENT
    gradient_stage: Tensor | None = None
    fleeting: bool = False
    handed_over: int = _NOT_HANDED_OVER
    cleared: int = 0
    is_given: bool = False

    @property
    def is_zero(self) -> bool:
        """Whether all of this step's gradient has been cleared."""
        return self.cleared == self.weights.size


class ParameterTable:
    """The parameters of a model that a job is about, each once, however often the model uses it.

    These are the trainable ones that are not local, and those that are only received.

    Args:
        model: whose.
        grouping: which of its parameters are local, and which are only received.
        apart: whether the model's weights may depart from the replica between two rounds.

    Raises:
        ConfigError: a parameter psq cannot train: half precision, not initialized, or no parameter
            at all; the message names it and says what to do.
    """

    def __init__(
        self, model: nn.Module, grouping: Grouping | None = None, *, apart: bool = False
    ) -> None:
        self.grouping = grouping or Grouping()
        self._apart = apart
        members = _members(model, self.grouping)
        self._slots = [_make_slot(model, name, p, apart=apart) for name, p in members]
        if not self._slots:
            msg = (
                "the model has no parameters that require grad: nothing to train; "
                "make the Worker after building the model and before freezing parts of it"
            )
            raise ConfigError(msg)
        self._zeros: Floats = np.zeros(0, np.float32)
        self._weights: list[list[Floats]] = []
        self._local: list[list[Floats]] = []
        self._gradients: list[list[Floats]] = []
        self._of_shard: list[list[tuple[_Slot, int]]] = []
        self._devices = {s.parameter.device for s in self._slots if s.parameter.is_cuda}
        self._unstaged = [slot.parameter for slot in self._slots if slot.stage is None]
        self._staged = [slot for slot in self._slots if slot.stage is not None]

    @property
    def specs(self) -> list[tuple[str, tuple[int, ...]]]:
        """(name, shape) of each parameter, for the plan."""
        return [(slot.name, tuple(slot.parameter.shape)) for slot in self._slots]

    @property
    def pushed_specs(self) -> list[tuple[str, tuple[int, ...]]]:
        """The same of those that are not only received."""
        return [spec for spec in self.specs if self.grouping.is_pushed(spec[0])]

    def bind(self, layout: Layout) -> None:
        """Cut the parameters as the plan says."""
        for shard in layout.shards:
            self._weights.append([])
            self._local.append([])
            self._gradients.append([])
            self._of_shard.append([(self._slots[s.tensor], s.numel) for s in shard.segments])
            for index, segment in enumerate(shard.segments):
                slot = self._slots[segment.tensor]
                part = slice(segment.start, segment.start + segment.numel)
                slot.places.append((shard.index, index, part))
                self._weights[-1].append(slot.weights[part])
                self._local[-1].append(slot.local[part])
                self._gradients[-1].append(slot.weights[part])  # a placeholder, until `refresh`

    def weights(self, shard: int) -> list[Floats]:
        """f32[segment.numel] per segment: the replica, where to decode to."""
        return self._weights[shard]

    def local(self, shard: int) -> list[Floats]:
        """f32[segment.numel] per segment: the weights that the model computes with."""
        return self._local[shard]

    def gradients(self, shard: int) -> list[Floats]:
        """f32[segment.numel] per segment, as of the last `refresh`."""
        return self._gradients[shard]

    def may_clear(self, shard: int) -> bool:
        """Whether who reads this shard's gradients may zero them: all are torch's own memory."""
        return all(slot.tensor is not None and slot.source > 0 for slot, _ in self._of_shard[shard])

    def note_cleared(self, shard: int) -> None:
        """This shard's gradients were zeroed: `zero_gradients` need not."""
        for slot, numel in self._of_shard[shard]:
            slot.cleared += numel

    @property
    def is_apart(self) -> bool:
        """Whether the model's weights may depart from the replica."""
        return self._apart

    def local_copy(self) -> list[list[Floats]]:
        """A copy of the `local` weights of every shard, for `restore_local`."""
        return [[segment.copy() for segment in segments] for segments in self._local]

    def restore_local(self, copies: list[list[Floats]]) -> None:
        """Let the model compute with weights of its own again."""
        for segments, kept in zip(self._local, copies, strict=True):
            for segment, values in zip(segments, kept, strict=True):
                segment[:] = values
        self.publish_local()

    @torch.no_grad()
    def fetch(self) -> None:
        """Somebody else has moved the parameters: copy those that have a buffer into it."""
        for slot in self._staged:
            assert slot.stage is not None  # noqa: S101 - chosen so
            slot.stage.copy_(slot.parameter)

    def flat_weights(self, shard: int) -> Floats:
        """A copy of a shard's weights, f32[shard.numel]."""
        return np.concatenate(self._weights[shard])

    def write_part(self, shard: int, part: int, values: Floats) -> None:
        """Set the shard's values [part * PART_NUMEL, ...) to these."""
        start = part * PART_NUMEL
        for segment in self._weights[shard]:
            if start < segment.size and values.size:
                taken = segment[start : start + values.size]
                taken[:] = values[: taken.size]
                values = values[taken.size :]
                start += taken.size
            start -= segment.size

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters themselves, in the order of `specs`."""
        return [slot.parameter for slot in self._slots]

    def refresh(self, vectors: Mapping[str, Tensor] | None = None) -> int:
        """Look at the model again: its gradients, and whether its parameters are still there.

        Args:
            vectors: to be taken in the place of gradients, one for each parameter that is pushed.

        Returns:
            How many parameters have a gradient; the others count as zero.

        Raises:
            UsageError: a parameter was replaced or moved, a gradient is sparse, or one is not any
                more what it was when `arrive` looked at it; or the vectors are not what they are
                to be.

        Cost: under a microsecond for a parameter whose gradient is where it was.
        """
        present = 0
        if vectors is not None:
            check_vectors(vectors, self.pushed_specs)
        for slot in self._slots:
            _check_in_place(slot)
            slot.cleared = 0
            if vectors is not None:
                self._take(slot, vectors.get(slot.name))
                present += slot.is_given
            elif slot.handed_over == _NOT_HANDED_OVER:
                self._look(slot)
            else:
                _check_unchanged(slot)
            present += slot.tensor is not None
        for device in self._devices:
            torch.cuda.synchronize(device)
        return present

    def arrive(self, index: int) -> torch.cuda.Event | None:
        """Look at one parameter's gradient, from a hook of backward that says it is complete.

        Args:
            index: the parameter's place in `parameters`.

        Returns:
            None: the gradient may be read. On a GPU: what to wait for before that.

        Raises:
            UsageError: the parameter was replaced or moved, or the gradient is sparse.
        """
        slot = self._slots[index]
        _check_in_place(slot)
        self._look(slot)
        if slot.tensor is None:
            return None  # somebody's hook has taken it away: `refresh` will say so
        slot.handed_over = slot.tensor._version  # noqa: SLF001 - torch's documented counter
        if not slot.tensor.is_cuda:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(slot.tensor.device))
        return event

    def has_arrived(self, index: int) -> bool:
        """Whether `arrive` has looked at this parameter's gradient in the step at hand."""
        return self._slots[index].handed_over != _NOT_HANDED_OVER

    def not_finite(self, tensors: Iterable[int] | None = None) -> str:
        """The first of these parameters (of all) whose gradient holds NaN or Inf; empty if none."""
        slots = self._slots if tensors is None else [self._slots[index] for index in tensors]
        for slot in slots:
            if slot.source != _NO_GRADIENT and not kernels.all_finite(slot.gradient):
                return slot.name
        return ""

    @torch.no_grad()
    def publish(self) -> None:
        """Weights were decoded: copy what went through a buffer, and let autograd know."""
        _increment_versions(self._unstaged)
        for slot in self._staged:
            assert slot.stage is not None  # noqa: S101 - chosen so
            slot.parameter.copy_(slot.stage, non_blocking=slot.parameter.is_cuda)
            if slot.local_stage is not None:
                slot.local_stage.copy_(slot.stage)

    @torch.no_grad()
    def publish_local(self) -> None:
        """The `local` weights were changed: the same for them."""
        own = [slot.parameter for slot in self._staged if slot.local_stage is None]
        _increment_versions(own)
        for slot in self._staged:
            if slot.local_stage is not None:
                slot.parameter.copy_(slot.local_stage, non_blocking=slot.parameter.is_cuda)

    @torch.no_grad()
    def zero_gradients(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Zero the gradients that were looked at, in place: their memory and our views of it stay.

        Args:
            meanwhile: called every `ZEROED_NUMEL` values or so: the network need not wait.

        Cost: one write of those that are not zero yet (`note_cleared`).
        """
        batch: list[Tensor] = []
        numel = 0
        for slot in self._slots:
            slot.handed_over = _NOT_HANDED_OVER
            grad = slot.parameter.grad if slot.is_given else slot.tensor
            if grad is not None:
                grad = grad.detach_() if grad.requires_grad else grad
                if slot.is_zero:
                    increment_version(grad)
                else:
                    batch.append(grad)
                    numel += slot.weights.size
            slot.cleared = 0
            if slot.fleeting or slot.is_given:
                slot.is_given = False
                self._show(slot, _NO_GRADIENT, None)
            if meanwhile is not None and numel >= ZEROED_NUMEL:
                torch._foreach_zero_(batch)
                meanwhile()
                batch, numel = [], 0
        if batch:
            torch._foreach_zero_(batch)

    def _look(self, slot: _Slot) -> None:
        """Show the gradient that the parameter has now."""
        grad = slot.parameter.grad
        if grad is None:
            self._show(slot, _NO_GRADIENT, None)
        elif grad is slot.tensor and grad.data_ptr() == slot.source and grad.is_contiguous():
            return  # as last time
        elif grad.layout != torch.strided:
            msg = (
                f"the gradient of {slot.name!r} is sparse ({grad.layout}): psq sends dense "
                "gradients; make the layer with sparse=False"
            )
            raise UsageError(msg)
        elif _has_view(grad):
            self._show(slot, grad.data_ptr(), grad)
        else:
            _copy_to_stage(slot, grad)
            self._show(slot, _STAGED, slot.gradient_stage)
        slot.tensor = grad

    def _take(self, slot: _Slot, vector: Tensor | None) -> None:
        """Show a vector as if it were the gradient; it is only read, and let go after the step."""
        slot.is_given = vector is not None
        self._show(slot, _NO_GRADIENT, None)
        if vector is None:
            return
        if _has_view(vector):
            self._show(slot, vector.data_ptr(), vector)
        else:
            _copy_to_stage(slot, vector.detach(), blocking=True)
            self._show(slot, _STAGED, slot.gradient_stage)

    def _show(self, slot: _Slot, source: int, tensor: Tensor | None) -> None:
        """Make the slot's segments views of `tensor`, unless they are already."""
        slot.tensor = None
        if slot.gradient.size and source == slot.source:
            return
        slot.fleeting = slot.fleeting or (slot.source > 0 and source > 0)
        if tensor is None:
            slot.gradient = self._zeros_of(slot.weights.size)
        else:
            slot.gradient = _flat_view(tensor)
        slot.source = source
        for shard, index, part in slot.places:
            self._gradients[shard][index] = slot.gradient[part]

    def _zeros_of(self, numel: int) -> Floats:
        if self._zeros.size < numel:
            self._zeros = np.zeros(max(s.weights.size for s in self._slots), np.float32)
        return self._zeros[:numel]


def _members(model: nn.Module, grouping: Grouping) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a job is about: those that only come in need not be trainable here."""
    for name, parameter in model.named_parameters():
        if name in grouping.local:
            continue
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            msg = f"parameter {name!r} is not initialized yet: run one forward pass first"
            raise ConfigError(msg)
        if parameter.requires_grad or not grouping.is_pushed(name):
            _check_trainable(name, parameter)
            yield name, parameter


def _check_trainable(name: str, parameter: nn.Parameter) -> None:
    if parameter.dtype != torch.float32:
        advice = "keep the parameters in float32 (model.float())"
        if parameter.dtype in (torch.float16, torch.bfloat16):
            advice += " and compute in half precision with torch.autocast"
        msg = f"parameter {name!r} is {parameter.dtype}, psq trains torch.float32: {advice}"
        raise ConfigError(msg)
    if parameter.is_meta:
        msg = f"parameter {name!r} is on the meta device and has no values: materialize it first"
        raise ConfigError(msg)
    if parameter.layout != torch.strided or type(parameter.data) is not Tensor:
        msg = (
            f"parameter {name!r} is a {type(parameter.data).__name__} with layout "
            f"{parameter.layout}: psq trains plain dense tensors"
        )
        raise ConfigError(msg)


def _make_slot(model: nn.Module, name: str, parameter: nn.Parameter, *, apart: bool) -> _Slot:
    path, _, attribute = name.rpartition(".")
    has_view = _has_view(parameter)
    stage = None if has_view and not apart else _copied_stage(parameter)
    local_stage = _copied_stage(parameter) if apart and not has_view else None
    own = _flat_view(parameter) if has_view else None
    weights = _flat_view(stage) if stage is not None else own
    local = weights if not apart else own if local_stage is None else _flat_view(local_stage)
    assert weights is not None  # noqa: S101 - one of the two is there
    assert local is not None  # noqa: S101 - as above
    return _Slot(
        name=name,
        parameter=parameter,
        owner=model.get_submodule(path),
        attribute=attribute,
        address=parameter.data_ptr(),
        weights=weights,
        stage=stage,
        local=local,
        local_stage=local_stage,
    )


def _has_view(tensor: Tensor) -> bool:
    """Whether the tensor's memory is f32 values in order, in this process's own address space."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()


def _flat_view(tensor: Tensor) -> Floats:
    return tensor.detach().view(-1).numpy()


def _new_stage(like: Tensor) -> Tensor:
    """A CPU buffer in the shape of `like`, pinned where that makes the copies faster."""
    return torch.empty(like.shape, dtype=torch.float32, pin_memory=like.is_cuda)


@torch.no_grad()
def _copied_stage(parameter: nn.Parameter) -> Tensor:
    stage = _new_stage(parameter)
    stage.copy_(parameter)
    return stage


@torch.no_grad()
def _copy_to_stage(slot: _Slot, grad: Tensor, *, blocking: bool = False) -> None:
    if slot.gradient_stage is None:
        slot.gradient_stage = _new_stage(grad)
    slot.gradient_stage.copy_(grad, non_blocking=grad.is_cuda and not blocking)


def _increment_versions(parameters: list[nn.Parameter]) -> None:
    """Tell autograd of a write it did not see."""
    try:
        increment_version(parameters)
    except (TypeError, RuntimeError):  # older torch takes one at a time
        for parameter in parameters:
            increment_version(parameter)


def _check_unchanged(slot: _Slot) -> None:
    grad = slot.parameter.grad
    if grad is slot.tensor and grad is not None and grad._version == slot.handed_over:  # noqa: SLF001
        return
    what = "was taken away" if grad is None else "changed"
    msg = (
        f"the gradient of {slot.name!r} {what} between backward and step, after it was sent: "
        "with overlap=True gradients are sent while backward runs. To clip, scale or add to them "
        "after backward use overlap=False; to change one before it is sent, use the parameter's "
        "register_hook"
    )
    raise UsageError(msg)


def _check_in_place(slot: _Slot) -> None:
    current = slot.owner._parameters.get(slot.attribute)  # noqa: SLF001 - torch has no other cheap way
    if current is not slot.parameter:
        msg = (
            f"parameter {slot.name!r} was replaced after the Worker was made: "
            "the server trains the old one; make the Worker after the model is complete"
        )
        raise UsageError(msg)
    if slot.parameter.data_ptr() != slot.address or slot.parameter.numel() != slot.weights.size:
        msg = (
            f"the memory of parameter {slot.name!r} moved after the Worker was made "
            "(model.to(), .data = ... or a resize): make the Worker after that"
        )
        raise UsageError(msg)

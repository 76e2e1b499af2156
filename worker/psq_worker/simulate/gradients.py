"""Where virtual workers' gradients come from: torch, one worker at a time or many at once.

    one by one   what a real worker does: the task's loss, backward, the parameters' own `.grad`.
                 Bit for bit the same numbers.
    vectorised   `torch.func.vmap` over the workers' batches: one pass for up to `chunk` workers.
                 The same up to float rounding, because sums over a batch go in another order.

Vectorised, what one pass brings forth is kept until each worker's moment comes: `chunk` gradients
at most, of the workers that will be done first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.func import functional_call, grad_and_value, vmap

from psq.errors import ConfigError
from psq.layout import Layout
from psq_worker.simulate.table import Table
from psq_worker.tasks import Batch, Task

__all__ = ["Computing", "Gradients", "OneByOne", "Vectorised", "Zeros"]

Floats = NDArray[np.float32]
DEFAULT_SEED: Final = 67280421310721
"""Of torch's generator in a process that has not seeded it, as a worker's has not."""


class Computing(Protocol):
    """A worker in the middle of a step."""

    rank: int
    table: Table
    made: int

    def next_batch(self) -> Batch:
        """The samples of this step."""
        ...


Others = Callable[[], Sequence[Computing]]


class Gradients(Protocol):
    """Computes what a worker's step has to say."""

    def compute(self, worker: Computing, others: Others) -> float:
        """Show the worker's gradients to its table; returns its loss.

        Args:
            worker: whose moment has come.
            others: gives those that compute now too, who is done first coming first.
        """
        ...

    def replica(self, worker: Computing) -> nn.Module:
        """The model with the job's weights as this worker has them, to be evaluated."""
        ...

    def forget(self, rank: int) -> None:
        """This rank's process is another one from now on."""
        ...


class _Loaded:
    """The one torch model of a simulation, and whose weights lie in it."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.model = model
        found = dict(model.named_parameters())
        self.parameters = [found[tensor.name] for tensor in layout.tensors]
        self._memory = [p.detach().view(-1).numpy() for p in self.parameters]
        self._layout = layout
        self._source: list[Floats] = []

    def load(self, values: Sequence[Floats], *, kept: bool) -> None:
        """Put weights, f32[shard.numel] each, into the model, if they are not there.

        Args:
            values: the weights.
            kept: nobody writes into them, so that they are known again.
        """
        source = list(values)
        if kept and self._source and all(a is b for a, b in zip(source, self._source, strict=True)):
            return
        with torch.no_grad():
            for shard, flat in zip(self._layout.shards, source, strict=True):
                for s in shard.segments:
                    part = flat[s.offset : s.offset + s.numel]
                    self._memory[s.tensor][s.start : s.start + s.numel] = part
        self._source = source if kept else []


class OneByOne:
    """See the module's docstring.

    Buffers of the model and the state of torch's generator are each worker's own, as in processes.
    """

    def __init__(self, task: Task, model: nn.Module, layout: Layout) -> None:
        self._task = task
        self._loaded = _Loaded(model, layout)
        self._buffers: dict[int, list[torch.Tensor]] = {}
        self._random: dict[int, torch.Tensor] = {}
        self._first_buffers = [buffer.clone() for buffer in model.buffers()]
        self._first_random = torch.Generator().manual_seed(DEFAULT_SEED).get_state()
        self._none = np.zeros(max(t.numel for t in layout.tensors), np.float32)

    def replica(self, worker: Computing) -> nn.Module:
        """See `Gradients`; with the worker's own buffers."""
        self._loaded.load(worker.table.flat, kept=worker.table.is_shared)
        return self._with_buffers(worker)

    def _with_buffers(self, worker: Computing) -> nn.Module:
        with torch.no_grad():
            kept = self._buffers.get(worker.rank, self._first_buffers)
            for buffer, values in zip(self._loaded.model.buffers(), kept, strict=True):
                buffer.copy_(values)
        return self._loaded.model

    def compute(self, worker: Computing, others: Others) -> float:
        """As a real worker's loop does it."""
        del others
        table = worker.table
        self._loaded.load(table.flat_local, kept=table.is_shared and not table.is_apart)
        model = self._with_buffers(worker)
        # A process's first backward makes the gradients, later ones add to zeros: -0.0 tells.
        model.zero_grad(set_to_none=not worker.made)
        outside = torch.get_rng_state()
        torch.set_rng_state(self._random.get(worker.rank, self._first_random))
        loss = self._task.loss(model, worker.next_batch())
        loss.backward()  # type: ignore[no-untyped-call]
        self._random[worker.rank] = torch.get_rng_state()
        torch.set_rng_state(outside)
        if self._first_buffers:
            self._buffers[worker.rank] = [buffer.clone() for buffer in model.buffers()]
        worker.table.show_gradients([self._flat(p) for p in self._loaded.parameters])
        return float(loss.detach())

    def forget(self, rank: int) -> None:
        """This worker's process is another one from now on."""
        self._buffers.pop(rank, None)
        self._random.pop(rank, None)

    def _flat(self, parameter: nn.Parameter) -> Floats:
        if parameter.grad is None:
            return self._none[: parameter.numel()]
        flat: Floats = parameter.grad.contiguous().view(-1).numpy()
        return flat


class _LossOf(nn.Module):
    """A task's loss as a module, so that it can be called with other weights."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task = task
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        """The mean loss of a batch."""
        return self.task.loss(self.model, batch)


class Vectorised:
    """See the module's docstring.

    Args:
        task: whose loss.
        model: any of its models.
        layout: the cut.
        chunk: workers in one pass.

    Raises:
        ConfigError: the model has buffers, which a pass over many workers cannot keep apart.
    """

    def __init__(self, task: Task, model: nn.Module, layout: Layout, chunk: int) -> None:
        if any(True for _ in model.buffers()):
            msg = (
                f"task {task.name!r}: its model has buffers (batch norm's, for example), which "
                "each worker keeps for itself: simulate it with --no-vectorised"
            )
            raise ConfigError(msg)
        self._loaded = _Loaded(model, layout)
        self._layout = layout
        self._chunk = chunk
        self._names = [tensor.name for tensor in layout.tensors]
        module = _LossOf(task, model)

        def loss(weights: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
            named = {f"model.{name}": value for name, value in weights.items()}
            result: torch.Tensor = functional_call(module, named, (batch,))
            return result

        one = grad_and_value(loss)
        self._shared = vmap(one, in_dims=(None, 0), randomness="different")
        self._apart = vmap(one, in_dims=(0, 0), randomness="different")
        self._kept: dict[int, tuple[list[Floats], float]] = {}

    def replica(self, worker: Computing) -> nn.Module:
        """See `Gradients`."""
        self._loaded.load(worker.table.flat, kept=worker.table.is_shared)
        return self._loaded.model

    def compute(self, worker: Computing, others: Others) -> float:
        """In one pass with others that compute at the same weights."""
        if worker.rank not in self._kept:
            self._pass(worker, others())
        tensors, loss = self._kept.pop(worker.rank)
        worker.table.show_gradients(tensors)
        return loss

    def forget(self, rank: int) -> None:
        """This worker's process is another one from now on."""
        self._kept.pop(rank, None)

    def _pass(self, worker: Computing, others: Sequence[Computing]) -> None:
        apart = worker.table.is_apart
        group = [worker]
        for other in others:
            if len(group) == self._chunk:
                break
            fits = apart or _same_weights(worker.table, other.table)
            if other is not worker and other.rank not in self._kept and fits:
                group.append(other)
        batch = _stack([each.next_batch() for each in group])
        if apart:
            gradients, losses = self._apart(self._weights_of(group), batch)
        else:
            self._loaded.load(worker.table.flat, kept=worker.table.is_shared)
            own = {n: p.detach() for n, p in zip(self._names, self._loaded.parameters, strict=True)}
            gradients, losses = self._shared(own, batch)
        rows = [gradients[name].detach().contiguous().numpy() for name in self._names]
        for place, each in enumerate(group):
            tensors = [row[place].reshape(-1) for row in rows]
            self._kept[each.rank] = (tensors, float(losses[place]))

    def _weights_of(self, group: Sequence[Computing]) -> dict[str, torch.Tensor]:
        stacked: dict[str, torch.Tensor] = {}
        for tensor in self._layout.tensors:
            stacked[tensor.name] = torch.empty((len(group), *tensor.shape))
        rows = [stacked[name].view(len(group), -1).numpy() for name in self._names]
        for place, each in enumerate(group):
            for shard, values in zip(self._layout.shards, each.table.flat_local, strict=True):
                for s in shard.segments:
                    part = values[s.offset : s.offset + s.numel]
                    rows[s.tensor][place, s.start : s.start + s.numel] = part
        return stacked


class Zeros:
    """No gradients at all: for a run that only asks how long the network takes."""

    def __init__(self, layout: Layout) -> None:
        self._tensors = [np.zeros(tensor.numel, np.float32) for tensor in layout.tensors]

    def replica(self, worker: Computing) -> nn.Module:
        """There is no model, and nobody asks for it."""
        raise NotImplementedError

    def compute(self, worker: Computing, others: Others) -> float:
        """Nothing to learn."""
        del others
        worker.table.show_gradients(self._tensors)
        return 0.0

    def forget(self, rank: int) -> None:
        """Nothing is kept."""


def _same_weights(one: Table, other: Table) -> bool:
    pairs = zip(one.flat_local, other.flat_local, strict=True)
    return all(a is b or np.array_equal(a, b) for a, b in pairs)


def _stack(batches: Sequence[Batch]) -> Any:
    """Batches of the same form as one, with a first axis more."""
    first = batches[0]
    if isinstance(first, torch.Tensor):
        if any(each.shape != first.shape for each in batches):
            msg = (
                f"batches of {len(batches)} workers have shapes {_shapes(batches)}: "
                "simulate this task with --no-vectorised"
            )
            raise ConfigError(msg)
        return torch.stack(list(batches))
    if isinstance(first, tuple | list):
        return type(first)(_stack(parts) for parts in zip(*batches, strict=True))
    if isinstance(first, dict):
        return {key: _stack([each[key] for each in batches]) for key in first}
    msg = (
        f"a batch holds a {type(first).__name__}, and only tensors can be stacked: "
        "simulate this task with --no-vectorised"
    )
    raise ConfigError(msg)


def _shapes(batches: Iterable[Any]) -> list[tuple[int, ...]]:
    return sorted({tuple(each.shape) for each in batches})

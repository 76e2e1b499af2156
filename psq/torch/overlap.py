"""Says which shards are ready while backward still runs: a hook on each parameter counts down.

    backward -> gradient of a parameter complete -> its shards count down -> those at zero are said

Gradients come last layer first, so the last shards are said first; of several that become ready at
once the first goes first, because the next forward pass needs it first. What is not ready when
backward ends (a parameter that was not used) is left to `step`.

Nothing is applied here: hooks send and never take weights in.

On a GPU a gradient is copied to a buffer first; a hook does not wait for the copy, but says what
earlier copies have finished. Autograd runs hooks of different devices in threads of their own, so
all of it happens under a lock.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from psq.errors import ConfigError, UsageError
from psq.layout import Layout
from psq.parts import load_rule
from psq.recipe import Recipe
from psq.torch.parameters import ParameterTable

if TYPE_CHECKING:
    import torch

__all__ = ["Overlap", "check_overlap"]


def check_overlap(recipe: Recipe, *, overlap: bool) -> None:
    """Whether a recipe's gradients can be sent one after another.

    Raises:
        ConfigError: its direction looks at all of them before the first is said.
    """
    part = recipe.direction.part
    if overlap and load_rule(part).needs_all:
        msg = (
            f"recipe {recipe.name!r}: direction {part.kind} looks at all gradients of a step "
            "before it says the first, so nothing can be sent while backward runs: use "
            "overlap=False"
        )
        raise ConfigError(msg)


class Overlap:
    """The hooks of one worker.

    Args:
        table: of the model's parameters, bound to `layout`.
        layout: how they are cut.
        armed: asked by each hook: whether this backward pass is one that is pushed.
        say: takes shards that are ready, ascending.
        fail: told of an error before it is raised, which ends the backward pass.
    """

    def __init__(
        self,
        table: ParameterTable,
        layout: Layout,
        *,
        armed: Callable[[], bool],
        say: Callable[[Sequence[int]], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._table = table
        self._armed = armed
        self._say = say
        self._fail = fail
        self._lock = threading.Lock()
        tensors = [{segment.tensor for segment in shard.segments} for shard in layout.shards]
        self._counts = [len(each) for each in tensors]
        self._missing = list(self._counts)
        self._shards_of: list[list[int]] = [[] for _ in table.parameters]
        for shard, each in enumerate(tensors):
            for index in each:
                self._shards_of[index].append(shard)
        # Shards whose copies may still be under way, in the order of the copies.
        self._copying: deque[tuple[torch.cuda.Event, int]] = deque()
        self._handles = [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(self._on_gradient, index)
            )
            for index, parameter in enumerate(table.parameters)
            if parameter.requires_grad  # one that is only received may not
        ]

    def reset(self) -> None:
        """The step is over, and `ParameterTable.zero_gradients` was called: count from the start.

        What was being copied is said by now: `step` waits for the device and says what is left.
        """
        self._missing[:] = self._counts
        self._copying.clear()

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _on_gradient(self, index: int, _parameter: torch.Tensor) -> None:
        """A parameter's gradient is complete, as far as this backward pass goes."""
        if not self._armed():
            return
        with self._lock:
            try:
                ready = self._count_down(index)
                if ready:
                    self._say(ready)
            except BaseException as error:
                self._fail(error)
                raise

    def _count_down(self, index: int) -> list[int]:
        """Note the parameter; returns the shards that can be said now, ascending."""
        if self._table.has_arrived(index):
            raise UsageError(_second_backward(self._table.specs[index][0]))
        event = self._table.arrive(index)
        ready = []
        for shard in self._shards_of[index]:
            self._missing[shard] -= 1
            if self._missing[shard] == 0:
                ready.append(shard)
        if event is None:
            return ready
        self._copying.extend((event, shard) for shard in ready)
        return sorted(self._take_copied())

    def _take_copied(self) -> list[int]:
        taken = []
        while self._copying and self._copying[0][0].query():  # type: ignore[no-untyped-call]
            taken.append(self._copying.popleft()[1])
        return taken


def _second_backward(name: str) -> str:
    return (
        f"backward ran a second time before step: the gradient of {name!r} was sent already "
        "(overlap=True sends gradients while backward runs). Run all backward passes but the last "
        "under no_sync(), or use overlap=False"
    )

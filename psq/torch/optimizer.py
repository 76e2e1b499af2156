"""A torch optimizer whose step is a worker's: for schedulers and loops that want one.

    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(ps.optimizer, 1000)
    loss.backward(); ps.optimizer.step(); scheduler.step()

It holds learning rates and nothing else: one param group for each of psq's, whose `lr` is what the
next step asks for. Moments are the server's or the worker's, residuals the worker's; none of them
is in `state_dict`, which therefore says where training stands in its schedule and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from psq.errors import UsageError

__all__ = ["Optimizer", "ParamGroup"]


class ParamGroup(Protocol):
    """A group as the optimizer has to know it."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def parameters(self) -> Sequence[nn.Parameter]: ...  # noqa: D102
    @property
    def factor(self) -> float: ...  # noqa: D102


class TakeStep(Protocol):
    """A worker's step."""

    def __call__(
        self,
        loss: float | Tensor | None = None,
        samples: int = 0,
        vectors: Mapping[str, Tensor] | None = None,
    ) -> object:
        """See `Worker.step`."""


class Optimizer(torch.optim.Optimizer):
    """See the module's docstring; `Worker.optimizer` makes it.

    `step` takes the worker's step and `zero_grad` zeroes what it pushes, so an ordinary loop runs
    unchanged. Schedulers that move a momentum (`OneCycleLR` does unless told cycle_momentum=False)
    refuse it: a job's momentum is fixed by its recipe.
    """

    def __init__(self, groups: Sequence[ParamGroup], rate: float, step: TakeStep) -> None:
        self._take_step = step
        self._sealed = False
        made = [
            {"params": list(each.parameters), "lr": rate * each.factor, "name": each.name}
            for each in groups
        ]
        super().__init__(made, {"lr": rate})
        self._sealed = True

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rate of each group, in order."""
        return tuple(float(group["lr"]) for group in self.param_groups)

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss: float | Tensor | None = None,
        samples: int = 0,
        vectors: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Take the worker's step.

        Args:
            closure: computes the loss, runs backward and returns the loss.
            loss: as for `Worker.step`, where there is no closure.
            samples: as for `Worker.step`.
            vectors: as for `Worker.step`.

        Returns:
            What the closure did; None without one. `Worker.step` returns the report.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        self._take_step(loss if closure is None else value, samples, vectors)
        return value

    def zero_grad(self, set_to_none: bool = False) -> None:  # noqa: FBT001, FBT002 - torch's
        """Zero the gradients in place, which keeps psq's views of them; a step has done it."""
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: what a job trains is agreed on when it begins.

        Raises:
            UsageError: always, once the optimizer is made.
        """
        if getattr(self, "_sealed", False):
            msg = "the groups of a job are fixed: give them to the Worker, as groups=[Group(...)]"
            raise UsageError(msg)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the learning rates of a saved state.

        Raises:
            UsageError: it holds moments, so it is another optimizer's.
        """
        if state_dict.get("state"):
            msg = (
                "this state holds another optimizer's moments: psq's live in the server and the "
                "worker, its optimizer's state has learning rates only"
            )
            raise UsageError(msg)
        super().load_state_dict(state_dict)

"""The recipe "average": the workers' mean gradient, and a torch optimizer that steps with it.

    server   mean of the pushes, coded, to everybody alike
    worker   mean -> .grad of each parameter -> the user's own optimizer takes its step

Each worker gets the same bytes, so workers that start with the same weights and run the same
optimizer stay equal to the bit. Nobody but these optimizers has the weights: who comes late cannot
be given any, and a worker that lost a mean has lost its place.

The means of a round are kept apart (4 bytes per parameter) until all of them are there: they may
come while gradients are still being said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from psq.clock import parse_consistency
from psq.errors import ConfigError
from psq.kernels import Floats
from psq.layout import Shard
from psq.plan import Plan

__all__ = ["Averaging", "make_averaging"]


class Averaging:
    """See the module's docstring.

    Args:
        plan: the job.
        optimizer: the user's own.
        parameters: the model's, in the plan's order.

    Raises:
        ConfigError: a parameter is in no group of the optimizer: its mean would be lost.
    """

    def __init__(
        self,
        plan: Plan,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
    ) -> None:
        self.optimizer = optimizer
        self._parameters = parameters
        held = {id(each) for group in optimizer.param_groups for each in group["params"]}
        for (name, _), parameter in zip(plan.tensors, parameters, strict=True):
            if id(parameter) not in held:
                msg = (
                    f"parameter {name!r} is in none of the optimizer's groups and would never "
                    "move: add it, or make it local with groups=[Group(..., local=True)]"
                )
                raise ConfigError(msg)
        self._means: list[Floats] = [np.zeros(p.numel(), np.float32) for p in parameters]
        self._came = False

    @property
    def rate(self) -> float:
        """The optimizer's learning rate, which pushes name so that workers can be compared."""
        return float(self.optimizer.param_groups[0].get("lr", 0.0))

    def state(self) -> dict[str, Any]:
        """All that the optimizer knows beside the parameters; tensors are not copied."""
        return self.optimizer.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.optimizer.load_state_dict(state)

    def take(self, shard: Shard, mean: Floats | None) -> None:
        """Keep a shard's mean, f32[shard.numel], until `land`; None: nobody said anything."""
        for segment in shard.segments:
            kept = self._means[segment.tensor][segment.start : segment.start + segment.numel]
            if mean is None:
                kept.fill(0.0)
            else:
                kept[:] = mean[segment.offset : segment.offset + segment.numel]
        self._came = self._came or mean is not None

    @torch.no_grad()
    def land(self) -> None:
        """The round is over: means into `.grad`, a step, and gradients zero again.

        A round in which nobody said anything is no step. Parameters of the optimizer that psq does
        not train step with the gradient they have.
        """
        if not self._came:
            return
        self._came = False
        for parameter, mean in zip(self._parameters, self._means, strict=True):
            values = torch.from_numpy(mean).view(parameter.shape)
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(values)
        with torch.enable_grad():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)


def make_averaging(
    plan: Plan,
    optimizer: torch.optim.Optimizer | None,
    parameters: Sequence[nn.Parameter],
    *,
    gives_rate: bool,
) -> Averaging | None:
    """What steps with the mean, where the recipe leaves that to the workers.

    Raises:
        ConfigError: a recipe that needs an optimizer has none, or the other way round, or one that
            lacks a parameter; or the job is one in which workers do not see every mean once.
    """
    recipe = plan.recipe
    if recipe.apply.kind != "return":
        if optimizer is not None:
            msg = (
                f"optimizer: recipe {recipe.name!r} takes its own steps; one of yours goes with "
                "recipe='average', or with the parameters of a local group, outside the Worker"
            )
            raise ConfigError(msg)
        return None
    if optimizer is None:
        msg = (
            f"recipe {recipe.name!r} leaves the step to an optimizer of yours: give it, as "
            "optimizer=torch.optim.SGD(model.parameters(), lr=0.1)"
        )
        raise ConfigError(msg)
    if gives_rate:
        msg = f"lr: with recipe {recipe.name!r} the optimizer has the learning rate: leave lr out"
        raise ConfigError(msg)
    if not parse_consistency(plan.consistency).eager or recipe.uplink.every > 1:
        msg = (
            f"recipe {recipe.name!r}: every worker must take every step with every mean, so it "
            f"needs consistency=bsp without a quorum, and every=1; got {plan.consistency}, "
            f"every={recipe.uplink.every}"
        )
        raise ConfigError(msg)
    return Averaging(plan, optimizer, parameters)

"""Learning rates of a worker: a number, a function of the step, or what a scheduler makes of them.

A push names one rate; each group multiplies it by its factor, which the plan fixes. So where the
server or the replicas apply the rate, groups keep their proportions; where it is inside the message
(Adam on the worker, say) a group's rate is this worker's own business and may go its own way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from torch import nn

from psq.errors import UsageError
from psq.plan import Plan
from psq.rules.blocks import MAX_RATE
from psq.torch.optimizer import Optimizer, TakeStep
from psq.torch.parameters import ParameterTable

__all__ = ["LearningRate", "RateGroup", "Rates", "rate_groups"]

LearningRate: TypeAlias = float | Callable[[int], float]

TOLERANCE: Final = 1e-6
"""By how much a proportion may be off that a scheduler has multiplied up step by step."""


@dataclass(frozen=True, slots=True)
class RateGroup:
    """A group of the plan that this worker pushes.

    Attributes:
        name: of the group.
        index: its place in the plan.
        factor: by which the plan multiplies the rate.
        parameters: the model's.
    """

    name: str
    index: int
    factor: float
    parameters: Sequence[nn.Parameter]


class Rates:
    """What the next step asks for.

    Args:
        rate: a number, or a function of the step.
        groups: those that are pushed.
        count: of all groups of the plan.
        is_inside: whether the messages hold the rate.
    """

    def __init__(
        self,
        rate: LearningRate,
        groups: Sequence[RateGroup],
        count: int,
        *,
        is_inside: bool,
    ) -> None:
        self._rate = rate
        self._groups = groups
        self._count = count
        self._is_inside = is_inside
        self.optimizer: Optimizer | None = None

    def at(self, step: int) -> tuple[float, tuple[float, ...]]:
        """The rate of a step, and for each group of the plan how far it has left its proportion.

        That is nothing at all where none has.

        Raises:
            UsageError: a rate is no finite number >= 0, or the groups have left their proportions.
        """
        if self.optimizer is not None:
            return self._of_optimizer(self.optimizer.rates, step)
        value = self._rate(step) if callable(self._rate) else self._rate
        return _checked(value, step), ()

    def set(self, rate: LearningRate) -> None:
        """Take another rate from the next step on.

        Raises:
            UsageError: a function is given where an optimizer has the rates.
        """
        self._rate = rate
        if self.optimizer is None:
            return
        if callable(rate):
            msg = "lr: ps.optimizer has the rates now, a function would undo its scheduler's work"
            raise UsageError(msg)
        for group, each in zip(self.optimizer.param_groups, self._groups, strict=True):
            group["lr"] = rate * each.factor

    def make_optimizer(self, step: TakeStep) -> Optimizer:
        """The optimizer, once; from then on it has the rates.

        Raises:
            UsageError: the rate is a function of the step.
        """
        if self.optimizer is None:
            if callable(self._rate):
                msg = (
                    "lr is a function of the step, which leaves an optimizer's scheduler nothing "
                    "to say: give lr as a number, or do without ps.optimizer"
                )
                raise UsageError(msg)
            self.optimizer = Optimizer(self._groups, self._rate, step)
        return self.optimizer

    def _of_optimizer(self, rates: Sequence[float], step: int) -> tuple[float, tuple[float, ...]]:
        rates = [_checked(rate, step) for rate in rates]
        base = self._base_of(rates)
        left = [
            (group, rate)
            for group, rate in zip(self._groups, rates, strict=True)
            if not math.isclose(rate, base * group.factor, rel_tol=TOLERANCE, abs_tol=0.0)
        ]
        if not left:
            return base, ()
        ratios = [1.0] * self._count
        for group, rate in left:
            if not self._is_inside or not group.factor:
                raise UsageError(_out_of_proportion(group, rate, base))
            ratios[group.index] = rate / (base * group.factor)
        return base, tuple(ratios)

    def _base_of(self, rates: Sequence[float]) -> float:
        """The rate that a push names: that of the first group that moves, before its factor."""
        pairs = zip(rates, self._groups, strict=True)
        return next((rate / each.factor for rate, each in pairs if rate and each.factor), 0.0)


def _out_of_proportion(group: RateGroup, rate: float, base: float) -> str:
    return (
        f"group {group.name!r} has the rate {rate!r}, its lr_factor of {group.factor:g} makes "
        f"{base * group.factor!r}: with this recipe rates are applied where all workers' messages "
        "meet, and groups keep their proportions. Give schedulers limits in the same proportions "
        "(eta_min=0, a list for min_lr)"
    )


def _checked(value: float, step: int) -> float:
    value = float(value)
    if not 0.0 <= value <= MAX_RATE:
        msg = f"lr must be a number from 0 to {MAX_RATE:g}, got {value!r} for step {step}"
        raise UsageError(msg)
    return value


def rate_groups(plan: Plan, table: ParameterTable) -> list[RateGroup]:
    """The plan's groups that have parameters here and are pushed."""
    members: dict[int, list[nn.Parameter]] = {}
    for (name, _), parameter in zip(table.specs, table.parameters, strict=True):
        members.setdefault(table.grouping.number(name), []).append(parameter)
    return [
        RateGroup(group.name, index, group.lr, members[index])
        for index, group in enumerate(plan.groups)
        if index in members and group.pushed
    ]

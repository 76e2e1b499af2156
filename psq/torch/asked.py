"""What a worker asks of a round beside its gradients, and says of a step: checked at once."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Final

from torch import Tensor

from psq.errors import UsageError
from psq.plan import Plan
from psq_proto.messages import U32_MAX

__all__ = ["MAX_WEIGHT", "Asked", "check_said", "check_weight", "loss_value"]

MAX_WEIGHT: Final = U32_MAX
"""As much as a push has room for."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked, the same for all shards of a step.

    Attributes:
        rate: the learning rate, to be multiplied by each group's factor.
        weight: how much this worker counts in the mean.
        ratios: of each group of the plan whose rate has left that proportion: by how much.
    """

    rate: float
    weight: int = 1
    ratios: tuple[float, ...] = ()

    def rate_of(self, group: int) -> float:
        """What is asked for a group, before its factor."""
        return self.rate * self.ratios[group] if self.ratios else self.rate


def check_weight(weight: int, plan: Plan) -> int:
    """The weight itself.

    Raises:
        UsageError: it is no whole number from 1 to `MAX_WEIGHT`, or the job counts every worker
            once.
    """
    if type(weight) is not int or not 1 <= weight <= MAX_WEIGHT:
        msg = (
            f"weight must be a whole number 1..{MAX_WEIGHT}, such as the samples of this worker, "
            f"got {weight!r}; a worker that is to count nothing sits out"
        )
        raise UsageError(msg)
    aggregate = plan.recipe.aggregate
    if weight != 1 and aggregate.part.counts_heads:
        msg = (
            f"weight={weight}: aggregate={aggregate.kind} counts every worker once, whatever "
            "weight it asks for: leave weight out, or choose aggregate=mean"
        )
        raise UsageError(msg)
    return weight


def check_said(loss: object, samples: object) -> None:
    """What a step is told for whoever looks on: before anything of the step is sent.

    Raises:
        UsageError: the loss is no number nor a tensor of one, or the samples are no whole number.
    """
    is_one = isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex()
    if loss is not None and not is_one and not isinstance(loss, Real):
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f" {loss!r:.80}"
        msg = (
            "loss: expected a number, or a tensor that holds one, got "
            f"{type(loss).__name__}{shape}: give the mean loss of the batch, or leave it out"
        )
        raise UsageError(msg)
    if not isinstance(samples, Integral) or samples < 0:
        msg = (
            f"samples: expected how many were in the batch, a whole number, got {samples!r:.80}: "
            "give len(batch), or leave it out"
        )
        raise UsageError(msg)


def loss_value(loss: float | Tensor | None) -> float | None:
    """A loss that was checked, as a plain number; a tensor is read."""
    if loss is None:
        return None
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)

"""What a worker asks of a round beside its gradients: a learning rate and a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from psq.errors import UsageError
from psq.plan import Plan
from psq_proto.messages import U32_MAX

__all__ = ["MAX_WEIGHT", "Asked", "check_weight"]

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

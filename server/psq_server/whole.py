"""A server step that takes whole rounds: by tensor, with means of all that was said.

Its next weights wait here until the reducer, shard by shard, has said them. State in bytes: 4 numel
from a round's step to the next round's, and as much again during the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from psq.kernels import Floats
from psq.plan import Plan
from psq.rules import ApplyRule, Judgement
from psq_server.state import Pushed
from psq_server.vectors import Vectors
from psq_server.view import View

__all__ = ["WholeStep"]


class WholeStep:
    """What the recipe's apply makes of each round.

    Args:
        plan: the job.
        vectors: the weights.
        apply: takes whole rounds.
        combine: writes a shard's aggregate of some contributions, at least one.
    """

    def __init__(
        self,
        plan: Plan,
        vectors: Vectors,
        apply: ApplyRule,
        combine: Callable[[int, Sequence[Pushed], Floats], None],
    ) -> None:
        self._vectors = vectors
        self._apply = apply
        self._combine = combine
        self._pushed = [index for index in vectors.shards if plan.pushes(index)]
        self._next: Floats | None = None

    def take(
        self,
        view: View,
        said: Mapping[int, Sequence[Pushed]],
        judged: Mapping[int, Judgement],
        lr: float,
    ) -> None:
        """Take a round's step; where nothing counts there is none."""
        self._next = None
        vectors, means = self._vectors, np.zeros(self._vectors.layout.numel, np.float32)
        counting = {shard: _counting(pushed, judged) for shard, pushed in said.items()}
        if not any(counting.values()):
            return
        for shard, pushed in counting.items():
            if pushed:
                self._combine(shard, pushed, vectors.of(means, shard))
        self._next = vectors.x.copy()
        named = (vectors.named(means, self._pushed), vectors.named(self._next))
        self._apply.step_whole(*named, view.number, lr, view)

    def next(self, shard: int) -> Floats | None:
        """The shard's weights after the round, f32[shard.numel]; None where it moves nothing."""
        return None if self._next is None else self._vectors.of(self._next, shard)


def _counting(said: Sequence[Pushed], judged: Mapping[int, Judgement]) -> list[Pushed]:
    """What counts of a shard's contributions, with the weights that were judged."""
    nothing = Judgement()
    return [
        one._replace(weight=judged[one.rank].weight) if one.rank in judged else one
        for one in said
        if not judged.get(one.rank, nothing).refused
    ]

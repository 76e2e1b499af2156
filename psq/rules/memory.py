"""Directions that say how the gradient differs from what was said of it so far.

    ef21    c = g - h;  d = C(c);  h <- h + d             (after 2106.05203; no error feedback)

h is the sum of all this worker has said, and the server keeps the mean of all h: nothing else has
to be remembered of what a codec left out. What was not applied is taken out of h again; rounding
then leaves h within an ulp of the larger of h and d.

Both sides' h are one state in two places. A worker that comes back without its own, or with an
older one, leaves the server's mean off by what it has forgotten, for good: such a job has to start
again from a checkpoint of all.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from psq.kernels import Floats
from psq.rules.base import DirectionRule, Segments
from psq.rules.directions import gather

__all__ = ["Ef21"]


class Ef21(DirectionRule):
    """The gradient's difference to what was said of it so far."""

    state_names = ("h",)
    wants_said = True

    def write(  # noqa: D102, PLR0913 - as the base class
        self,
        shard: int,
        t: int,
        lr: float,
        gradients: Segments,
        out: Floats,
        *,
        weights: Segments | None,
        shared: Mapping[str, Floats],
    ) -> None:
        del t, lr, weights, shared
        gather(gradients, out)
        np.subtract(out, self.of("h", shard), out=out)

    def said(self, shard: int, t: int, message: Floats) -> None:  # noqa: D102 - as the base class
        del t
        h = self.of("h", shard)
        np.add(h, message, out=h)

    def unsaid(self, shard: int, message: Floats) -> None:  # noqa: D102 - as the base class
        h = self.of("h", shard)
        np.subtract(h, message, out=h)

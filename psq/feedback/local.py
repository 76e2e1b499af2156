"""Local steps: a worker's own Adam moves its own weights, and then says how far.

descend    x <- x - u
drift      x0 - x + u          u: of the last local step, which leaves x as it is
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psq.errors import UsageError
from psq.kernels import Floats
from psq.layout import Shard
from psq.optim import Adam
from psq.rules import Segments

__all__ = ["LocalSteps", "check_segments"]


class LocalSteps:
    """Steps by one Adam per shard."""

    def __init__(self, adams: Sequence[Adam]) -> None:
        self._adams = adams

    def descend(
        self, cut: Shard, gradients: Segments, lr: float, weights: Segments, scratch: Floats
    ) -> None:
        """Take one step of a shard. scratch: as many f32 as its largest segment has."""
        for values in (gradients, weights):
            check_segments(cut, values)
        adam = self._adams[cut.index]
        adam.advance(lr)
        for segment, g, x in zip(cut.segments, gradients, weights, strict=True):
            u = scratch[: segment.numel]
            adam.write(g, u, start=segment.offset, x=x)
            with np.errstate(over="ignore"):  # then the next gradients will not be finite
                np.subtract(x, u, out=x)

    def drift(  # noqa: PLR0913, PLR0917 - as `descend`, and where the steps began
        self,
        cut: Shard,
        gradients: Segments | None,
        lr: float,
        weights: Segments,
        start: Segments,
        out: Floats,
    ) -> None:
        """Write to out, f32[cut.numel], how far a shard has come, with this step if there is one.

        `weights` are not written: backward may still read them.
        """
        for values in (weights, start) if gradients is None else (gradients, weights, start):
            check_segments(cut, values)
        adam = self._adams[cut.index]
        if gradients is not None:
            adam.advance(lr)
        with np.errstate(over="ignore", invalid="ignore"):  # the payload will tell
            for index, segment in enumerate(cut.segments):
                drift, x = out[segment.offset : segment.offset + segment.numel], weights[index]
                if gradients is not None:
                    adam.write(gradients[index], drift, start=segment.offset, x=x)
                    x = np.subtract(x, drift, out=drift)
                np.subtract(start[index], x, out=drift)


def check_segments(shard: Shard, values: Segments) -> None:
    """Refuse arrays that are not one for each segment of a shard, as long as it.

    Raises:
        UsageError: they are not.
    """
    wanted, came = [s.numel for s in shard.segments], [v.size for v in values]
    if wanted != came:
        msg = f"shard {shard.index} has segments of {wanted} values, got {came}"
        raise UsageError(msg)

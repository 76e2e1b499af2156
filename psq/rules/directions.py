"""What a worker can want to say, from its own gradients and vectors.

    gradient   c = g
    adam       c = u, Adam's update from this worker's moments                  (psq.optim)
    momentum   m <- beta m + a g';  c = m, or with nesterov beta m + a g'
               a = 1 - beta with ema, else 1;  g' = g + weight_decay x          after Zheng 2019
    lion       c = beta1 m + (1 - beta1) g;  m <- beta2 m + (1 - beta2) g       after 2302.06675
    omd        c = f = eta F;  gradients F are taken at x - (f_prev + e)        after 2010.13359

Their vectors go on with each step, whether its message is taken or not, as Adam's do. `gradient`
and `adam` are for recipes whose messages are not written in one pass (a codec that changes); with a
fixed codec a kernel has that pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from psq.errors import ConfigError, UsageError
from psq.kernels import Floats
from psq.layout import Segment
from psq.optim import per_shard
from psq.rules.base import DirectionRule, Segments

__all__ = ["AdamDirection", "Gradient", "Lion", "Momentum", "Optimistic", "gather", "part_of"]


def part_of(values: Floats, segment: Segment) -> Floats:
    """A segment's view of a shard's vector."""
    return values[segment.offset : segment.offset + segment.numel]


def gather(gradients: Segments, out: Floats) -> None:
    """Write a shard's segments, one after another, to out: f32[shard.numel]."""
    np.concatenate(gradients, out=out)


class Gradient(DirectionRule):
    """The gradient itself."""

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
        del shard, t, lr, weights, shared
        gather(gradients, out)


class AdamDirection(DirectionRule):
    """Adam's update, from moments of this worker."""

    def setup(self, state: Mapping[str, Floats] | None) -> None:  # noqa: D102 - as the base class
        if self.adam is None:
            msg = "direction adam needs Adam settings"
            raise ConfigError(msg)
        adams, self._arrays = per_shard(self.adam, self.layout, self.world_size, state)
        indexes = [shard.index for shard in self.layout.shards]
        self._adams = dict(zip(indexes, adams, strict=True))

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
        del t, shared
        adam = self._adams[shard]
        weights = adam.weights(weights)
        adam.advance(lr)
        for index, segment in enumerate(self.cut(shard).segments):
            x = None if weights is None else weights[index]
            adam.write(gradients[index], part_of(out, segment), start=segment.offset, x=x)

    def resume(self, steps: int) -> None:  # noqa: D102 - as the base class
        super().resume(steps)
        for adam in self._adams.values():
            adam.resume(steps)

    def resume_shard(self, shard: int, steps: int) -> None:  # noqa: D102 - as the base class
        super().resume_shard(shard, steps)
        twin = next((a for a in self._adams.values() if a.count == steps), None)
        if twin is None:
            self._adams[shard].resume(steps)
        else:
            self._adams[shard].resume_as(twin)


class Momentum(DirectionRule):
    """The gradient with momentum: heavy ball or an average, looking ahead (Nesterov) or not."""

    state_names = ("m",)

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
        del t, lr, shared
        gather(gradients, out)
        self._decay(shard, out, weights)
        m, beta = self.of("m", shard), np.float32(self.options["beta"])
        if self.options["ema"]:
            np.multiply(out, np.float32(1.0 - float(self.options["beta"])), out=out)
        np.multiply(m, beta, out=m)
        np.add(m, out, out=m)
        if self.options["nesterov"]:
            np.add(out, beta * m, out=out)
        else:
            out[:] = m

    def _decay(self, shard: int, out: Floats, weights: Segments | None) -> None:
        """Add weight_decay times the weights, where there is any."""
        if not self.options["weight_decay"]:
            return
        if weights is None:
            msg = "weight decay needs the current weights: pass weights"
            raise UsageError(msg)
        decay = np.float32(self.options["weight_decay"])
        for segment, x in zip(self.cut(shard).segments, weights, strict=True):
            part = part_of(out, segment)
            np.add(part, decay * x, out=part)


class Lion(DirectionRule):
    """Two averages of the gradients, one said and one kept; of what is said the sign counts."""

    state_names = ("m",)

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
        m = self.of("m", shard)
        said, kept = float(self.options["beta1"]), float(self.options["beta2"])
        gather(gradients, out)
        rest = np.float32(1.0 - kept) * out
        np.multiply(out, np.float32(1.0 - said), out=out)
        np.add(out, np.float32(said) * m, out=out)
        np.multiply(m, np.float32(kept), out=m)
        np.add(m, rest, out=m)


class Optimistic(DirectionRule):
    """Optimistic mirror descent: steps from a point that the last step's field looks ahead to."""

    state_names = ("f",)
    looks_ahead = True

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
        del t, weights, shared
        gather(gradients, out)
        np.multiply(out, np.float32(lr), out=out)
        self.of("f", shard)[:] = out

    def look_ahead(self, shard: int, residual: Floats | None, out: Floats) -> None:  # noqa: D102
        out[:] = self.of("f", shard)
        if residual is not None:
            np.add(out, residual, out=out)

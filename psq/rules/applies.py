"""Applies: what becomes of the aggregate. Each changes it, in place, to what x loses.

    add      x -= g                     g is an update, its learning rate inside
    adam     x -= Adam's step on g      `psq.optim`
    sgd      g += w x;  b = mu b + (1 - rho) g  (b = g in the first round);  g += mu b (nesterov),
             else g = b;  x -= lr g     torch's SGD, in the order of its operations
             decoupled: w x is left out of g, and x -= lr w x besides, as AdamW does
    ef21     h += g;  x -= lr h         g is the mean of what changed since the last messages
    return   x stays                    the mean is for an optimizer of each worker's own

All are functions of their state, the round t, the rate and the aggregate alone, in float32 and in a
fixed order, so that every node that runs one on the same bytes has the same weights. They go
through memory by blocks that stay in the cache. Never here: the payloads, and who sent them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from psq.errors import ConfigError
from psq.kernels import AdamCoefficients, Floats
from psq.optim import Adam, per_shard
from psq.rules.base import ApplyRule, RuleOptions
from psq.rules.blocks import BLOCK_NUMEL, blocks, check_rate

__all__ = ["AdamStep", "Add", "Ef21", "Return", "Sgd"]


class Add(ApplyRule):
    """The aggregate is the step."""

    def write(self, shard: int, change: Floats, x: Floats) -> None:
        """Leave it as it is. Cost: nothing."""


class Return(ApplyRule):
    """The weights stay as they are; who receives the mean steps by an optimizer of its own."""

    def write(self, shard: int, change: Floats, x: Floats) -> None:
        """Take nothing off the weights."""
        del shard, x
        change.fill(0.0)


class AdamStep(ApplyRule):
    """Generic Adam on the mean gradient, one for each shard over common vectors.

    The moments' bias is corrected by t, so a node that is given the moments needs no history.
    """

    def __init__(self, options: RuleOptions, **given: Any) -> None:
        state: Mapping[str, Floats] | None = given.pop("state", None)
        super().__init__(options, **given)
        if self.adam is None:
            msg = "apply adam needs Adam's settings"
            raise ConfigError(msg)
        adams, self._arrays = per_shard(self.adam, self.layout)
        if state is not None:
            self._arrays = {name: state[name] for name in self._arrays}
            adams = [self._over(shard) for shard in self._shards]
        self._adams = dict(zip(self._shards, adams, strict=True))

    def advance(self, shard: int, t: int, lr: float) -> None:
        """Begin round t; a shard whose Adam has counted otherwise takes that count."""
        adam = self._adams[shard]
        if adam.count != t - 1:
            adam.resume(t - 1)
        adam.advance(lr)

    def coefficients(self, shard: int) -> AdamCoefficients:
        """The numbers of the round that `advance` began, for a kernel that has Adam inside."""
        return self._adams[shard].coefficients

    def write(self, shard: int, change: Floats, x: Floats) -> None:
        """Turn the mean gradient into Adam's step. Cost: one pass over g, m, v, and x for decay."""
        self._adams[shard].write(change, change, x=x)

    def _over(self, shard: int) -> Adam:
        assert self.adam is not None  # noqa: S101 - refused above
        views = {name: self.of(name, shard) for name in self._arrays}
        return Adam(self.adam, self.cut(shard).numel, state=views)


class Sgd(ApplyRule):
    """torch's SGD, for the mean gradient, or with a rate of its own for the mean update."""

    state_names: ClassVar[tuple[str, ...]] = ("velocity",)

    def __init__(self, options: RuleOptions, **given: Any) -> None:
        super().__init__(options, **given)
        self._momentum = np.float32(options["momentum"])
        self._nesterov = bool(options["nesterov"])
        self._decay = np.float32(options["weight_decay"])
        self._decoupled = bool(options["decoupled"])
        self._rate = float(options["rate"])
        self._kept = np.float32(1.0 - float(options["dampening"]))
        if self._nesterov and (self._momentum == 0.0 or self._kept != 1.0):
            msg = "sgd: nesterov needs momentum > 0 and no dampening"
            raise ConfigError(msg)
        self._steps: dict[int, tuple[int, np.float32]] = {}
        self._scratch = np.empty(BLOCK_NUMEL, np.float32)

    @classmethod
    def is_linear(cls, options: RuleOptions) -> bool:
        """The step is the push's rate times the messages, unless it has a rate of its own."""
        return not options["rate"]

    def state_arrays(self) -> dict[str, Floats]:
        """The velocity, where there is momentum."""
        return super().state_arrays() if self._momentum else {}

    def advance(self, shard: int, t: int, lr: float) -> None:
        """Note the round and its rate."""
        self._steps[shard] = (t, np.float32(self._rate or check_rate(lr)))

    def write(self, shard: int, change: Floats, x: Floats) -> None:
        """Turn the aggregate into SGD's step. Cost: a pass; reads x for decay, updates velocity."""
        t, rate = self._steps[shard]
        velocity = self.of("velocity", shard)
        for at in blocks(change.size):
            g, part = change[at], self._scratch[: at.stop - at.start]
            if self._decay and not self._decoupled:
                self._add_decay(g, x[at], part)
            if self._momentum:
                self._move(velocity[at], g, part, first=t == 1)
            if self._decay and self._decoupled:
                self._add_decay(g, x[at], part)
            np.multiply(g, rate, out=g)

    def _add_decay(self, g: Floats, x: Floats, part: Floats) -> None:
        np.multiply(x, self._decay, out=part)
        np.add(g, part, out=g)

    def _move(self, velocity: Floats, g: Floats, part: Floats, *, first: bool) -> None:
        """Take g into the velocity, and make g what the step goes along."""
        if first:
            velocity[:] = g
        else:
            np.multiply(velocity, self._momentum, out=velocity)
            np.multiply(g, self._kept, out=part)
            np.add(velocity, part, out=velocity)
        if self._nesterov:
            np.multiply(velocity, self._momentum, out=part)
            np.add(g, part, out=g)
        else:
            g[:] = velocity


class Ef21(ApplyRule):
    """EF21's server: h is the mean of what every worker believes it has said."""

    state_names: ClassVar[tuple[str, ...]] = ("h",)
    counts_absent: ClassVar[bool] = True

    def __init__(self, options: RuleOptions, **given: Any) -> None:
        super().__init__(options, **given)
        self._rates: dict[int, np.float32] = {}

    def advance(self, shard: int, t: int, lr: float) -> None:
        """Note the rate."""
        del t
        self._rates[shard] = np.float32(check_rate(lr))

    def write(self, shard: int, change: Floats, x: Floats) -> None:
        """Add the mean difference to h, and step along h. Cost: one pass over both."""
        del x
        h = self.of("h", shard)
        for at in blocks(change.size):
            np.add(h[at], change[at], out=h[at])
            np.multiply(h[at], self._rates[shard], out=change[at])

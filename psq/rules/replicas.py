"""Applies whose state every worker has as well: what they send is in its terms.

    t counts rounds; a round is marked when the uplink's choice of codecs has it in another than the
    first: the rounds of the warm-up, or those that refresh. b, w: Adam's weights of m and v.

    onebit   marked: Adam on the mean gradient g, bias corrected
             then    m = g (momenta, averaged);  x -= lr m / (1 - b^t) / max(r, floor)
                     r = sqrt(v / (1 - w^T)) + eps, T the last marked round: v stays as it is
    shared   marked: v = w^n v + (1 - w^n) g^2, n rounds after the last mark
                     s = sqrt(v / (1 - w^t)) + eps, at least floor times its rms in a segment
                     d = d s_before / s;  d = b d + (1 - b) g / s;  residuals *= s_before / s
             else    d = g (in units of s)
             always  x -= lr d / (1 - b^t)

After 1-bit Adam (2102.02888) and 0/1 Adam (2202.06009); `shared` is this project's. The floors are:
where a v is tiny by chance when it is frozen, the steps over it would be huge for ever.
Each needs all nodes in step: what a message means depends on its round.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from psq.errors import ConfigError
from psq.kernels import Floats
from psq.layout import Segment
from psq.recipe import AdamConfig, OneMinusPower, Power, schedule_value
from psq.rules.base import ApplyRule, RuleOptions
from psq.rules.blocks import BLOCK_NUMEL, blocks, check_rate

__all__ = ["OneBit", "Shared"]


class _Marked(ApplyRule):
    """An apply whose rounds are of two kinds, as the uplink's choice has them."""

    def __init__(self, options: RuleOptions, **given: Any) -> None:
        super().__init__(options, **given)
        kind = type(self).__name__.lower()
        if self.choice is None or not self.is_marked(next(iter(self._shards)), 1):
            msg = (
                f"apply {kind} needs an uplink whose choice has the first rounds in a codec of "
                "their own, as first and periodic have"
            )
            raise ConfigError(msg)
        self._config = _plain(self.adam, kind)
        self._beta = schedule_value(self._config.beta, 1)
        self._theta = schedule_value(self._config.theta, 1)
        self._eps = np.float32(self._config.eps)
        self._floor = float(options["floor"])
        self._steps: dict[int, tuple[int, float]] = {}
        self._scratch = np.empty(BLOCK_NUMEL, np.float32)

    def is_marked(self, shard: int, t: int) -> bool:
        """Whether a round is one of those that speak in another codec."""
        assert self.choice is not None  # noqa: S101 - refused above
        return self.choice.choose(shard, t, _no_norm) != 0

    def last_mark(self, shard: int, t: int) -> int:
        """The last marked round before t; 0 if there is none. Cost: the rounds between."""
        before = t - 1
        while before > 0 and not self.is_marked(shard, before):
            before -= 1
        return before

    def advance(self, shard: int, t: int, lr: float) -> None:
        """Note the round and its rate."""
        self._steps[shard] = (t, check_rate(lr))

    def _decay(self, change: Floats, x: Floats, lr: float) -> None:
        """Add decoupled weight decay to the step."""
        weight = np.float32(lr * self._config.weight_decay)
        if weight == 0.0:
            return
        for at in blocks(change.size):
            part = self._scratch[: at.stop - at.start]
            np.multiply(x[at], weight, out=part)
            np.add(change[at], part, out=change[at])


class OneBit(_Marked):
    """Adam, then momentum over a v that stays as it is."""

    state_names: ClassVar[tuple[str, ...]] = ("m", "v")

    def __init__(self, options: RuleOptions, **given: Any) -> None:
        super().__init__(options, **given)
        self._floors: dict[tuple[int, int], np.float32] = {}
        self._frozen_at = 0

    def write(self, shard: int, change: Floats, x: Floats) -> None:
        """Turn the mean gradient, or momentum, into a step. Cost: a pass over it, m and v."""
        t, lr = self._steps[shard]
        marked = self.is_marked(shard, t)
        if marked:
            self._learn(shard, change)
            warm = t
        else:
            self.of("m", shard)[:] = change
            warm = self._frozen(shard, t)
        step = np.float32(lr / (1.0 - power(self._beta, t)))
        root = np.float32(1.0 / (1.0 - power(self._theta, max(warm, 1))))
        for segment in self.cut(shard).segments:
            floor = np.float32(0.0) if marked else self._floor_of(shard, segment, root)
            self._divide(shard, segment, change, step, root, floor)
        self._decay(change, x, lr)

    def _learn(self, shard: int, g: Floats) -> None:
        """Adam's moments take a mean gradient."""
        m, v = self.of("m", shard), self.of("v", shard)
        for at in blocks(g.size):
            _average(m[at], g[at], self._beta, self._scratch[: at.stop - at.start])
            _average_square(v[at], g[at], self._theta, self._scratch[: at.stop - at.start])

    def _divide(  # noqa: PLR0913, PLR0917 - the numbers of a step
        self,
        shard: int,
        segment: Segment,
        out: Floats,
        step: np.float32,
        root: np.float32,
        floor: np.float32,
    ) -> None:
        """Write a segment's step: m over the root of v."""
        m, v = self.of("m", shard), self.of("v", shard)
        for at in blocks(segment.numel, segment.offset):
            under = self._scratch[: at.stop - at.start]
            np.multiply(v[at], root, out=under)
            np.sqrt(under, out=under)
            np.add(under, self._eps, out=under)
            np.maximum(under, floor, out=under)
            np.multiply(m[at], step, out=out[at])
            np.divide(out[at], under, out=out[at])

    def _frozen(self, shard: int, t: int) -> int:
        """The last round of the warm-up; it is looked for once."""
        if not 0 < self._frozen_at < t:
            self._frozen_at = self.last_mark(shard, t)
        return self._frozen_at

    def _floor_of(self, shard: int, segment: Segment, root: np.float32) -> np.float32:
        """The least root of v in a segment, from the moment that v stays as it is."""
        key = (shard, segment.offset)
        if key not in self._floors:
            v = self.of("v", shard)[segment.offset : segment.offset + segment.numel]
            mean = float(np.add.reduce(v, dtype=np.float64)) / v.size * float(root)
            self._floors[key] = np.float32(self._floor * mean**0.5)
        return self._floors[key]


class Shared(_Marked):
    """Everyone's direction, in units of sqrt(v) that change now and then."""

    state_names: ClassVar[tuple[str, ...]] = ("v", "s", "d")
    units: ClassVar[str] = "s"

    def __init__(self, options: RuleOptions, **given: Any) -> None:
        super().__init__(options, **given)
        self._factors: dict[int, Floats] = {}

    def uses_residual(self, shard: int, t: int) -> bool:
        """Gradients are in other units than the residual, which waits for the next direction."""
        return not self.is_marked(shard, t)

    def write(self, shard: int, change: Floats, x: Floats) -> None:
        """Turn the mean gradient, or direction, into a step. Cost: a pass; six with a mark."""
        t, lr = self._steps[shard]
        d, step = self.of("d", shard), np.float32(lr / (1.0 - power(self._beta, t)))
        self._factors.pop(shard, None)
        if self.is_marked(shard, t):
            factor = self._factors[shard] = np.empty(change.size, np.float32)
            self._refresh(shard, t, change, factor)
            np.multiply(d, step, out=change)
        else:
            for at in blocks(change.size):
                d[at] = change[at]
                np.multiply(change[at], step, out=change[at])
        self._decay(change, x, lr)

    def rescale(self, shard: int) -> Floats | None:
        """What residuals have to be multiplied by after a mark; given once."""
        return self._factors.pop(shard, None)

    def _refresh(self, shard: int, t: int, g: Floats, factor: Floats) -> None:
        """Take a mean gradient into v, and change the units."""
        v, s, d = (self.of(name, shard) for name in ("v", "s", "d"))
        weight = power(self._theta, t - self.last_mark(shard, t))
        root = np.float32(1.0 / (1.0 - power(self._theta, t)))
        for at in blocks(g.size):
            _average_square(v[at], g[at], weight, self._scratch[: at.stop - at.start])
            np.multiply(v[at], root, out=factor[at])
            np.sqrt(factor[at], out=factor[at])
        for segment in self.cut(shard).segments:
            self._raise(factor[segment.offset : segment.offset + segment.numel])
        for at in blocks(g.size):
            part = self._scratch[: at.stop - at.start]
            part[:] = factor[at]
            np.divide(s[at], part, out=factor[at])
            factor[at][s[at] == 0.0] = 1.0  # no units yet: nothing waits in any
            s[at] = part
            np.multiply(d[at], factor[at], out=d[at])
            np.divide(g[at], part, out=g[at])
            _average(d[at], g[at], self._beta, part)

    def _raise(self, s: Floats) -> None:
        """Lift what is under the floor of a segment; where nothing has a size, units are 1."""
        square = float(np.add.reduce(np.square(s), dtype=np.float64)) / s.size
        if square > 0.0:
            np.add(s, self._eps, out=s)
            np.maximum(s, np.float32(self._floor * square**0.5), out=s)
        else:
            s.fill(1.0)


def _plain(adam: AdamConfig | None, kind: str) -> AdamConfig:
    """Adam's settings, if they are of the form that these rules have."""
    if adam is None:
        msg = f"apply {kind} needs Adam's settings"
        raise ConfigError(msg)
    odd = {
        "beta that changes": isinstance(adam.beta, Power | OneMinusPower),
        "theta that changes": isinstance(adam.theta, Power | OneMinusPower),
        "eps_placement": adam.eps_placement != "outside",
        "amsgrad": adam.amsgrad,
        "variance_correction": adam.variance_correction,
        "bias_correction=false": not adam.bias_correction,
        "L2 weight_decay": bool(adam.weight_decay) and not adam.decoupled,
    }
    named = [name for name, is_so in odd.items() if is_so]
    if named:
        msg = f"apply {kind} has no {named[0]}: leave it out, or take apply adam"
        raise ConfigError(msg)
    return adam


def power(base: float, exponent: int) -> float:
    """A power by multiplications alone: the same double on every machine."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def _average(mean: Floats, value: Floats, weight: float, part: Floats) -> None:
    """Make mean = weight mean + (1 - weight) value."""
    np.multiply(mean, np.float32(weight), out=mean)
    np.multiply(value, np.float32(1.0 - weight), out=part)
    np.add(mean, part, out=mean)


def _average_square(mean: Floats, value: Floats, weight: float, part: Floats) -> None:
    """Make mean = weight mean + (1 - weight) value^2."""
    np.multiply(value, value, out=part)
    np.multiply(part, np.float32(1.0 - weight), out=part)
    np.multiply(mean, np.float32(weight), out=mean)
    np.add(mean, part, out=mean)


def _no_norm() -> float:
    msg = "a choice that marks rounds decides by their number alone"
    raise ConfigError(msg)

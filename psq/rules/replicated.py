"""Directions that start from a vector which every node holds alike, and so need none of their own.

    onebit   warm-up   c = g                                    after 2102.02888
             then      c = b1 m + (1 - b1) g                    m: the mean of what was said last
    shared   refresh   c = g, without the residual              ours; docs/design.md
             else      c = b1 d + (1 - b1) g / s                d: as m; s: about sqrt(v)

Which round is which follows from its number by the choice of the uplink's codecs, so that all nodes
agree: a message in the default codec is not of a warm-up and no refresh. What is shared is moved by
`psq.rules.applies`, on every node, by the same bytes.

In `shared` the residual is in units of s. A refresh is said in other units, so it neither takes
from the residual nor leaves anything there; s then changes, and the apply says by how much the
residual has to be rescaled.
"""

from __future__ import annotations

from collections.abc import Mapping

from psq.errors import ConfigError, UsageError
from psq.kernels import Blend, Floats, blend
from psq.recipe import schedule_value
from psq.rules.base import DirectionRule, Move, Segments
from psq.rules.directions import gather

__all__ = ["OneBit", "Shared"]


class _Replicated(DirectionRule):
    """What both have: Adam's beta, a choice that tells the rounds apart, and shared vectors."""

    def setup(self, state: Mapping[str, Floats] | None) -> None:
        del state
        if self.adam is None or self.choice is None or len(self.choice.codecs) == 1:
            msg = "this direction needs Adam settings and an uplink whose codec follows the round"
            raise ConfigError(msg)
        self._beta, self._choice = self.adam.beta, self.choice

    def _is_marked(self, t: int) -> bool:
        """Whether round t is one of the warm-up, or a refresh."""
        return self._choice.choose(0, t, _no_norm) > 0

    def _move(self, t: int, before: Floats, unit: Floats | None = None) -> Move:
        """To beta before + (1 - beta) g, which is divided by its unit first."""
        beta = schedule_value(self._beta, t)
        return Move(Blend(beta, 1.0 - beta), before, unit)

    def write(  # noqa: PLR0913 - as the base class
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
        del shard, lr, weights
        gather(gradients, out)
        move = self.move(t, shared)
        if move is not None:
            blend(move.blend, out, move.before, move.unit, out)


class OneBit(_Replicated):
    """The gradient during warm-up, then the common momentum moved by it."""

    def move(self, t: int, shared: Mapping[str, Floats]) -> Move | None:  # noqa: D102 - as the base
        return None if self._is_marked(t) else self._move(t, _of(shared, "m"))


class Shared(_Replicated):
    """The common direction moved by the gradient in units of about sqrt(v)."""

    def setup(self, state: Mapping[str, Floats] | None) -> None:
        """Refuse rounds that begin before there is a unit."""
        super().setup(state)
        if not self._is_marked(1):
            msg = "direction shared needs a refresh in the first round: set the choice's first >= 1"
            raise ConfigError(msg)

    def uses_residual(self, t: int) -> bool:  # noqa: D102 - as the base class
        return not self._is_marked(t)

    def move(self, t: int, shared: Mapping[str, Floats]) -> Move | None:  # noqa: D102 - as the base
        if self._is_marked(t):
            return None
        unit = _of(shared, "s")
        return self._move(t, _of(shared, "d"), unit)


def _of(shared: Mapping[str, Floats], name: str) -> Floats:
    if name not in shared:
        msg = f"this direction starts from {name!r}, which every node holds: pass shared"
        raise UsageError(msg)
    return shared[name]


def _no_norm() -> float:
    msg = "rounds must follow from their number alone: choose first or periodic"
    raise ConfigError(msg)

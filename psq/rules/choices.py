"""Which codec a shard's message is written in, where the round alone decides.

    first      codec 1 while t <= steps, then the default
    periodic   codec 1 while t <= first, and where t is a multiple of period; else the default

Every node computes the same, so neither side has to be told: rules whose rounds differ (`onebit`,
`shared`) ask the choice which round it is.
"""

from __future__ import annotations

from collections.abc import Callable

from psq.rules.base import ChoiceRule

__all__ = ["First", "Periodic"]


class First(ChoiceRule):
    """Another codec for the first steps."""

    def choose(self, shard: int, t: int, norm: Callable[[], float]) -> int:  # noqa: D102
        del shard, norm
        return int(t <= int(self.options["steps"]))


class Periodic(ChoiceRule):
    """Another codec for the first steps, and then every so many."""

    def choose(self, shard: int, t: int, norm: Callable[[], float]) -> int:  # noqa: D102
        del shard, norm
        return int(t <= int(self.options["first"]) or t % int(self.options["period"]) == 0)

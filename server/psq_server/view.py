"""A whole round as a recipe's rules may look at it, before the first shard of it is reduced.

Payloads stay as they came; they are decoded when a rule asks, into memory of the rule's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from psq.codec import ShardCodec
from psq.kernels import Buffer, Floats
from psq_server.state import Pushed

__all__ = ["View"]


class View:
    """See `psq.rules.RoundView`.

    Args:
        number: the round, from 1.
        said: of each shard that the round moves, the contributions by ascending rank.
        codec: gives the codec of a shard by its wire id.
        x: gives a shard's weights; only to be read.
    """

    def __init__(
        self,
        number: int,
        said: Mapping[int, Sequence[Pushed]],
        *,
        codec: Callable[[int, int], ShardCodec],
        x: Callable[[int], Floats],
    ) -> None:
        self.number = number
        self.shards: Sequence[int] = tuple(sorted(said))
        self._codec = codec
        self._x = x
        self._said = {(one.rank, shard): one for shard, pushed in said.items() for one in pushed}
        firsts: dict[int, Pushed] = {}
        for (rank, _), one in sorted(self._said.items()):
            firsts.setdefault(rank, one)
        self.ranks: Sequence[int] = tuple(firsts)
        self.staleness: Mapping[int, int] = {r: one.staleness for r, one in firsts.items()}
        self.weights: Mapping[int, float] = {r: float(one.weight) for r, one in firsts.items()}

    def payload(self, rank: int, shard: int) -> tuple[ShardCodec, Buffer] | None:
        """What a rank said of a shard, checked; None where it said nothing."""
        one = self._said.get((rank, shard))
        return None if one is None else (self._codec(shard, one.codec), one.payload)

    def decode(self, rank: int, shard: int, out: Floats) -> None:
        """Write what a rank said of a shard to out, f32[shard.numel]; zeros for nothing."""
        found = self.payload(rank, shard)
        if found is None:
            out.fill(0.0)
        else:
            found[0].decode(found[1], out)

    def x(self, shard: int) -> Floats:
        """The weights of a shard before this round, f32[shard.numel]; only to be read."""
        view = self._x(shard)
        view.flags.writeable = False
        return view

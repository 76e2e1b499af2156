"""Who is to have which shard's whole weights from an aggregator, which has none itself.

    want -> begin, a pull -> took, part by part -> all shards are whole -> begin, if any are wanted

One pull is under way at a time, and serves those that wanted a shard when it began; its frames come
part by part, all parts of a shard of one version. Whoever comes meanwhile is served by the next. A
pull whose frames have stopped coming is given up, and begun again. Pure bookkeeping.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from psq_proto.frames import Header

__all__ = ["PULL_AGAIN_S", "WholeWeights"]

PULL_AGAIN_S: Final = 5.0
"""Whole weights that have stopped coming for so long are asked for again."""


class WholeWeights:
    """See the module's docstring.

    Args:
        shards: all that the job's server has.
        now_s: the first pull, which a worker's state machine makes by itself, is under way.
    """

    def __init__(self, shards: Iterable[int], now_s: float) -> None:
        self._shards = tuple(shards)
        self._wanted: dict[int, dict[bytes, None]] = {}
        self._served: dict[int, dict[bytes, None]] = {}
        self._parts: dict[int, tuple[int, set[int]]] = {}
        self._pulling = set(self._shards)
        self._heard_s = now_s

    def want(self, peers: Sequence[bytes], shards: Iterable[int]) -> None:
        """These peers are to have these shards whole."""
        for shard in shards:
            self._wanted.setdefault(shard, {}).update(dict.fromkeys(peers))

    def is_due(self, now_s: float) -> bool:
        """Whether somebody wants something that no pull under way will bring."""
        if self._pulling and now_s - self._heard_s < PULL_AGAIN_S:
            return False
        return bool(self._wanted or self._served)

    def begin(self, now_s: float) -> None:
        """A pull begins, for all that want something; what an earlier one did not bring as well."""
        for shard, peers in self._wanted.items():
            self._served.setdefault(shard, {}).update(peers)
        self._wanted = {}
        self._pulling = set(self._shards)
        self._parts = {}
        self._heard_s = now_s

    def join_pull(self) -> None:
        """The pull under way has brought nothing yet: it serves all that want something."""
        self.begin(self._heard_s)

    def receivers(self, shard: int) -> tuple[bytes, ...]:
        """Whom a frame of this shard goes to."""
        return tuple(self._served.get(shard, ()))

    def took(self, header: Header, parts: int, now_s: float) -> bool:
        """A frame of whole weights has come; whether its shard is whole now.

        Args:
            header: the frame's.
            parts: how many frames make the shard.
            now_s: when.
        """
        self._heard_s = now_s
        version, there = self._parts.get(header.shard, (header.version, set()))
        if version != header.version:
            there = set()
        there.add(header.part)
        self._parts[header.shard] = (header.version, there)
        if len(there) < parts:
            return False
        del self._parts[header.shard]
        self._pulling.discard(header.shard)
        self._served.pop(header.shard, None)
        return True

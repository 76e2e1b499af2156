"""The open round: who has said what, held until everybody has.

    rank 0   [ s0 | s1 | s2 ]      complete
    rank 1   [ s0 |    | s2 ]      owes shard 1
    rank 2   SKIP                  complete: it contributes nothing
    rank 3   refused               one of its shards was unfit: nothing is kept, only SKIP is taken

A contribution is all of one rank's shards for one round: it counts whole or not at all. So when one
shard is refused the others go with it, and later ones are refused too until the rank has said SKIP:
nothing of a rejected attempt can mix with another. A shard that comes twice with the same checksum
is the same shard (workers send again what they think was lost).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

__all__ = ["Contribution", "OpenRound"]


@dataclass(slots=True)
class Contribution:
    """What one rank has staged. `payloads` and `checksums` are by shard."""

    rate: float = 0.0
    skipped: bool = False
    refused: bool = False
    payloads: dict[int, memoryview] = field(default_factory=dict)
    checksums: dict[int, int] = field(default_factory=dict)


class OpenRound:
    """The contributions of one round, bounded by ranks x shards.

    Args:
        number: the round; it turns version `number` into `number` + 1.
        shard_count: how many shards make a contribution complete.
    """

    def __init__(self, number: int, shard_count: int) -> None:
        self.number = number
        self.shard_count = shard_count
        self.staged_bytes = 0
        self.rate: tuple[int, float] | None = None
        """(rank, learning rate) of the first rank that named one: all must name the same."""
        self._contributions: dict[int, Contribution] = {}

    def get(self, rank: int) -> Contribution | None:
        """What this rank has staged, if anything."""
        return self._contributions.get(rank)

    def stage(
        self, rank: int, shard: int, payload: memoryview, *, checksum: int, rate: float
    ) -> None:
        """Keep one shard's payload; the caller has checked all of it."""
        mine = self._contributions.setdefault(rank, Contribution(rate))
        assert not mine.skipped, rank
        assert not mine.refused, rank
        assert shard not in mine.payloads, (rank, shard)
        mine.payloads[shard] = payload
        mine.checksums[shard] = checksum
        self.staged_bytes += payload.nbytes
        if self.rate is None:
            self.rate = (rank, rate)

    def skip(self, rank: int) -> None:
        """Note that this rank contributes nothing; what it has staged so far is dropped."""
        self.drop(rank)
        self._contributions[rank] = Contribution(skipped=True)

    def refuse(self, rank: int) -> None:
        """Drop what this rank has staged, and expect nothing but SKIP of it."""
        self.drop(rank)
        self._contributions[rank] = Contribution(refused=True)

    def drop(self, rank: int) -> bool:
        """Forget what this rank has staged; whether there was anything."""
        gone = self._contributions.pop(rank, None)
        if gone is None:
            return False
        self.staged_bytes -= sum(payload.nbytes for payload in gone.payloads.values())
        said = [(other, mine.rate) for other, mine in self.items() if mine.payloads]
        self.rate = min(said, default=None)
        return True

    def is_complete(self, rank: int) -> bool:
        """Whether this rank owes nothing more to this round."""
        mine = self._contributions.get(rank)
        return mine is not None and (mine.skipped or len(mine.payloads) == self.shard_count)

    @property
    def complete(self) -> tuple[int, ...]:
        """The ranks whose contribution is complete, ascending."""
        return tuple(sorted(filter(self.is_complete, self._contributions)))

    @property
    def contributors(self) -> tuple[int, ...]:
        """The complete ranks that contribute something, ascending: the order of the sum."""
        return tuple(rank for rank in self.complete if not self._contributions[rank].skipped)

    @property
    def staged(self) -> dict[int, Collection[int]]:
        """The shards each rank has staged."""
        return {rank: mine.payloads.keys() for rank, mine in self._contributions.items()}

    def missing(self, rank: int, limit: int) -> tuple[int, ...]:
        """The first shards, at most `limit`, that this rank still owes."""
        if self.is_complete(rank):
            return ()
        mine = self._contributions.get(rank)
        held: Collection[int] = mine.payloads.keys() if mine else ()
        owed: list[int] = []
        for shard in range(self.shard_count):
            if len(owed) == limit:
                break
            if shard not in held:
                owed.append(shard)
        return tuple(owed)

    def payloads(self, shard: int) -> tuple[memoryview, ...]:
        """This shard's payloads of all contributors, in rank order."""
        return tuple(self._contributions[rank].payloads[shard] for rank in self.contributors)

    def items(self) -> Iterator[tuple[int, Contribution]]:
        """(rank, contribution) of everyone who has staged something."""
        yield from self._contributions.items()

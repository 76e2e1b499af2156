"""The open round: who has said what of which shard, held until the shard is reduced.

    shard         0         1         2
    rank 0    [ counted | staged  | staged  ]    complete: it owes nothing more
    rank 1    [ counted | refused |         ]    owes shard 2
    rank 2    [ counted | nothing | nothing ]    SKIP after shard 0: complete
                closed    open      open

A rank has said a shard when it pushed it, skipped it, or was refused it. A contribution is what one
rank says under one name (its base: the version it was computed from), and it is resolved as one, by
one verdict; but each shard of it counts, or does not, by itself. Payloads are held from the push
until their shard is closed, when they are handed to the reducer and let go; the checksum stays, so
that a shard that comes twice is known to be the same (workers send again what they think was lost).

Where a recipe judges whole rounds, what was taken waits for its judgement before the first shard
is handed over; a rank that is refused then has said nothing.

Plain bookkeeping: what may be said, and when a shard closes, is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from psq_proto.frames import Buffer
from psq_server.state.events import Pushed

__all__ = ["Contribution", "OpenRound", "kind_of"]

MAX_KIND_CHARS: Final = 24


@dataclass(slots=True)
class Contribution:
    """What one rank has said under one name.

    Attributes:
        base: the version it was computed from, which is also its seq.
        rate: the learning rate it names, None before its first payload.
        payloads: by shard, what is staged and not yet handed to the reducer.
        checksums: by shard, of every payload taken, handed on or not.
        counted: the shards whose payload was handed to the reducer.
        nothing: the shards that the rank skipped.
        refused: the shards whose payload was not taken.
        reason: why the first of them was not.
        kind: that in a word, for those who count.
    """

    base: int
    rate: float | None = None
    payloads: dict[int, Pushed] = field(default_factory=dict)
    checksums: dict[int, int] = field(default_factory=dict)
    counted: set[int] = field(default_factory=set)
    nothing: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    reason: str = ""
    kind: str = ""

    def said(self, shard: int) -> bool:
        """Whether this shard was pushed, skipped or refused."""
        return shard in self.checksums or shard in self.nothing or shard in self.refused

    @property
    def said_count(self) -> int:
        """How many shards it has said."""
        return len(self.checksums) + len(self.nothing) + len(self.refused)

    @property
    def staged_bytes(self) -> int:
        """What its payloads hold."""
        return sum(pushed.payload.nbytes for pushed in self.payloads.values())

    @property
    def counts(self) -> bool:
        """Whether it is part of its round, be it with nothing."""
        return bool(self.counted or self.nothing)

    def uncounted(self, shards: Collection[int]) -> tuple[int, ...]:
        """The shards that do not count although the rank meant them to, ascending.

        Also those that have not come: whoever sent them must know that they were too late.
        """
        settled = self.counted | self.nothing
        return tuple(shard for shard in sorted(shards) if shard not in settled)


def kind_of(reason: str) -> str:
    """The word that a rule's reason begins with, before a colon; "judged" where it is none."""
    word, colon, _ = reason.partition(":")
    is_word = bool(colon) and len(word) <= MAX_KIND_CHARS and word.replace("-", "").isalnum()
    return word if is_word else "judged"


class OpenRound:
    """The contributions to one round, bounded by ranks x shards.

    Args:
        number: the round; it turns version `number` into `number` + 1.
        shards: the indexes of the shards that it moves, ascending.
        opened_s: when it began.
        owed: those of them that a contribution says; None: all.

    Attributes:
        closed: shards that have been given to the reducer, each with its new WEIGHTS frame once the
            reducer has answered.
        whole: whether contributions were taken whole; else shards close one by one.
        closing: the contributions that were.
        judging: whether they wait for their judgement.
        rate: (rank, learning rate) of the first that named one.
        staged_bytes: what all payloads hold.
    """

    def __init__(
        self,
        number: int,
        shards: tuple[int, ...],
        opened_s: float = 0.0,
        owed: tuple[int, ...] | None = None,
    ) -> None:
        self.number = number
        self.shards = shards
        self.owed = shards if owed is None else owed
        self.opened_s = opened_s
        self.closed: dict[int, Buffer | None] = {}
        self.whole = False
        self.closing: dict[int, Contribution] = {}
        self.judging = False
        self.rate: tuple[int, float] | None = None
        self.staged_bytes = 0
        self._contributions: dict[int, Contribution] = {}

    # ---- reading

    def get(self, rank: int) -> Contribution | None:
        """What this rank has said, if anything."""
        return self._contributions.get(rank)

    def items(self) -> Iterator[tuple[int, Contribution]]:
        """(rank, contribution) of everyone who has said something, ascending."""
        yield from sorted(self._contributions.items())

    @property
    def all_closed(self) -> bool:
        """Whether every shard is with the reducer, or back from it."""
        return len(self.closed) == len(self.shards)

    @property
    def is_reduced(self) -> bool:
        """Whether the reducer has answered for every shard."""
        return self.all_closed and all(frame is not None for frame in self.closed.values())

    def is_complete(self, rank: int) -> bool:
        """Whether this rank has begun to speak and owes nothing more."""
        mine = self._contributions.get(rank)
        if mine is None:
            return False
        whole = mine.said_count == len(self.owed)
        return whole or (bool(self.closed) and not self.missing(rank, 1))

    @property
    def complete(self) -> tuple[int, ...]:
        """The ranks whose contribution is complete, ascending."""
        return tuple(sorted(filter(self.is_complete, self._contributions)))

    def sayers(self, shard: int) -> tuple[int, ...]:
        """The ranks that have said this shard, ascending."""
        return tuple(rank for rank, mine in self.items() if mine.said(shard))

    def missing(self, rank: int, limit: int) -> tuple[int, ...]:
        """The first shards, at most `limit`, that this rank still owes.

        A shard that is closed is owed by nobody. (When contributions are taken whole, those that
        are left owe what they owed: shards close for the others alone.)
        """
        if rank in self.closing:
            return ()
        mine = self._contributions.get(rank)
        owed: list[int] = []
        for shard in self.owed:
            if len(owed) == limit:
                break
            if not self.is_shut(shard) and not (mine is not None and mine.said(shard)):
                owed.append(shard)
        return tuple(owed)

    def is_shut(self, shard: int) -> bool:
        """Whether this shard takes no payload any more in this round."""
        return shard in self.closed and not self.whole

    # ---- saying

    def begin(self, rank: int, base: int) -> Contribution:
        """This rank's contribution, a new one if it has none."""
        mine = self._contributions.setdefault(rank, Contribution(base))
        assert mine.base == base, (rank, mine.base, base)
        return mine

    def stage(self, shard: int, pushed: Pushed, *, base: int, checksum: int, rate: float) -> None:
        """Keep one shard's payload; the caller has checked all of it."""
        rank = pushed.rank
        mine = self.begin(rank, base)
        assert not mine.said(shard), (rank, shard)
        assert not self.is_shut(shard), (rank, shard)
        mine.payloads[shard] = pushed
        mine.checksums[shard] = checksum
        mine.rate = rate
        self.staged_bytes += pushed.payload.nbytes
        if self.rate is None:
            self.rate = (rank, rate)

    def skip(self, rank: int, base: int, shards: Collection[int]) -> None:
        """Note that this rank says nothing to those of `shards` that it has not said yet."""
        mine = self.begin(rank, base)
        mine.nothing.update(shard for shard in shards if not mine.said(shard))

    def refuse(self, rank: int, base: int, shard: int, reason: str, *, kind: str) -> None:
        """Take nothing of this shard from this rank; what it has staged there is dropped."""
        mine = self.begin(rank, base)
        assert shard not in mine.counted, (rank, shard)
        gone = mine.payloads.pop(shard, None)
        if gone is not None:
            self.staged_bytes -= gone.payload.nbytes
        mine.checksums.pop(shard, None)
        mine.nothing.discard(shard)
        mine.refused.add(shard)
        if not mine.reason:
            mine.reason, mine.kind = reason, kind

    def drop(self, rank: int, *, forget: bool = True) -> bool:
        """Let go what this rank has said of shards that are not closed; whether there was anything.

        Args:
            rank: whose.
            forget: also that it said the others: whoever speaks for the rank next did not.
        """
        mine = self._contributions.pop(rank, None)
        if mine is None:
            return False
        self.staged_bytes -= mine.staged_bytes
        if mine.counted and not forget:
            kept = {shard: mine.checksums[shard] for shard in mine.counted}
            self._contributions[rank] = Contribution(
                mine.base, mine.rate, checksums=kept, counted=mine.counted
            )
        if not self.closed:
            named = ((r, other.rate) for r, other in self.items() if other.rate is not None)
            self.rate = next(named, None)
        return bool(mine.payloads or mine.nothing or mine.refused)

    # ---- closing

    def close(self, shard: int) -> tuple[Pushed, ...]:
        """Hand over this shard's payloads of everybody, in rank order."""
        return self._hand_over(shard, self._contributions)

    def close_for(self, shard: int, speakers: Collection[int]) -> tuple[Pushed, ...]:
        """Close a shard for everybody, and hand over the payloads of these ranks."""
        return tuple(pushed for pushed in self.close(shard) if pushed.rank in speakers)

    def take(self, ranks: Collection[int]) -> None:
        """Close for the complete contributions of these ranks; the others stay as they are."""
        self.whole = True
        self.closing = {rank: self._contributions.pop(rank) for rank in sorted(ranks)}

    def taken(self) -> dict[int, tuple[Pushed, ...]]:
        """Of every shard what those taken have said, in rank order; nothing is handed over."""
        return {
            shard: tuple(
                self._of_now(mine, mine.payloads[shard])
                for _, mine in sorted(self.closing.items())
                if shard in mine.payloads
            )
            for shard in self.shards
        }

    def apply_judgement(self, weights: Mapping[int, float], refused: Mapping[int, str]) -> None:
        """Let those taken count as was judged; who is refused has said nothing."""
        self.judging = False
        for rank, mine in self.closing.items():
            if rank in refused:
                self._take_back(mine, refused[rank])
            elif rank in weights:
                weight = weights[rank]
                mine.payloads = {
                    shard: pushed._replace(weight=weight) for shard, pushed in mine.payloads.items()
                }

    def _take_back(self, mine: Contribution, reason: str) -> None:
        self.staged_bytes -= mine.staged_bytes
        mine.refused |= mine.payloads.keys() | mine.nothing
        mine.payloads.clear()
        mine.checksums.clear()
        mine.nothing.clear()
        mine.reason, mine.kind = reason, kind_of(reason)

    def disown(self, rank: int) -> None:
        """Let the contribution that was taken of this rank be nobody's; what counts stays."""
        mine = self.closing.pop(rank, None)
        if mine is not None:
            self.staged_bytes -= mine.staged_bytes

    def close_taken(self, shard: int) -> tuple[Pushed, ...]:
        """Hand over this shard's payloads of those taken, in rank order."""
        return self._hand_over(shard, self.closing)

    def _hand_over(self, shard: int, whose: dict[int, Contribution]) -> tuple[Pushed, ...]:
        assert shard not in self.closed, shard
        self.closed[shard] = None
        said: list[Pushed] = []
        for _, mine in sorted(whose.items()):
            pushed = mine.payloads.pop(shard, None)
            if pushed is not None:
                mine.counted.add(shard)
                said.append(self._of_now(mine, pushed))
                self.staged_bytes -= pushed.payload.nbytes
        return tuple(said)

    def _of_now(self, mine: Contribution, pushed: Pushed) -> Pushed:
        late = self.number - mine.base
        return pushed._replace(staleness=late) if late else pushed

    def following(
        self, shards: tuple[int, ...], now_s: float, owed: tuple[int, ...] | None = None
    ) -> OpenRound:
        """The next round, with what this one leaves: contributions that it did not take."""
        following = OpenRound(self.number + 1, shards, now_s, owed)
        if self.whole:
            following._contributions = self._contributions
            following.staged_bytes = self.staged_bytes
        return following

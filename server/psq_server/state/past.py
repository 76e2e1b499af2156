"""Rounds that were committed and whose payloads are with the workers, until these have come again.

At level `replay` a record says of each payload how long it was, and its xxh3; the bytes themselves
the worker keeps. After a crash these rounds are owed:

    owed --every payload is there, length and digest as in the record--> whole, the oldest first
                                                                     --> handed over, one at a time

Payloads are asked for in a window over the oldest rounds: at most WINDOW_ROUNDS of them and
WINDOW_BYTES of payload, but one round at least. So what lies here is bounded by that, however many
rounds there are.

Plain bookkeeping: whom to ask when, and what else waits meanwhile, is decided in `replaying`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from xxhash import xxh3_64_intdigest

from psq_proto.frames import Buffer
from psq_server.state.events import Pushed

__all__ = ["WINDOW_BYTES", "WINDOW_ROUNDS", "Collection", "Key", "Past", "Word", "digest_of"]

WINDOW_BYTES: Final = 64 << 20
WINDOW_ROUNDS: Final = 32

Key = tuple[int, int, int]
"""(rank, the name of its contribution, shard): one payload."""


def digest_of(payload: Buffer) -> int:
    """What a record says of a payload, beside its length: xxh3-64."""
    return int(xxh3_64_intdigest(payload))


@dataclass(frozen=True, slots=True)
class Word:
    """What a record says of one payload: whose, how it counts, and how to know it again.

    Attributes:
        payload: the bytes, where they are known; else `nbytes` and `digest` are.
    """

    rank: int
    codec: int
    weight: float
    staleness: int
    payload: memoryview | None = None
    nbytes: int = 0
    digest: int = 0

    def with_payload(self, payload: memoryview) -> Word:
        """The same, with its bytes."""
        return replace(self, payload=payload)

    def is_of(self, payload: memoryview) -> bool:
        """Whether these are its bytes."""
        return payload.nbytes == self.nbytes and digest_of(payload) == self.digest

    @property
    def pushed(self) -> Pushed:
        """As it is handed to the reducer."""
        assert self.payload is not None, self
        return Pushed(self.rank, self.payload, self.codec, self.weight, self.staleness)


Words = Mapping[int, tuple[Word, ...]]
"""By shard, in rank order."""


@dataclass(frozen=True, slots=True)
class Past:
    """A round that was committed.

    Attributes:
        number: the round.
        rates: the learning rate of each shard.
        shards: of each shard, in the order in which they were reduced, what counted.
        judged: what a rule looked at before, where one did; what counted is part of it.
        crcs: of each shard, the checksum of what the round answered.
        judged_rate: the rate that the rule was told.
    """

    number: int
    rates: Mapping[int, float]
    shards: Words
    judged: Words | None
    crcs: Mapping[int, int]
    judged_rate: float = 0.0

    def words(self) -> Iterator[tuple[Key, Word]]:
        """Every payload that it was made of, once."""
        for shard, words in (self.shards if self.judged is None else self.judged).items():
            for word in words:
                yield (word.rank, self.number - word.staleness, shard), word

    def missing(self) -> dict[Key, Word]:
        """Those whose bytes are not known."""
        return {key: word for key, word in self.words() if word.payload is None}

    def filled(self, payloads: Mapping[Key, memoryview]) -> Past:
        """The same, with these bytes."""

        def fill(said: Words) -> dict[int, tuple[Word, ...]]:
            return {
                shard: tuple(self._fill(word, shard, payloads) for word in words)
                for shard, words in said.items()
            }

        judged = None if self.judged is None else fill(self.judged)
        return replace(self, shards=fill(self.shards), judged=judged)

    def _fill(self, word: Word, shard: int, payloads: Mapping[Key, memoryview]) -> Word:
        payload = payloads.get((word.rank, self.number - word.staleness, shard))
        return word if payload is None or word.payload is not None else word.with_payload(payload)


class Collection:
    """The rounds that are owed; see the module's docstring.

    Args:
        owed: in order; one at least.
        base: the version that they are made from.

    Attributes:
        base: that.
        last: the last of them.
        busy: whether the reducer has one.
        frames: of each shard, what the rounds so far answered last.
        taken_bytes: of payloads that have come.
        beats: of each rank, its heartbeats since it was asked, or said something, last.
        parked: of each rank that asked for weights meanwhile, the version that it has.
    """

    def __init__(self, owed: Sequence[Past], base: int) -> None:
        self.base = base
        self.last: Final = owed[-1].number
        self.busy = False
        self.frames: dict[int, tuple[Buffer, ...]] = {}
        self.taken_bytes = 0
        self.beats: dict[int, int] = {}
        self.parked: dict[int, int] = {}
        self._rounds = deque(owed)
        self._opened = 0
        self._open_bytes: deque[int] = deque()
        self._missing: dict[Key, Word] = {}
        self._left: deque[int] = deque()
        """Of each round in the window, how many payloads are missing."""
        self._round_of: dict[Key, int] = {}
        self._taken: dict[Key, memoryview] = {}
        self._fresh: list[Key] = []
        self._open_window()

    @property
    def first(self) -> int:
        """The oldest round that is not made again yet."""
        return self._rounds[0].number if self._rounds else self.last + 1

    @property
    def over(self) -> bool:
        """Whether all rounds are made again."""
        return not self._rounds and not self.busy

    @property
    def ranks(self) -> tuple[int, ...]:
        """Who owes something that was asked for, ascending."""
        return tuple(sorted({rank for rank, _, _ in self._missing}))

    def owes(self, rank: int) -> dict[int, list[int]]:
        """What a rank was asked for and has not said: shards by contribution, both ascending."""
        owed: dict[int, list[int]] = {}
        for _, seq, shard in sorted(key for key in self._missing if key[0] == rank):
            owed.setdefault(seq, []).append(shard)
        return owed

    def rounds_of(self, rank: int) -> tuple[int, int] | None:
        """The first and the last round that need something of a rank; None: none does."""
        need = [r.number for r in self._rounds if any(key[0] == rank for key in r.missing())]
        return (need[0], need[-1]) if need else None

    def word_of(self, key: Key) -> Word | None:
        """What is known of a payload that was asked for and has not come."""
        return self._missing.get(key)

    def take(self, key: Key, payload: memoryview) -> None:
        """Put one in its place; its length and digest are those of its word."""
        word = self._missing.pop(key)
        assert word.is_of(payload), key
        self._taken[key] = payload
        self.taken_bytes += payload.nbytes
        self._left[self._round_of.pop(key) - self._rounds[0].number] -= 1

    def next(self) -> Past | None:
        """The oldest round, if it is whole and the reducer has none; it has this one then.

        What is in the window from then on is in `news`.
        """
        if self.busy or not self._rounds or self._left[0]:
            return None
        self.busy = True
        self._left.popleft()
        self._open_bytes.popleft()
        self._opened -= 1
        past = self._rounds.popleft()
        filled = past.filled(self._taken)
        for key, _ in past.words():
            self._taken.pop(key, None)
        self._open_window()
        return filled

    def news(self) -> dict[int, dict[int, list[int]]]:
        """What has come into the window since this was asked last: as `owes`, by rank."""
        fresh, self._fresh = self._fresh, []
        owed: dict[int, dict[int, list[int]]] = {}
        for rank, seq, shard in sorted(key for key in fresh if key in self._missing):
            owed.setdefault(rank, {}).setdefault(seq, []).append(shard)
        return owed

    def _open_window(self) -> None:
        """Let the window reach as far as it may."""
        while self._opened < min(len(self._rounds), WINDOW_ROUNDS):
            past = self._rounds[self._opened]
            missing = past.missing()
            nbytes = sum(word.nbytes for word in missing.values())
            if self._opened and sum(self._open_bytes) + nbytes > WINDOW_BYTES:
                break
            self._opened += 1
            self._open_bytes.append(nbytes)
            self._left.append(len(missing))
            self._missing |= missing
            self._round_of |= dict.fromkeys(missing, past.number)
            self._fresh.extend(missing)

"""A round of a journal, made again: what its records say, and the bytes that come of it.

    at level    a round's records
    journal     [JUDGE, with payloads] SHARD, with payloads where nobody judged them, ... ROUND
    replay      [JUDGE] SAID, of all shards ROUND: each payload by its length and digest

Reduction is deterministic, so the answers are what they were, to the byte; a round says what their
checksums were, and one that gives others is refused, rather than gone on from.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, Protocol

from psq.errors import StateError
from psq_proto.frames import HEADER_BYTES, Buffer
from psq_server.state import Judge, Judged, Reduce
from psq_server.state.past import Past, Word, Words

__all__ = ["Reducing", "Told", "retake"]

_BODY_CRC: Final = struct.Struct("<92xI4x")


class Reducing(Protocol):
    """Who takes rounds again; `psq_server.weights.Weights` is one."""

    def judge(self, action: Judge) -> Judged:
        """What the recipe's rules make of a whole round."""

    def reduce(self, action: Reduce) -> Buffer:
        """The sealed WEIGHTS of one shard after this round."""


class Told:
    """What the records of one round have said so far."""

    def __init__(self) -> None:
        self._shards: dict[int, tuple[float, Any, tuple[memoryview, ...]]] = {}
        self._judged: tuple[float, Mapping[int, Any], tuple[memoryview, ...]] | None = None

    def shard(self, meta: Mapping[str, Any], buffers: tuple[memoryview, ...]) -> None:
        """A SHARD record; its place is where it came last."""
        self._shards.pop(meta["shard"], None)
        self._shards[meta["shard"]] = (meta["rate"], meta["said"], buffers)

    def said(self, meta: Mapping[str, Any]) -> None:
        """A SAID record."""
        self._shards = {shard: (rate, listed, ()) for shard, rate, listed in meta["said"]}

    def judged(self, meta: Mapping[str, Any], buffers: tuple[memoryview, ...]) -> None:
        """A JUDGE record."""
        self._judged = (meta["rate"], meta["said"], buffers)

    def past(self, number: int, crcs: Mapping[int, int]) -> Past:
        """The round, now that it is known to be over."""
        judged: Words | None = None
        judged_rate = 0.0
        if self._judged is not None:
            judged_rate, said, buffers = self._judged
            payloads = iter(buffers)
            judged = {shard: _words(listed, payloads) for shard, listed in said.items()}
        shards: dict[int, tuple[Word, ...]] = {}
        for shard, (_, listed, buffers) in self._shards.items():
            if judged is None:
                shards[shard] = _words(listed, iter(buffers))
            else:
                shards[shard] = tuple(_counting(each, judged[shard]) for each in listed)
        rates = {shard: rate for shard, (rate, _, _) in self._shards.items()}
        return Past(number, rates, shards, judged, crcs, judged_rate)


def _words(listed: list[list[Any]], payloads: Iterator[memoryview]) -> tuple[Word, ...]:
    return tuple(_word(each, payloads) for each in listed)


def _word(listed: list[Any], payloads: Iterator[memoryview]) -> Word:
    rank, codec, weight, staleness, *known = listed
    if known:
        nbytes, digest = known
        return Word(rank, codec, weight, staleness, None, nbytes, digest)
    return Word(rank, codec, weight, staleness, next(payloads))


def _counting(listed: list[Any], judged: tuple[Word, ...]) -> Word:
    """One that was judged, and how it counts since."""
    rank, codec, weight, staleness, *_ = listed
    word = next(each for each in judged if each.rank == rank)
    return replace(word, codec=codec, weight=weight, staleness=staleness)


def retake(past: Past, weights: Reducing) -> dict[int, Buffer]:
    """Make a round again; returns the sealed WEIGHTS of each shard that it moves.

    Args:
        past: with all payloads.
        weights: of the version before it.

    Raises:
        StateError: it gives other bytes than it gave.
    """
    if past.judged is not None:
        said = {k: tuple(word.pushed for word in words) for k, words in past.judged.items()}
        weights.judge(Judge(past.number, said, past.judged_rate))
    frames: dict[int, Buffer] = {}
    for shard, words in past.shards.items():
        pushed = tuple(word.pushed for word in words)
        frames[shard] = weights.reduce(Reduce(past.number, shard, pushed, past.rates[shard]))
    answers = {k: _BODY_CRC.unpack_from(f)[0] for k, f in frames.items() if len(f) >= HEADER_BYTES}
    if answers != past.crcs:
        differ = sorted(s for s, crc in past.crcs.items() if answers.get(s) != crc)
        msg = (
            f"round {past.number} gives other bytes than it gave, of shards "
            f"{differ or sorted(answers)!r:.200}: go on with the same version of psq, the same "
            "kernels (PSQ_KERNEL) and the same rules"
        )
        raise StateError(msg)
    return frames

"""The state of one version, to be written while rounds go on.

    the loop       protect(shard)   before the shard moves: copy it, if nobody has yet
    the writer     shadow[name]     the copy; made here if the shard has not moved yet, given away

So a shard is copied once, by whoever comes first, and memory holds copies of those shards that have
moved and are not written: all of them at worst, none where the disk keeps up. A lock for each shard
keeps the two apart; the loop waits for one shard's copying at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from threading import Lock
from typing import Any, TypeAlias

from numpy.typing import NDArray

__all__ = ["Arrays", "Piece", "Shadow"]

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
Piece: TypeAlias = Callable[[int], Arrays]
"""A shard -> the arrays that move with it, by name; views."""


class Shadow(Mapping[str, NDArray[Any]]):
    """The arrays of the moment it is made, by name; each can be taken once.

    Args:
        shards: their indexes.
        piece: gives a shard's arrays; the names of several shards differ.
        rest: arrays that nobody writes to.
    """

    def __init__(self, shards: Iterable[int], piece: Piece, rest: Arrays) -> None:
        self._piece = piece
        self._rest = dict(rest)
        self._locks = {shard: Lock() for shard in shards}
        self._names = {name: shard for shard in self._locks for name in piece(shard)}
        self._copies: dict[int, dict[str, NDArray[Any]]] = {}

    def protect(self, shard: int) -> None:
        """This shard is about to move."""
        if shard in self._copies:
            return
        with self._locks[shard]:
            if shard not in self._copies:
                self._copies[shard] = {n: array.copy() for n, array in self._piece(shard).items()}

    def protect_all(self) -> None:
        """Everything is about to move."""
        for shard in self._locks:
            self.protect(shard)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """An array, given away: nothing here holds it any more."""
        if name in self._rest:
            return self._rest.pop(name)
        shard = self._names[name]
        self.protect(shard)
        return self._copies[shard].pop(name)

    def __iter__(self) -> Iterator[str]:
        """The names, shard by shard, in the order in which rounds take them."""
        yield from self._names
        yield from tuple(self._rest)

    def __len__(self) -> int:
        return len(self._names) + len(self._rest)

"""A worker's state in shared memory, two slots a shard: its process may be killed at any moment.

    head        what the file is for: compared whole when it is opened
    words       u64 each: the worker's, the silent round's, each shard's, each replica shard's
    shard k     slot 0 [ record | payload | vectors ]    slot 1 [ the same ]
    replica k   [ planes ], once or twice

The word of a shard names the slot that counts. What is saved goes to the other one, and is complete
before the word is stored: eight aligned bytes, so a reader finds the old state or the new one, and
nothing between. The pages belong to the file and not to the process: SIGKILL leaves them as they
are. (A machine that loses power does not: who opens the file says how it tells.)

A shard of the replica is kept once: its word is 0 while it is written, so a torn one is known as
such and can be had from the server. Where no server has it (`twice`) there are two of each.

Vectors as long as the model are kept by the shard's part of them, all others whole.
Memory: `Slots.nbytes`. No clock, no socket, no torch, no log.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from psq.durable.failpoints import reach
from psq.errors import ConfigError, StateError
from psq.kernels import Floats
from psq.layout import Layout, Shard

__all__ = ["Record", "Slots", "Spec", "Stage"]

MAGIC: Final = b"PSQSLOT1"
HEAD_BYTES: Final = 4096
ALIGN: Final = 64
_RECORD: Final = struct.Struct("<QqdqqqqqqBBBxI")
_WORDS: Final = 4  # the worker's, the silent round's: number, rate, weight
_WORKER, _SILENT, _SILENT_RATE, _SILENT_WEIGHT = range(_WORDS)


class Stage:
    """What a record is of: 0 before any round, else how far its shard came in that round."""

    INITIAL: Final = 0
    SAID: Final = 1
    SKIPPED: Final = 2
    WAITS: Final = 3
    SETTLED: Final = 4


@dataclass(frozen=True, slots=True)
class Record:
    """What a shard's state is of.

    Attributes:
        number: the round that it was in last; -1: none.
        rate, weight: what was asked for in that round.
        payload_bytes: of what it said there.
        codec: the number of the codec of that.
        steps, moments, rule: counters, see `psq.feedback.ShardCounts`, as the rest.
        stage: one of `Stage`.
        order: records are numbered as they are saved; set by `Slots.save`.
    """

    number: int = -1
    rate: float = 0.0
    weight: int = 1
    payload_bytes: int = 0
    codec: int = 0
    steps: int = 0
    moments: int = 0
    rule: int = 0
    stage: int = Stage.INITIAL
    has_residual: bool = False
    told: bool = False
    order: int = 0

    def pack(self, order: int) -> bytes:
        """As bytes, with a checksum."""
        values = astuple(self)[:-1]
        body = _RECORD.pack(order, *values, 0)[:-4]
        return body + zlib.crc32(body).to_bytes(4, "little")

    @classmethod
    def unpack(cls, data: bytes, order: int | None = None) -> Record:
        """Inverse of `pack`; order: what it has to be, where that is known.

        Raises:
            StateError: it is damaged, or another than the word of its shard says.
        """
        found, *values, crc = _RECORD.unpack(data)
        if crc != zlib.crc32(data[:-4]) or order not in (None, found):
            msg = f"a shard's record is torn: expected number {order} with its checksum"
            raise StateError(msg)
        numbers, flags = values[:-2], [bool(flag) for flag in values[-2:]]
        named = zip(cls.__slots__, (*numbers, *flags, found), strict=True)
        return cls(**dict(named))


@dataclass(frozen=True, slots=True)
class Spec:
    """What a file of slots holds.

    Attributes:
        job: the plan's digest and whatever else has to be the same, in words.
        layout: the cut.
        arrays: the state vectors, by name.
        payload_bytes: of each shard, the most.
        planes: how many vectors the replica is.
        twice: the replica is kept twice.
    """

    job: str
    layout: Layout
    arrays: Mapping[str, NDArray[Any]]
    payload_bytes: Sequence[int]
    planes: int = 1
    twice: bool = False

    @property
    def head(self) -> bytes:
        """What the file begins with."""
        arrays = ",".join(f"{k}:{v.dtype.str}{v.size}" for k, v in sorted(self.arrays.items()))
        shards = zlib.crc32(repr([(s.offset, s.numel) for s in self.layout.shards]).encode())
        text = f"{self.job} arrays={arrays} shards={shards:08x} planes={self.planes}x{self.twice}"
        body = MAGIC + text.encode()
        if len(body) + 4 > HEAD_BYTES:
            body = MAGIC + f"{zlib.crc32(body):08x}{text:.512}".encode()
        return body + zlib.crc32(body).to_bytes(4, "little")

    def parts(self, shard: Shard) -> list[NDArray[Any]]:
        """A shard's part of each vector, not copied."""
        numel, cut = self.layout.numel, slice(shard.offset, shard.offset + shard.numel)
        return [
            each[cut] if each.size == numel and not name.startswith("choice.") else each
            for name, each in sorted(self.arrays.items())
        ]


class Slots:
    """See the module's docstring.

    Args:
        path: the file; made where there is none, or none that can be read.
        spec: what it holds; its arrays are what `save` copies and `restore` writes.

    Attributes:
        nbytes: of the file.
        replaced: there was something that is no such file, which is gone now.

    Raises:
        ConfigError: there is one of another spec.
        StateError: there is no room for it, or it cannot be opened.
    """

    def __init__(self, path: Path, spec: Spec) -> None:
        self.path = path
        self.spec = spec
        self._shards = spec.layout.shards
        self._parts = [spec.parts(shard) for shard in self._shards]
        self._places, self._weight_places, self.nbytes = _places(spec, self._parts)
        self.replaced = False
        try:
            self._map = self._open()
        except OSError as error:
            msg = (
                f"{path}: {self.nbytes} bytes for this worker's state cannot be had "
                f"({error.strerror}): free some, or start without --state-dir"
            )
            raise StateError(msg) from error
        self._bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        count = _WORDS + len(self._shards) * (2 + spec.twice)
        self._words: NDArray[np.uint64] = self._bytes[HEAD_BYTES:][: 8 * count].view(np.uint64)
        self._order = max((int(word) >> 1 for word in self._shard_words), default=0)

    @property
    def _shard_words(self) -> NDArray[np.uint64]:
        return self._words[_WORDS : _WORDS + len(self._shards)]

    # ---- the worker

    @property
    def worker(self) -> tuple[int, int]:
        """(count, which) of what the worker said of itself last; count 0: nothing."""
        word = int(self._words[_WORKER])
        return word >> 1, word & 1

    def flip(self, count: int, which: int) -> None:
        """Say it: from now on that counts."""
        self._words[_WORKER] = count << 1 | which

    def note_silent(self, number: int, rate: float, weight: int) -> None:
        """Nothing will be said in this round."""
        self._words[_SILENT_RATE : _SILENT_RATE + 1].view(np.float64)[0] = rate
        self._words[_SILENT_WEIGHT] = weight
        self._words[_SILENT] = number + 1

    @property
    def silent(self) -> tuple[int, float, int]:
        """The last such round, or -1; its rate and weight."""
        rate = float(self._words[_SILENT_RATE : _SILENT_RATE + 1].view(np.float64)[0])
        return int(self._words[_SILENT]) - 1, rate, int(self._words[_SILENT_WEIGHT])

    # ---- a shard

    def save(self, shard: int, record: Record, payload: NDArray[np.uint8] | None = None) -> None:
        """Keep a shard's part of the vectors as they are now, with what was said.

        Cost: one copy of them.
        """
        words = self._shard_words
        which = 1 - (int(words[shard]) & 1)
        record_at, payload_at, places = self._places[shard][which]
        for at, part in zip(places, self._parts[shard], strict=True):
            self._bytes[at : at + part.nbytes] = part.view(np.uint8)
        if payload is not None:
            self._bytes[payload_at : payload_at + payload.size] = payload
        order = self._order + 1
        packed = record.pack(order)
        self._map[record_at : record_at + len(packed)] = packed
        reach("keeper.copy")
        self._order = order
        words[shard] = order << 1 | which
        reach("keeper.flip")

    def record(self, shard: int) -> Record | None:
        """What the state of a shard is of; None: nothing was saved.

        Raises:
            StateError: it is torn.
        """
        word = int(self._shard_words[shard])
        if not word:
            return None
        at = self._places[shard][word & 1][0]
        return Record.unpack(self._map[at : at + _RECORD.size], word >> 1)

    def record_before(self, shard: int) -> Record | None:
        """What the state of a shard was of before; None: that is not known any more."""
        at = self._places[shard][1 - (int(self._shard_words[shard]) & 1)][0]
        try:
            return Record.unpack(self._map[at : at + _RECORD.size])
        except StateError:
            return None

    def payload(self, shard: int, record: Record) -> NDArray[np.uint8]:
        """A copy of what was said of a shard."""
        at = self._places[shard][int(self._shard_words[shard]) & 1][1]
        return self._bytes[at : at + record.payload_bytes].copy()

    def restore(self, shards: Mapping[int, Record]) -> None:
        """Write what was saved under these records, the present or the ones before, to the vectors.

        Whole ones are taken from the shard saved last.
        """
        for shard, record in sorted(shards.items(), key=lambda pair: pair[1].order):
            word = int(self._shard_words[shard])
            which = word & 1 if record.order == word >> 1 else 1 - (word & 1)
            for at, part in zip(self._places[shard][which][2], self._parts[shard], strict=True):
                part.view(np.uint8)[:] = self._bytes[at : at + part.nbytes]

    # ---- the replica

    def save_weights(
        self, shard: int, version: int, vectors: Sequence[Sequence[Floats]], which: int = 0
    ) -> None:
        """Keep a shard of the replica: its planes, each f32 in pieces. Cost: one copy."""
        word = self._weight_word(shard, which)
        if int(self._words[word]) == version + 1 and not self.spec.twice:
            return
        self._words[word] = 0
        at = self._weight_places[shard][which]
        for pieces in vectors:
            for piece in pieces:
                self._bytes[at : at + piece.nbytes].view(np.float32)[:] = piece
                at += piece.nbytes
                reach("keeper.weights")
        self._words[word] = version + 1

    def weights(self, shard: int, which: int = 0) -> tuple[int, Floats]:
        """The version of a shard of the replica, -1 if it is torn; f32[planes x numel]."""
        version = int(self._words[self._weight_word(shard, which)]) - 1
        at, numel = self._weight_places[shard][which], self._shards[shard].numel
        return version, self._bytes[at : at + 4 * numel * self.spec.planes].view(np.float32)

    def _weight_word(self, shard: int, which: int) -> int:
        return _WORDS + len(self._shards) * (1 + which) + shard

    # ---- the file

    def close(self) -> None:
        """Let go of the memory, as soon as nobody looks at it any more; the file stays."""
        del self._words, self._bytes, self._map

    def _open(self) -> mmap.mmap:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        fd = os.open(self.path, flags, 0o600)
        try:
            head = self.spec.head
            size = os.fstat(fd).st_size
            there = os.pread(fd, HEAD_BYTES, 0)
            if size != self.nbytes or not there.startswith(head):
                self._check_not_anothers(there)
                self.replaced = size > 0
                os.ftruncate(fd, 0)
                os.ftruncate(fd, self.nbytes)
                os.posix_fallocate(fd, 0, self.nbytes)  # else a full disk is a SIGBUS later
                os.pwrite(fd, head, 0)
            return mmap.mmap(fd, self.nbytes)
        finally:
            os.close(fd)

    def _check_not_anothers(self, there: bytes) -> None:
        """Refuse to write over what another job, or this one with other settings, has kept."""
        mine, kept = self.spec.head, _whole_head(there)
        if kept in {b"", mine}:
            return  # nothing that anybody could go on from
        words = [head[len(MAGIC) : -4].decode("utf-8", "replace").split() for head in (kept, mine)]
        pairs = [f"{a} is kept, {b} asked" for a, b in zip(*words, strict=False) if a != b]
        msg = (
            f"{self.path} has what a worker of another job kept, or of this one with other "
            f"settings ({'; '.join(pairs):.300}): start it with the settings that it had, name "
            "another --state-dir, or remove that folder if the job is not to go on"
        )
        raise ConfigError(msg)


def _whole_head(data: bytes) -> bytes:
    """What a file of slots begins with, if it is one and not damaged; else nothing."""
    least = len(data.rstrip(b"\0"))
    for end in range(least, least + 5):  # its checksum may end with zeros
        if data.startswith(MAGIC) and data[end - 4 : end] == zlib.crc32(data[: end - 4]).to_bytes(
            4, "little"
        ):
            return data[:end]
    return b""


def _places(
    spec: Spec, parts: Sequence[Sequence[NDArray[Any]]]
) -> tuple[list[list[tuple[int, int, list[int]]]], list[list[int]], int]:
    """Where everything lies: each shard's two slots, its one or two replicas; and the end."""
    shards = spec.layout.shards
    end = _aligned(HEAD_BYTES + 8 * (_WORDS + len(shards) * (2 + spec.twice)))
    places: list[list[tuple[int, int, list[int]]]] = []
    weight_places: list[list[int]] = []
    for shard in shards:
        slots: list[tuple[int, int, list[int]]] = []
        for _ in range(2):
            record_at, payload_at = end, _aligned(end + _RECORD.size)
            end = _aligned(payload_at + spec.payload_bytes[shard.index])
            vectors: list[int] = []
            for part in parts[shard.index]:
                vectors.append(end)
                end = _aligned(end + part.nbytes)
            slots.append((record_at, payload_at, vectors))
        places.append(slots)
        replicas: list[int] = []
        for _ in range(1 + spec.twice):
            replicas.append(end)
            end = _aligned(end + 4 * shard.numel * spec.planes)
        weight_places.append(replicas)
    return places, weight_places, end


def _aligned(at: int) -> int:
    return -(-at // ALIGN) * ALIGN

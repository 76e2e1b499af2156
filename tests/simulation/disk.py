"""A server's disk, and the store on it: what was synced outlives everything, what was not may not.

The journal is one string of bytes, packed and parsed by `psq.durable.records`, as the real one is.
A power cut keeps what was synced and any beginning of the rest, a torn record at its end. The disk
may be slow, and may refuse for a while (EIO, ENOSPC): what waits for it is tried again. A
checkpoint is there whole or not at all; one that is rotten is found to be when it is read, and the
one before is taken. (That the real files keep these promises is shown with real files elsewhere.)

`Store` has the interface of `psq_server.store.Store`, in virtual time.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import msgpack

from psq.durable import records
from psq_server.gate import Append, RecordKind, start
from psq_server.store import Answered, Kept, News, Refused

from .clock import Schedule

__all__ = ["Disk", "Entry", "Killed", "Store"]

SALT: Final = b"sim salt"
RETRY_S: Final = 0.3
SYNC_S: Final = (0.0002, 0.02)
SLOW_S: Final = 0.5
KEEP_S: Final = (0.005, 0.2)
KEPT: Final = 2
FIRST: Final = bytes(16)


class Killed(Exception):  # noqa: N818 - what happens to a process, not an error of it
    """The process dies in the middle of what it does."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A record that was read; where the log ends after it, and the chain there."""

    number: int
    kind: int
    meta: dict[Any, Any]
    buffers: tuple[memoryview, ...]
    end: int
    chain: bytes


@dataclass(frozen=True, slots=True)
class Image:
    """A checkpoint: what is in it, and where the journal goes on from it."""

    version: int
    arrays: Mapping[int, bytes]
    meta: bytes
    journal_from: int


class Disk:
    """See the module's docstring.

    Attributes:
        log: the journal, of which `synced` bytes are safe; `base` bytes before it are pruned.
        images: the checkpoints, oldest first.
        broken_until_s: nothing is written before.
        on_durable: told of each version that is safe from now on.
    """

    def __init__(self, schedule: Schedule, rng: random.Random) -> None:
        self.schedule = schedule
        self.rng = rng
        self.log = bytearray()
        self.base = self.synced = 0
        self.images: list[Image] = []
        self.broken_until_s = 0.0
        self.slow_until_s = 0.0
        self.on_durable: Callable[[int], None] = lambda _: None
        self.trap: Callable[[], None] = lambda: None
        self._rounds: deque[tuple[int, int]] = deque()  # (end in the log, version)

    @property
    def end(self) -> int:
        """How many bytes were ever appended."""
        return self.base + len(self.log)

    def cut_power(self) -> None:
        """What was not synced is gone, but for a beginning of it."""
        kept = self.rng.randint(self.synced, self.end)
        if self.rng.random() < 0.5:
            kept = self.rng.choice((self.synced, self.end))
        del self.log[kept - self.base :]
        self._rounds.clear()

    def rot(self) -> bool:
        """Whether the newest checkpoint cannot be read any more; there is one before it then."""
        if len(self.images) < KEPT:
            return False
        self.images.pop()
        return True

    def append(self, number: int, previous: bytes, record: Append) -> bytes:
        """Write a record; returns the chain after it."""
        body = records.pack_body(record.meta, record.buffers)
        header = records.pack_header(
            records.Header(
                record.kind, body.front_bytes, body.data_bytes, number, 0, body.crc, previous
            ),
            SALT,
        )
        self.log += header
        for piece in body.pieces:
            self.log += piece
        if record.kind == RecordKind.ROUND:
            self._rounds.append((self.end, record.meta["version"]))
        return records.chain_of(header, body.pieces)

    def sync(self, end: int) -> None:
        """Everything up to here is safe."""
        self.synced = max(self.synced, end)
        while self._rounds and self._rounds[0][0] <= self.synced:
            self.on_durable(self._rounds.popleft()[1])

    def read(self) -> Iterator[Entry]:
        """The records that are whole, in order."""
        at, previous = 0, None
        while True:
            header = parse_header(bytes(self.log[at : at + records.HEADER_BYTES]))
            if header is None or (previous is not None and header.previous != previous):
                return
            packed = bytes(self.log[at : at + records.HEADER_BYTES])
            at += records.HEADER_BYTES
            body = bytes(self.log[at : at + header.body_bytes])
            at += header.body_bytes
            if not is_whole(header, body):
                return
            previous = records.chain_of(packed, (memoryview(body),))
            yield _entry(header, body, self.base + at, previous)

    def truncate(self, end: int) -> None:
        """Nothing after this counts."""
        del self.log[max(0, end - self.base) :]
        self.synced = min(self.synced, self.end)
        self.images = [replace(i, journal_from=min(i.journal_from, self.end)) for i in self.images]

    def prune(self) -> None:
        """Forget old checkpoints, and what came before the oldest that is left."""
        del self.images[:-KEPT]
        first = pruned_to(self.images)
        if first > self.base:
            del self.log[: first - self.base]
            self.base = first


def parse_header(data: bytes) -> records.Header | None:
    """What a record's header says, if it is whole."""
    return records.parse_header(data, SALT)


def is_whole(header: records.Header, body: bytes) -> bool:
    """Whether this is the body that the header announced."""
    return len(body) == header.body_bytes and records.crc32c(body) == header.body_crc


def pruned_to(images: list[Image]) -> int:
    """Where the journal begins that the oldest checkpoint needs."""
    return images[0].journal_from if images else 0


def _entry(header: records.Header, body: bytes, end: int, chain: bytes) -> Entry:
    front = memoryview(body)[: header.front_bytes]
    parsed = records.parse_front(front, header.data_bytes)
    assert parsed is not None
    meta, lengths = parsed
    at, buffers = header.front_bytes, []
    for length in lengths:
        buffers.append(memoryview(body)[at : at + length])
        at += length
    return Entry(header.number, header.kind, meta, tuple(buffers), end, chain)


class Store:
    """What one process has of a disk.

    Args:
        disk: what is there.
        epoch: of this process.
        on_news: there is something to hear.
    """

    def __init__(self, disk: Disk, epoch: int, on_news: Callable[[], None]) -> None:
        self.disk = disk
        self.alive = True
        self.version = disk.images[-1].version if disk.images else -1
        self._epoch = epoch
        self._on_news = on_news
        self._news: deque[News] = deque()
        self._number = 0
        self._previous = FIRST
        self._refused = False
        self._busy_until_s = 0.0

    def open_journal(self, version: int, last: Entry | None = None) -> None:
        """Append behind the last record that counts; what is there beyond it is void."""
        self.disk.truncate(self.disk.base if last is None else last.end)
        if last is not None:
            self._number, self._previous = last.number, last.chain
        self.append(start(self._epoch, version))

    def append(self, record: Append) -> None:
        """Put a record into the journal."""
        self.disk.trap()
        self._number += 1
        self._previous = self.disk.append(self._number, self._previous, record)
        self.disk.trap()

    def sync(self, ticket: int) -> None:
        """Make all of it durable."""
        self.disk.trap()
        self._when_written(self.disk.end, ticket, SYNC_S)

    def keep(
        self, version: int, arrays: Mapping[int, bytes], meta: Mapping[str, Any], ticket: int | None
    ) -> None:
        """Write a checkpoint of the state as it is."""
        self.disk.trap()
        image = Image(version, dict(arrays), msgpack.packb(meta), self.disk.end)
        self._write(image, ticket)

    def news(self) -> Iterator[News]:
        """What has come since this was asked last."""
        while self._news:
            yield self._news.popleft()

    def released(self) -> None:
        """What waited for a ticket has left."""
        self.disk.trap()

    def _tell(self, *news: News) -> None:
        self._news.extend(news)
        self.disk.schedule.after(0.0, self._on_news)

    def _pause_s(self, between: tuple[float, float]) -> float:
        rng, is_slow = self.disk.rng, self.disk.schedule.now_s < self.disk.slow_until_s
        return rng.uniform(0.0, SLOW_S) if is_slow else rng.uniform(*between)

    def _when_written(self, end: int, ticket: int, between: tuple[float, float]) -> None:
        schedule = self.disk.schedule
        at_s = max(schedule.now_s + self._pause_s(between), self._busy_until_s)
        self._busy_until_s = at_s
        schedule.at(at_s, lambda: self._written(end, ticket))

    def _written(self, end: int, ticket: int) -> None:
        if not self.alive:
            return
        if self._is_refused():
            self.disk.schedule.after(RETRY_S, lambda: self._written(end, ticket))
            return
        self.disk.sync(end)
        self._tell(Answered(ticket))

    def _is_refused(self) -> bool:
        broken = self.disk.schedule.now_s < self.disk.broken_until_s
        if broken != self._refused:
            self._refused = broken
            self._tell(Refused("no space left on device" if broken else ""))
        return broken

    def _write(self, image: Image, ticket: int | None) -> None:
        self.disk.schedule.after(self._pause_s(KEEP_S), lambda: self._kept(image, ticket))

    def _kept(self, image: Image, ticket: int | None) -> None:
        if not self.alive:
            return
        if self._is_refused():
            if ticket is None:
                self._tell(Kept(image.version, "no space left on device"))
            else:
                self.disk.schedule.after(RETRY_S, lambda: self._kept(image, ticket))
            return
        disk = self.disk
        disk.images.append(image)
        self.version = image.version
        disk.on_durable(image.version)
        disk.prune()
        if ticket is not None:
            self._tell(Answered(ticket))
        self._tell(Kept(image.version))

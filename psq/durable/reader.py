"""Reading a journal back: every record that was promised, or an error; what is torn is told apart.

Segments are read in the order of their numbers. Each one's header says from which record on it
takes over, so what an earlier segment has from there on does not count: that is how records of a
failed fsync, or of a round that nobody closed, are taken back. Before that point every record must
be there, with its checksum, and the chain must hold, because a segment is made only when all before
it is on the disk.

    bad record, and a later header says it was synced     damage: StateError
    bad record, and nothing says so                       a torn tail: the journal ends before it

The promise of the very last sync is in the mark after it. If a power cut takes that mark and the
disk also spoils the record before it, this looks like a torn tail; the workers, who were told of
the round, then find the server behind and stop.

Read-only; never maps a file, since an error of the disk would then be a signal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn, Self

import numpy as np
from crc32c import crc32c

from psq.durable.digests import DIGEST_BYTES
from psq.durable.files import explained
from psq.durable.records import (
    HEADER_BYTES,
    MAGIC,
    MARK,
    PAGE_BYTES,
    Header,
    SegmentHeader,
    chain_of,
    parse_front,
    parse_header,
    parse_segment_header,
)
from psq.durable.segment import Position, segment_paths
from psq.errors import StateError, UsageError

__all__ = [
    "JournalReader",
    "Record",
    "SegmentInfo",
    "TornTail",
    "list_segments",
    "read_journal",
    "start_index",
]

SEARCH_BYTES: Final = 4 << 20
"""How much of a file is looked through at a time for later headers."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a journal.

    Attributes:
        number: its place, from 1 on.
        kind: what `append` was told.
        meta: the same, as msgpack gives it back.
        buffers: the same bytes, each in memory of the record's own.
        chain: of all records up to this one.
    """

    number: int
    kind: int
    meta: dict[Any, Any]
    buffers: tuple[memoryview, ...]
    chain: bytes


@dataclass(frozen=True, slots=True)
class TornTail:
    """Where the journal ends in the middle of something that nobody was promised."""

    path: Path
    offset: int
    lost_bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """A segment's file and what its header says; None if the header is damaged."""

    index: int
    path: Path
    header: SegmentHeader | None


def list_segments(folder: Path) -> list[SegmentInfo]:
    """The segments of a journal, in order.

    Raises:
        StateError: a file cannot be read.
    """
    found = []
    with explained("read", folder):
        for index, path in segment_paths(folder):
            with path.open("rb") as file:
                found.append(SegmentInfo(index, path, parse_segment_header(file.read(PAGE_BYTES))))
    return found


def start_index(segments: list[SegmentInfo], after_version: int) -> int | None:
    """Which of them is the first to go on from a version with; None if they begin too late.

    Of several segments with the highest label that is not above the version it is the first one:
    the others took over from it.
    """
    labels = [info.header.after_version for info in segments if info.header]
    label = max((label for label in labels if label <= after_version), default=None)
    for place, info in enumerate(segments):
        if label is not None and info.header and info.header.after_version == label:
            return place
    return None


class JournalReader:
    """The records of a journal from a version on, as an iterator.

    Attributes, true when the iteration has ended:
        torn: what was cut off at the end, if anything.
        last: the last record, without its buffers.
        start: before the first record; known from the beginning.
        end: behind it.
        promised: the highest number that is known to have been synced.
        unproven: the records after that one.
        next_index: of a new segment.

    Args:
        folder: of the journal.
        after_version: see `read_journal`.
        run_id: whose journal it must be.

    Raises:
        StateError: see `read_journal`.
    """

    def __init__(self, folder: Path, after_version: int, run_id: bytes | None = None) -> None:
        self.torn: TornTail | None = None
        self.last: Record | None = None
        self.promised = 0
        self.unproven: list[Record] = []
        self._run_id = run_id
        self._chains = bytearray()
        everything = list_segments(folder)
        self.next_index = everything[-1].index + 1 if everything else 0
        self._segments = _wanted(folder, everything, after_version)
        first = self._segments[0].info.header if self._segments else None
        self.start = Position(0, run_id or bytes(DIGEST_BYTES))
        if first:
            self.start = Position(first.first_number - 1, first.previous)
        self.end = self.start
        self._records = self._read()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Record:
        return next(self._records)

    def position(self, number: int) -> Position:
        """Behind this record.

        Raises:
            UsageError: it was not read.
        """
        place = number - self.start.number
        if not 0 <= place <= self.end.number - self.start.number:
            read = f"{self.start.number}..{self.end.number}"
            msg = f"record {number} was not read from the journal; numbers read: {read}"
            raise UsageError(msg)
        if place == 0:
            return self.start
        return Position(number, bytes(self._chains[(place - 1) * DIGEST_BYTES :][:DIGEST_BYTES]))

    # ---- segments

    def _read(self) -> Iterator[Record]:
        for part in self._segments:
            path, header = part.info.path, part.info.header
            if header is None:
                if part.stop is None or self.end.number + 1 < part.stop:
                    _damaged(path, 0, "its header is not what was written")
                continue
            self._check_takeover(path, header)
            with explained("read", path), path.open("rb", buffering=0) as file:
                yield from self._read_segment(_Opened(path, file, header.salt), part.stop)

    def _check_takeover(self, path: Path, header: SegmentHeader) -> None:
        if self._run_id not in {None, header.run_id}:
            msg = (
                f"{path} belongs to run {header.run_id.hex()}, expected run "
                f"{(self._run_id or b'').hex()}: take it out of this journal"
            )
            raise StateError(msg)
        self._run_id = header.run_id
        if Position(header.first_number - 1, header.previous) != self.end:
            msg = (
                f"{path} goes on after record {header.first_number - 1}, and the segments before "
                f"it end with record {self.end.number}, or another one of that number: a segment "
                "is missing or of another history; take the whole journal from a copy"
            )
            raise StateError(msg)
        self._learn(self.end.number)

    def _read_segment(self, opened: _Opened, stop: int | None) -> Iterator[Record]:
        offset = PAGE_BYTES
        while stop is None or self.end.number + 1 < stop:
            offset = opened.skip_padding(offset)
            if offset == opened.size:
                why = "it ends too early"
                break
            header = opened.header(offset)
            if header is None:
                why = "there is no record's header where one must be"
                break
            self._check_chain(opened.path, offset, header)
            body = opened.body(offset + HEADER_BYTES, header)
            if body is None:
                why = "the record's bytes are not all there, or not what was written"
                break
            self._learn(header.synced)
            if header.kind != MARK:
                yield self._take(opened, offset, header, body)
            offset += HEADER_BYTES + header.body_bytes
        else:
            return
        self._end_at(opened, offset, why, stop)

    def _check_chain(self, path: Path, offset: int, header: Header) -> None:
        """A whole header that is wrong here was put here, or what is before it was changed."""
        expected = self.end.number + (header.kind != MARK)
        sound = header.kind != MARK or not header.body_bytes
        if header.number != expected or header.previous != self.end.chain or not sound:
            why = f"the chain is broken: record {header.number}, expected {expected}"
            _damaged(path, offset, why)
        if header.synced > self.end.number:
            _damaged(path, offset, f"it says record {header.synced} is synced, which is none")

    def _learn(self, synced: int) -> None:
        if synced > self.promised:
            self.promised = synced
            self.unproven = [record for record in self.unproven if record.number > synced]

    def _take(self, opened: _Opened, offset: int, header: Header, body: memoryview) -> Record:
        parsed = parse_front(body[: header.front_bytes], header.data_bytes)
        if parsed is None:
            _damaged(opened.path, offset, "its checksums hold, and it is no record of a journal")
        meta, lengths = parsed
        buffers, at = [], header.front_bytes
        for length in lengths:
            buffers.append(body[at : at + length])
            at += length
        chain = chain_of(opened.raw_header, [body])
        record = Record(header.number, header.kind, meta, tuple(buffers), chain)
        self.end = Position(record.number, chain)
        self.last = replace(record, buffers=())
        self._chains += chain
        self.unproven.append(record)
        return record

    def _end_at(self, opened: _Opened, offset: int, why: str, stop: int | None) -> None:
        """Whether a segment may end here: only the last one, and only with nothing promised."""
        expected = self.end.number + 1
        if stop is not None and offset == opened.size:
            msg = (
                f"{opened.path} ends with record {self.end.number}, and a later segment goes on "
                f"after record {stop - 1}: what is between is missing; take the directory from a "
                "copy"
            )
            raise StateError(msg)
        if stop is not None:
            _damaged(opened.path, offset, f"{why}; record {expected} was promised")
        if offset == opened.size:
            return
        if opened.promises(expected, offset + 1):
            _damaged(opened.path, offset, f"{why}; a later record says {expected} was synced")
        self.torn = TornTail(opened.path, offset, opened.size - offset, why)


class _Opened:
    """A segment's file, read by offset."""

    def __init__(self, path: Path, file: BinaryIO, salt: bytes) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.raw_header = b""
        self._fd = file.fileno()
        self._salt = salt

    def skip_padding(self, offset: int) -> int:
        """The next page, if there are only zeros up to it; else the same place."""
        padding = os.pread(self._fd, -offset % PAGE_BYTES, offset)
        whole = offset + len(padding)
        return whole if whole % PAGE_BYTES == 0 and not any(padding) else offset

    def header(self, offset: int) -> Header | None:
        """The header at this place; None if there is none."""
        self.raw_header = os.pread(self._fd, HEADER_BYTES, offset)
        return parse_header(self.raw_header, self._salt)

    def body(self, offset: int, header: Header) -> memoryview | None:
        """What follows a header; None if its checksum is another, or it is not all there."""
        if offset + header.body_bytes > self.size:
            return None
        # Not a bytearray, which clears its memory first; NumPy also asks for large pages.
        body = left = np.empty(header.body_bytes, np.uint8).data
        while left.nbytes:
            came = os.preadv(self._fd, [left], offset)
            if not came:
                return None
            offset, left = offset + came, left[came:]
        return body if crc32c(body) == header.body_crc else None

    def promises(self, number: int, offset: int) -> bool:
        """Whether a header from here on says that this record was synced.

        Cost: the rest of the file is read, once.
        """
        while offset < self.size:
            window = os.pread(self._fd, SEARCH_BYTES + HEADER_BYTES, offset)
            at = window.find(MAGIC)
            while 0 <= at < SEARCH_BYTES:
                header = parse_header(window[at : at + HEADER_BYTES], self._salt)
                if header is not None and header.synced >= number:
                    return True
                at = window.find(MAGIC, at + 1)
            offset += SEARCH_BYTES
        return False


@dataclass(frozen=True, slots=True)
class _Part:
    """A segment, and the first record that a later one has instead; None for the last."""

    info: SegmentInfo
    stop: int | None

    @property
    def is_replaced(self) -> bool:
        """Whether later segments have all that this one has."""
        first = self.info.header.first_number if self.info.header else 0
        return self.stop is not None and first >= self.stop


def _wanted(folder: Path, segments: list[SegmentInfo], after_version: int) -> list[_Part]:
    """The segments to go on from a version with."""
    place = start_index(segments, after_version)
    if place is None and segments:
        first = next((info.header for info in segments if info.header), None)
        begins = f"begins after version {first.after_version}" if first else "has no whole header"
        msg = (
            f"the journal {folder} {begins}, and the checkpoint is of version {after_version}: "
            "what is between is lost; take the directory from a copy"
        )
        raise StateError(msg)
    parts: list[_Part] = []
    stop: int | None = None
    for info in reversed(segments[place:]):
        parts.append(_Part(info, stop))
        if info.header is not None:
            first_number = info.header.first_number
            stop = first_number if stop is None else min(stop, first_number)
    return [part for part in reversed(parts) if not part.is_replaced]


def _damaged(path: Path, offset: int, why: str) -> NoReturn:
    msg = (
        f"{path} is damaged at byte {offset}: {why}; this is no torn tail, so nothing after it can "
        "be trusted: take the directory from a copy"
    )
    raise StateError(msg)


def read_journal(folder: Path, after_version: int, *, run_id: bytes | None = None) -> JournalReader:
    """Read what was recorded from a version on, and perhaps some of what was before it.

    Args:
        folder: of the journal; without any segment there is nothing to read.
        after_version: of the checkpoint to go on from.
        run_id: whose journal it must be; None: whoever's.

    Returns:
        An iterator of records. Its memory is that of one record, and of those that nothing proves
        to have been synced.

    Raises:
        StateError: now or while it is read: the journal begins too late, is damaged, is of another
            run, or the disk refused.
    """
    return JournalReader(folder, after_version, run_id)

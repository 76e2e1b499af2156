"""One segment of a journal while it is written: append, sync, mark. Any error ends it for good.

It gets its name when its header is on the disk, so one whose header is bad was damaged. Who writes
a segment keeps what is not synced. After an OSError from here the segment may hold any part of
that; it must be let go, and the next one takes over after the last record that was promised (see
`psq.durable.reader`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from psq.durable.failpoints import reach
from psq.durable.files import sync, sync_folder, write_all
from psq.durable.records import (
    MARK,
    PAGE_BYTES,
    Body,
    Header,
    SegmentHeader,
    chain_of,
    pack_header,
    pack_segment_header,
)

__all__ = ["SUFFIX", "Entry", "Position", "Segment", "segment_paths"]

SUFFIX: Final = ".journal"


@dataclass(frozen=True, slots=True)
class Position:
    """A place between two records: the number of the one before, and the chain after it."""

    number: int
    chain: bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """A record that is to be written."""

    number: int
    kind: int
    body: Body


class Segment:
    """A new file of a journal; its header, and what it begins with, are on disk.

    Args:
        folder: of the journal.
        index: the file's number, higher than that of any other.
        header: what it begins with.
        entries: records that may be lost, unless this segment has them from the moment it exists.

    Raises:
        OSError: the disk refused; nothing is left of the file, as far as the disk lets us.
    """

    def __init__(
        self, folder: Path, index: int, header: SegmentHeader, entries: Sequence[Entry] = ()
    ) -> None:
        self.path = folder / f"{index:08d}-after-{header.after_version:020d}{SUFFIX}"
        self.end = Position(header.first_number - 1, header.previous)
        self._salt = header.salt
        self._synced = self.end.number
        temporary = self.path.with_suffix(".tmp")
        self._fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            reach("journal.segment")
            self._offset = write_all(self._fd, [pack_segment_header(header)])
            self.write(entries)
            self.sync()
            if entries:
                self.mark()
            reach("journal.segment_written")
            temporary.rename(self.path)
            sync_folder(folder)
        except OSError:
            os.close(self._fd)
            for path in (temporary, self.path):
                with contextlib.suppress(OSError):
                    path.unlink()
            raise

    def write(self, entries: Sequence[Entry]) -> None:
        """Append records; they may be lost until `sync` returns.

        Raises:
            OSError: some of it may be written, all of it is to be written elsewhere.
        """
        end, pieces = self.end, []
        for entry in entries:
            header = self._header(entry, end)
            pieces += [memoryview(header), *entry.body.pieces]
            end = Position(entry.number, chain_of(header, entry.body.pieces))
        reach("journal.append")
        self._offset += write_all(self._fd, pieces)
        self.end = end
        reach("journal.written")

    def sync(self) -> Position:
        """Return when all that was written is on disk: where that ends.

        Raises:
            OSError: nothing is known of what was written since the last success.
        """
        end = self.end
        reach("journal.fsync")
        sync(self._fd)
        reach("journal.synced")
        self._synced = end.number
        return end

    def mark(self) -> None:
        """Say in the segment what was synced, on a fresh page.

        Raises:
            OSError: no more can be written here; what was synced stays so.
        """
        number = self._synced
        mark = pack_header(Header(MARK, 0, 0, number, number, 0, self.end.chain), self._salt)
        padding = bytes(-self._offset % PAGE_BYTES)
        self._offset += write_all(self._fd, [padding, mark])
        reach("journal.marked")

    def close(self) -> None:
        """Let it go; only once."""
        with contextlib.suppress(OSError):  # whatever it says: what was synced, was
            os.close(self._fd)

    def _header(self, entry: Entry, end: Position) -> bytes:
        body = entry.body
        header = Header(
            entry.kind,
            body.front_bytes,
            body.data_bytes,
            entry.number,
            self._synced,
            body.crc,
            end.chain,
        )
        return pack_header(header, self._salt)


def segment_paths(folder: Path) -> list[tuple[int, Path]]:
    """(index, file) of the segments in a folder, in order; none if there is no folder.

    Raises:
        OSError: it cannot be read.
    """
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        index = path.name.partition("-")[0]
        if path.suffix == SUFFIX and index.isdecimal():
            found.append((int(index), path))
    return sorted(found)

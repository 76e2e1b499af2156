"""The journal's writer: records go to disk in a thread of their own, in groups.

    append   hands a record over, at once: nothing is copied, nothing is waited for
    sync     asks for all appended so far to be on disk; on_done hears of it, from the thread

One fsync serves all requests that came before it. Buffers belong to the journal until on_done has
named their record, or a later one: whoever appends does not change them meanwhile.

When the disk refuses, on_done gets the error, and after RETRY_S the journal goes on by itself: it
lets the segment go and makes a new one, which takes over after the last record that was promised
and gets everything since then again. It never repeats an fsync on a file where one has failed: the
kernel has marked the pages clean by then, and would say yes (see `psq.durable.files`).

Invariants: on_done's numbers only rise; a number is only said when all records up to it can be read
back after a power cut; what is not on disk is at most MAX_UNSYNCED_BYTES. At half of that the
thread syncs unasked; at the limit `append` refuses.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from psq.durable.directory import RUN_ID_BYTES
from psq.durable.failpoints import reach
from psq.durable.files import Buffer, disk_error, explained, sync_folder
from psq.durable.reader import JournalReader, list_segments, read_journal, start_index
from psq.durable.records import MAX_KIND, SALT_BYTES, SegmentHeader, pack_body
from psq.durable.segment import Entry, Segment
from psq.errors import StateError, UsageError

__all__ = ["MAX_UNSYNCED_BYTES", "RETRY_S", "Journal", "JournalFullError", "prune_journal"]

MAX_UNSYNCED_BYTES: Final = 512 << 20
"""Of records that are not on disk. A round of 75 M parameters at 1 bit has 9.4 MB a worker."""
MAX_BATCH: Final = 256
"""Records in one write."""
RETRY_S: Final = 1.0
CLOSE_S: Final = 5.0
LATEST: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class _Start:
    """Where in the queue a new segment begins."""

    version: int


_Work: TypeAlias = Literal["write", "sync", "start", "end"]


class JournalFullError(StateError):
    """More is waiting for the disk than may be; wait for on_done, then append again."""


class Journal:
    """A journal that is open for writing.

    Args:
        folder: of the journal; only this process writes there.
        after_version: of the state it goes on from.
        on_done: called by the journal's thread (by `sync`, if there is nothing to do) with the
            number up to which all is on disk, or with an error whenever the disk refuses; it must
            not raise, nor call the journal.
        run_id: 16 bytes, the first link of the chain.
        reader: of the same folder, read by the caller; None: the folder is read here.
        drop_after: records with a higher number than this are to be forgotten; None: none.

    Raises:
        StateError: what is there is damaged or of another run, or the disk refused.
    """

    def __init__(  # noqa: PLR0913 - what a journal goes on from has three parts
        self,
        folder: Path,
        after_version: int,
        on_done: Callable[[int | StateError], None],
        *,
        run_id: bytes,
        reader: JournalReader | None = None,
        drop_after: int | None = None,
    ) -> None:
        self._folder = folder
        self._run_id = run_id
        self._on_done = on_done
        self._label = after_version
        self._ready = threading.Condition()
        self._queue: deque[Entry | _Start] = deque()
        """Everything that is not on disk, in order."""
        self._written = 0
        """How many of these the segment has."""
        self._unsynced_bytes = 0
        self._wanted = 0
        self._closing = False
        self._given_up = False
        self._segment: Segment | None = self._open(reader, drop_after)
        self._number = self._promised.number
        self._thread = threading.Thread(target=self._run, name="psq-journal", daemon=True)
        self._thread.start()

    # ---- for the owner, who never waits

    @property
    def number(self) -> int:
        """Of the last record that was appended."""
        return self._number

    @property
    def room_bytes(self) -> int:
        """How much more may be appended now."""
        return max(0, MAX_UNSYNCED_BYTES - self._unsynced_bytes)

    def append(self, kind: int, meta: Mapping[Any, Any], buffers: Sequence[Buffer] = ()) -> int:
        """Hand a record over.

        Args:
            kind: what it is, 1..65535.
            meta: small values, as msgpack can say them.
            buffers: C-contiguous; not to be changed before on_done has named this record.

        Returns:
            Its number.

        Raises:
            JournalFullError: too much waits for the disk.
            UsageError: such a record cannot be written, or the journal is closed.

        Cost: one pass over the bytes, for the checksum.
        """
        if not 1 <= kind <= MAX_KIND:
            msg = f"a journal record's kind is 1..{MAX_KIND}, got {kind}"
            raise UsageError(msg)
        body = pack_body(meta, buffers)
        nbytes = body.front_bytes + body.data_bytes
        with self._ready:
            self._refuse_closed()
            if self._unsynced_bytes and self._unsynced_bytes + nbytes > MAX_UNSYNCED_BYTES:
                msg = (
                    f"{self._unsynced_bytes:,} bytes of the journal {self._folder} wait for the "
                    f"disk, and {nbytes:,} more are over the limit of {MAX_UNSYNCED_BYTES:,}: "
                    "wait until it has caught up"
                )
                raise JournalFullError(msg)
            self._number += 1
            self._queue.append(Entry(self._number, kind, body))
            self._unsynced_bytes += nbytes
            if self._unsynced_bytes > MAX_UNSYNCED_BYTES // 2:
                self._wanted = self._number
            self._ready.notify()
            return self._number

    def sync(self) -> int:
        """Ask for everything appended so far to be on disk; on_done hears when it is.

        Returns:
            The number that on_done will reach.

        Raises:
            UsageError: the journal is closed.
        """
        with self._ready:
            self._refuse_closed()
            self._wanted = self._number
            self._ready.notify()
            if self._number > self._promised.number:
                return self._number
        self._on_done(self._number)  # there is nothing to do, and somebody waits to hear so
        return self._number

    def start_segment(self, version: int) -> None:
        """Records appended from now on are after this version, and in a file of their own.

        Raises:
            UsageError: the journal is closed.
        """
        with self._ready:
            self._refuse_closed()
            self._queue.append(_Start(version))
            self._ready.notify()

    def close(self, *, timeout_s: float = CLOSE_S) -> bool:
        """Write and sync what was appended, and end the thread.

        Returns:
            Whether all of it is on disk.
        """
        with self._ready:
            self._closing = True
            self._ready.notify()
        self._thread.join(timeout_s)
        with self._ready:
            self._given_up = True
            self._ready.notify()
        return self._promised.number == self._number

    def _refuse_closed(self) -> None:
        if self._closing:
            msg = f"the journal {self._folder} is closed"
            raise UsageError(msg)
        if not self._thread.is_alive():
            raise StateError(self._dead())

    # ---- beginning

    def _open(self, reader: JournalReader | None, drop_after: int | None) -> Segment:
        """A new segment, which also has what nothing proves to be on disk."""
        if len(self._run_id) != RUN_ID_BYTES:
            msg = f"a run_id has {RUN_ID_BYTES} bytes, got {len(self._run_id)}"
            raise UsageError(msg)
        if reader is None:
            reader = read_journal(self._folder, LATEST, run_id=self._run_id)
        for _ in reader:
            pass
        end = reader.end.number if drop_after is None else reader.position(drop_after).number
        proven = max(min(reader.promised, end), reader.start.number)
        unproven = [
            Entry(record.number, record.kind, pack_body(record.meta, record.buffers))
            for record in reader.unproven
            if proven < record.number <= end
        ]
        self._promised = reader.position(proven)
        self._index = reader.next_index
        with explained("write the journal in", self._folder):
            for leftover in self._folder.glob("*.tmp"):
                leftover.unlink()
            segment = self._new_segment(unproven)
        self._promised = segment.end
        return segment

    def _new_segment(self, entries: Sequence[Entry] = ()) -> Segment:
        header = SegmentHeader(
            self._run_id,
            os.urandom(SALT_BYTES),
            self._label,
            self._promised.number + 1,
            self._promised.chain,
        )
        segment = Segment(self._folder, self._index, header, entries)
        self._index += 1
        return segment

    # ---- the thread

    def _run(self) -> None:
        try:
            while (work := self._wait()) != "end":
                try:
                    self._work(work)
                except OSError as error:
                    self._fail(error)
        except Exception as error:  # noqa: BLE001 - a thread's edge: else its owner waits for ever
            self._on_done(StateError(f"{self._dead()}: {type(error).__name__}: {error}"))
        if self._segment:
            self._segment.close()

    def _dead(self) -> str:
        return f"the thread of the journal {self._folder} has died of an error of our own"

    def _wait(self) -> _Work:
        with self._ready:
            while (work := self._next()) is None:
                self._ready.wait()
            return work

    def _next(self) -> _Work | None:
        """What is to be done first; the lock is held."""
        if self._given_up:
            return "end"
        written = self._queue[self._written - 1] if self._written else None
        reached = written.number if isinstance(written, Entry) else self._promised.number
        if self._written and self._promised.number < self._wanted <= reached:
            return "sync"
        if len(self._queue) > self._written:
            if not isinstance(self._queue[self._written], _Start):
                return "write"
            return "sync" if self._written else "start"
        if self._closing:
            return "sync" if self._written else "end"
        return None

    def _work(self, work: _Work) -> None:
        if self._segment is None:
            self._segment = self._new_segment()
        if work == "write":
            self._write(self._segment)
        elif work == "sync":
            self._sync(self._segment)
        elif work == "start":
            self._start(self._segment)

    def _write(self, segment: Segment) -> None:
        with self._ready:
            batch: list[Entry] = []
            for entry in islice(self._queue, self._written, self._written + MAX_BATCH):
                if isinstance(entry, _Start):
                    break
                batch.append(entry)
        segment.write(batch)
        with self._ready:
            self._written += len(batch)

    def _sync(self, segment: Segment) -> None:
        position = segment.sync()
        with self._ready:
            self._promised = position
            for _ in range(self._written):
                entry = self._queue.popleft()
                if isinstance(entry, Entry):
                    self._unsynced_bytes -= entry.body.front_bytes + entry.body.data_bytes
            self._written = 0
        try:
            segment.mark()
        finally:
            self._on_done(position.number)  # a mark that failed takes no promise back

    def _start(self, segment: Segment) -> None:
        with self._ready:
            start = self._queue[0]
        assert isinstance(start, _Start)  # noqa: S101 - `_next` looked
        before, self._label = self._label, start.version
        try:
            self._segment = self._new_segment()
        except OSError:
            self._label = before
            raise
        segment.close()
        with self._ready:
            self._queue.popleft()

    def _fail(self, error: OSError) -> None:
        """Let the segment go, say so, and wait before the next try."""
        if self._segment:
            self._segment.close()
        self._segment = None
        with self._ready:
            self._written = 0
        self._on_done(disk_error("write the journal in", self._folder, error))
        with self._ready:
            self._ready.wait_for(lambda: self._given_up, RETRY_S)


def prune_journal(folder: Path, version: int) -> tuple[Path, ...]:
    """Remove the segments that nobody needs to go on from a version, oldest first.

    Args:
        folder: of the journal.
        version: of the oldest checkpoint that is kept.

    Returns:
        What was removed.

    Raises:
        StateError: the disk refused.
    """
    segments = list_segments(folder)
    place = start_index(segments, version) or 0
    with explained("prune the journal in", folder):
        for info in segments[:place]:
            reach("journal.prune")
            with contextlib.suppress(FileNotFoundError):
                info.path.unlink()
        if place:
            sync_folder(folder)
    return tuple(info.path for info in segments[:place])

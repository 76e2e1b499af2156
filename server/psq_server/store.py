"""A server's disk: a journal and checkpoints, each written by a thread, and what they answer.

    the loop       append, sync, keep     hands over, never waits (but for room, see `append`)
    its threads    answer                 `fd` becomes readable, `news` says what
    another one    copies                 takes checkpoints elsewhere; nothing waits for it
    the loop       news                   goes to the gate and to the state machine

What the server waits for (`ticket`) is tried again until the disk takes it: a journal does so by
itself, and so does the writer here with a checkpoint that something waits for. Any other checkpoint
that fails is given up: the next one is due in its time.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from psq.durable import (
    Journal,
    JournalFullError,
    JournalReader,
    StateDirectory,
    prune_journal,
    reach,
    read_journal,
)
from psq.durable.checkpoint import list_checkpoints, write_checkpoint
from psq.durable.retention import MIN_KEPT, prune
from psq.errors import PsqError, StateError
from psq_server.copies import Copies, Copy
from psq_server.gate import Append, start
from psq_server.news import Answered, Kept, News, Refused
from psq_server.shadow import Arrays

__all__ = ["Store"]

RETRY_S: Final = 1.0
ROOM_S: Final = 60.0
"""How long an append waits for the disk to catch up before the server ends."""
ROOM_TRY_S: Final = 0.01
CLOSE_S: Final = 0.5
"""For each thread: what the server has waited for is on disk by then, or will not be. A copy that
is not made by then is cut off: the manifest comes last, so it is none."""
MAX_JOBS: Final = 2
"""Checkpoints that wait: one that is written while rounds go on, and the last one."""


@dataclass(frozen=True, slots=True)
class _Job:
    """A checkpoint to write."""

    version: int
    arrays: Arrays
    meta: Mapping[str, Any]
    ticket: int | None


class Store:
    """See the module's docstring.

    Args:
        directory: open, and this process's; closed with the store.
        keep: how many checkpoints stay.
        copy: takes each checkpoint somewhere else as well.
        clock: monotonic seconds.

    Attributes:
        fd: becomes readable when there is news.
        journal_bytes: what was appended by this process.
        checkpoints: how many were written by this process.
        failed_checkpoints: how many could not be.
        version: of the newest checkpoint; -1 before the first.
    """

    def __init__(
        self,
        directory: StateDirectory,
        *,
        keep: int = MIN_KEPT,
        copy: Copy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._keep = keep
        self._clock = clock
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.fd = self._reader
        self._news: deque[News] = deque()
        self._journal: Journal | None = None
        self._tickets: deque[tuple[int, int]] = deque()
        self._jobs: queue.Queue[_Job | None] = queue.Queue(MAX_JOBS)
        self._closing = threading.Event()
        self._is_refused = False
        self._copies = None if copy is None else Copies(copy, self._tell, clock=clock)
        self._thread = threading.Thread(target=self._run, name="psq-checkpoint", daemon=True)
        self._thread.start()
        self.journal_bytes = self.checkpoints = self.failed_checkpoints = 0
        self.version = -1
        self._kept_s = clock()

    @property
    def copies(self) -> Mapping[str, int]:
        """How many checkpoints were copied elsewhere, by what came of it."""
        return {} if self._copies is None else self._copies.counts

    @property
    def age_s(self) -> float:
        """How old the newest checkpoint is; of one of an earlier process since this one began."""
        return max(0.0, self._clock() - self._kept_s)

    # ---- the loop's side

    def open_journal(
        self,
        version: int,
        *,
        reader: JournalReader | None = None,
        drop_after: int | None = None,
    ) -> None:
        """Append from this version on.

        Args:
            version: of the state as it is.
            reader: of the journal that it was replayed from; None: there is no such state, and
                whatever a journal has is void.
            drop_after: the last record that counts.

        Raises:
            StateError: what is there is damaged, or the disk refused.
        """
        directory = self._directory
        if reader is None:
            reader = read_journal(directory.journal, version, run_id=directory.run_id)
            drop_after = reader.start.number
            for _ in reader:
                pass
        self._journal = Journal(
            directory.journal,
            version,
            self._on_done,
            run_id=directory.run_id,
            reader=reader,
            drop_after=drop_after,
        )
        self.append(start(directory.epoch, version))

    def append(self, record: Append) -> None:
        """Put a record into the journal.

        Raises:
            StateError: the disk did not take what came before for ROOM_S.
        """
        journal, ends_s = self._need_journal(), self._clock() + ROOM_S
        reach("commit.record")
        while True:
            try:
                journal.append(record.kind, record.meta, record.buffers)
                break
            except JournalFullError:
                if self._clock() > ends_s:
                    raise
                time.sleep(ROOM_TRY_S)
        self.journal_bytes += sum(memoryview(buffer).nbytes for buffer in record.buffers)

    def sync(self, ticket: int) -> None:
        """Make all of it durable; `Answered` says when it is."""
        reach("commit.sync")
        journal = self._need_journal()
        self._tickets.append((journal.number, ticket))
        journal.sync()

    def keep(
        self, version: int, arrays: Arrays, meta: Mapping[str, Any], ticket: int | None
    ) -> None:
        """Write a checkpoint of what `arrays` hold; `Kept` says when it is there.

        Args:
            version: what it is of.
            arrays: read in the writer's thread; with a ticket perhaps more than once.
            meta: what belongs to them.
            ticket: is answered when it is there, however long that takes.
        """
        if self._journal is not None:
            self._journal.start_segment(version)
        self._jobs.put(_Job(version, arrays, meta, ticket))

    def released(self) -> None:
        """What waited for an answer has left."""
        reach("commit.released")

    def news(self) -> Iterator[News]:
        """What has come since this was asked last."""
        try:
            while os.read(self._reader, 4096):
                pass
        except BlockingIOError:
            pass
        while self._news:
            yield self._news.popleft()

    def close(self) -> bool:
        """End both threads; returns whether everything that was handed over is on disk.

        Once: whoever asks again hears that it is over.
        """
        if self._closing.is_set():
            return True
        self._closing.set()
        is_whole = True
        try:
            self._jobs.put_nowait(None)
        except queue.Full:
            is_whole = False
        if self._journal is not None:
            is_whole = self._journal.close(timeout_s=CLOSE_S) and is_whole
        ends_s = time.monotonic() + CLOSE_S
        self._thread.join(CLOSE_S)
        is_whole = is_whole and not self._thread.is_alive()
        left_s = max(0.0, ends_s - time.monotonic())
        are_copied = self._copies is None or self._copies.close(left_s)
        if not self._thread.is_alive() and are_copied:
            os.close(self._reader)
            os.close(self._writer)
        self._directory.close()
        return is_whole

    def _need_journal(self) -> Journal:
        assert self._journal is not None, "records come before there is a journal"  # noqa: S101
        return self._journal

    # ---- the threads' side

    def _tell(self, news: News) -> None:
        self._news.append(news)
        try:
            os.write(self._writer, b"!")
        except BlockingIOError:
            pass  # it is readable already
        except OSError:
            if not self._closing.is_set():
                raise

    def _on_done(self, done: int | StateError) -> None:
        if isinstance(done, StateError):
            self._is_refused = True
            self._tell(Refused(str(done)))
            return
        reach("commit.durable")
        if self._is_refused:
            self._is_refused = False
            self._tell(Refused(""))
        while self._tickets and self._tickets[0][0] <= done:
            self._tell(Answered(self._tickets.popleft()[1]))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            failed = False
            while (error := self._write(job)) is not None:
                failed = True
                if job.ticket is None or self._closing.is_set():
                    self.failed_checkpoints += 1
                    self._tell(Kept(job.version, str(error)))
                    break
                self._tell(Refused(str(error)))
                self._closing.wait(RETRY_S)
            else:
                self._written(job, healed=failed)

    def _write(self, job: _Job) -> Exception | None:
        try:
            reach("commit.keep")
            write_checkpoint(self._directory.checkpoints, job.version, job.arrays, job.meta)
        except Exception as error:  # noqa: BLE001 - a thread's edge: the loop hears of all there is
            return error
        return None

    def _written(self, job: _Job, *, healed: bool) -> None:
        reach("commit.kept")
        self.checkpoints += 1
        self.version, self._kept_s = job.version, self._clock()
        if healed:
            self._tell(Refused(""))
        if job.ticket is not None:
            self._tell(Answered(job.ticket))
        try:
            news = Kept(job.version, note=self._tidy())
        except PsqError as error:
            news = Kept(job.version, note=f"failed: {error}", is_alone=True)
        self._tell(news)

    def _tidy(self) -> str:
        """Let the newest checkpoint be copied, remove what nobody needs; what to say of it."""
        newest, note = list_checkpoints(self._directory.checkpoints)[0], ""
        wanted: tuple[Path, ...] = ()
        if self._copies is not None:
            note = self._copies.offer(newest.version, newest.path)
            wanted = self._copies.wanted
        pruned = prune(self._directory.checkpoints, self._keep, thorough=False, spared=wanted)
        if pruned.oldest_version is not None:
            prune_journal(self._directory.journal, pruned.oldest_version)
        return note

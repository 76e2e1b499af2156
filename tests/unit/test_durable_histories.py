"""A journal through random lives, crashes and refusals of the disk, beside a list of it all."""

import errno
import os
import queue

import pytest
from durable_life import memory_folder
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from psq.durable import journal as journal_module
from psq.durable.journal import Journal, prune_journal
from psq.durable.reader import read_journal
from psq.errors import StateError

RUN = bytes(range(16))
END_S = 10.0


class Histories(RuleBasedStateMachine):
    """`said` is what was appended, `promised` how many of these must be there whatever happens."""

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(journal_module, "RETRY_S", 0.001)
        self.patch.setattr("psq.durable.files.os.fsync", self.fsync)
        self.patch.setattr("psq.durable.files.os.writev", self.writev)
        self.memory = memory_folder()
        self.folder = self.memory.__enter__()
        self.refusals = {"fsync": 0, "writev": 0}
        self.struck = 0
        self.said: list[int] = []
        self.promised = 0
        self.version = 0
        self.pruned = 0
        self.synced: dict[int, int] = {}
        """Of each file (its inode), how many bytes the disk has."""
        self.failed: set[int] = set()
        self.serial = 0
        self.journal = None

    def teardown(self):
        self.die()
        self.patch.undo()
        self.memory.__exit__(None, None, None)

    # ---- the disk

    def refuse(self, name):
        if self.refusals[name]:
            self.refusals[name] -= 1
            self.struck += 1
            raise OSError(errno.EIO, "Input/output error")

    def fsync(self, fd):
        """As Linux does it: after a failure it says yes, and what was dirty never comes."""
        inode, size = os.fstat(fd).st_ino, os.fstat(fd).st_size
        if self.refusals["fsync"]:
            self.failed.add(inode)
        self.refuse("fsync")
        if inode not in self.failed:
            self.synced[inode] = size

    def writev(self, fd, pieces):
        if self.refusals["writev"]:
            os.write(fd, pieces[0][: pieces[0].nbytes // 2])
        self.refuse("writev")
        return os.write(fd, b"".join(pieces))

    # ---- lives

    def open(self, **options):
        self.done = queue.Queue()
        self.journal = Journal(self.folder, self.version, self.done.put, run_id=RUN, **options)

    def die(self):
        """As SIGKILL: what is queued is lost, what is written stays."""
        with self.journal._ready:
            self.journal._given_up = True
            self.journal._ready.notify()
        self.journal._thread.join(END_S)
        assert not self.journal._thread.is_alive()

    def lose(self, share):
        """Take from each file this share of what no fsync has said to be on the disk."""
        for path in self.folder.glob("*.journal"):
            found = path.stat()
            unsafe = found.st_size - self.synced[found.st_ino]
            os.truncate(path, found.st_size - int(share * unsafe))

    def found(self):
        reader = read_journal(self.folder, self.pruned, run_id=RUN)
        records = [(record.number, record.meta["serial"]) for record in reader]
        return records, reader

    @initialize()
    def begin(self):
        self.open()

    @rule(data=st.binary(max_size=9000))
    def append(self, data):
        self.serial += 1
        assert self.journal.append(1, {"serial": self.serial}, [data]) == len(self.said) + 1
        self.said.append(self.serial)

    @rule()
    def sync(self):
        number = self.journal.sync()
        assert number == len(self.said)
        while self.promised < number:
            outcome = self.done.get(timeout=END_S)
            if isinstance(outcome, StateError):
                continue
            assert self.promised <= outcome <= number
            self.promised = outcome

    @rule(name=st.sampled_from(["fsync", "writev"]), times=st.integers(1, 3))
    def refused(self, name, times):
        self.sync()
        self.refusals[name], struck = times, self.struck
        self.append(b"refused at first")
        self.sync()
        assert self.struck == struck + times

    @rule()
    def checkpoint(self):
        self.version += 1
        self.journal.start_segment(self.version)

    @precondition(lambda self: self.version)
    @rule(back=st.integers(0, 3))
    def prune(self, back):
        self.pruned = max(self.pruned, self.version - back)
        prune_journal(self.folder, self.pruned)

    @rule(lost=st.floats(0, 1), back=st.integers(0, 2))
    def crash(self, lost, back):
        """Then some of what was not synced may be lost, and some of the rest is taken back."""
        self.die()
        self.lose(lost)
        self.everything_promised_is_there()
        _, reader = self.found()
        end = max(reader.start.number, reader.end.number - back)
        self.said = self.said[:end]
        self.promised = min(self.promised, end)
        self.open(reader=reader, drop_after=end)
        self.promised = end
        self.everything_promised_is_there()

    @rule(share=st.floats(0, 1))
    def power_cut(self, share):
        """As above, and nothing is taken back."""
        self.crash(lost=share, back=0)

    @invariant()
    def everything_promised_is_there(self):
        if self.journal is None:
            return
        records, reader = self.found()
        first = reader.start.number
        assert first + len(records) >= self.promised
        assert records == [
            (n, self.said[n - 1]) for n in range(first + 1, first + 1 + len(records))
        ]


Histories.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_whatever_happens_what_was_promised_is_there = Histories.TestCase

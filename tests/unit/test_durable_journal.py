import contextlib
import errno
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from durable_life import memory_folder
from hypothesis import given
from hypothesis import strategies as st

from psq.durable import journal as journal_module
from psq.durable.files import write_all
from psq.durable.journal import Journal, JournalFullError, prune_journal
from psq.durable.reader import read_journal
from psq.durable.records import PAGE_BYTES, SegmentHeader, pack_body
from psq.durable.segment import Entry, Segment
from psq.errors import StateError, UsageError

RUN = bytes(range(16))
END_S = 10.0


class Done:
    """What a journal has said, waited for by name."""

    def __init__(self):
        self._said = queue.Queue()
        self.errors = []
        self.numbers = [0]

    def __call__(self, outcome):
        self._said.put(outcome)

    def until(self, number):
        while self.numbers[-1] < number:
            self._take()
        return self

    def until_error(self):
        while not self.errors:
            self._take()
        return self.errors[-1]

    def _take(self):
        outcome = self._said.get(timeout=END_S)
        (self.errors if isinstance(outcome, StateError) else self.numbers).append(outcome)


@pytest.fixture
def open_journal(tmp_path):
    """Open the journal in tmp_path; whatever is open is closed at the end."""
    with contextlib.ExitStack() as stack:

        def start(version=0, **options):
            done = Done()
            journal = Journal(tmp_path, version, done, run_id=RUN, **options)
            stack.callback(journal.close)
            return journal, done

        yield start


def said(folder, after=0):
    """What can be read: (number, kind, meta, buffers)."""
    reader = read_journal(folder, after, run_id=RUN)
    return [(r.number, r.kind, r.meta, [bytes(b) for b in r.buffers]) for r in reader], reader


def numbers(folder, after=0):
    return [one[0] for one in said(folder, after)[0]]


def segments(folder):
    return sorted(folder.glob("*.journal"))


def fill(journal, done, *versions, data=b"abc"):
    for version in versions:
        journal.append(1, {"v": version}, [data, b""])
        done.until(journal.sync())


# ---- writing and reading


def test_records_come_back_as_they_were_appended(open_journal, tmp_path):
    journal, done = open_journal()
    buffers = [b"abc", bytearray(b"\0" * 5000), memoryview(b"xyz")[1:], b""]
    assert journal.append(1, {"round": 7, 3: b"\xff", "deep": [1, {"a": None}]}, buffers) == 1
    assert journal.append(65535, {}) == 2
    assert journal.sync() == 2
    done.until(2)
    records, reader = said(tmp_path)
    meta = {"round": 7, 3: b"\xff", "deep": [1, {"a": None}]}
    assert records == [(1, 1, meta, list(map(bytes, buffers))), (2, 65535, {}, [])]
    assert (reader.torn, reader.promised, reader.unproven) == (None, 2, [])
    assert reader.last.number == 2


def test_nothing_is_copied_before_it_is_written(open_journal, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "psq.durable.segment.write_all", lambda *a: seen.append(a[1]) or write_all(*a)
    )
    journal, done = open_journal()
    payload = bytearray(100_000)
    journal.append(1, {}, [payload])
    done.until(journal.sync())
    assert any(
        piece.obj is payload for pieces in seen for piece in pieces if type(piece) is memoryview
    )


def test_one_fsync_serves_all_who_asked_meanwhile(open_journal, monkeypatch):
    real, calls, free = os.fsync, [], threading.Event()
    journal, done = open_journal()

    def slow(fd):
        calls.append(fd)
        assert free.wait(END_S)
        real(fd)

    monkeypatch.setattr("psq.durable.files.os.fsync", slow)
    for _ in range(50):
        journal.append(1, {})
        journal.sync()
    free.set()
    done.until(50)
    assert len(calls) <= 50 // 10 + 2
    assert done.numbers == sorted(set(done.numbers)), "they only rise"


def test_without_a_sync_records_are_written_and_close_makes_them_durable(open_journal, tmp_path):
    journal, done = open_journal()
    for _ in range(3):
        journal.append(1, {})
    assert journal.close()
    assert numbers(tmp_path) == [1, 2, 3]
    done.until(3)
    with pytest.raises(UsageError, match="is closed"):
        journal.append(1, {})


def test_a_sync_with_nothing_to_do_is_answered(open_journal):
    journal, done = open_journal()
    fill(journal, done, 1)
    before = len(done.numbers)
    assert journal.sync() == 1
    done._take()
    assert len(done.numbers) == before + 1


def test_numbers_go_on_after_a_restart_and_so_does_the_chain(open_journal, tmp_path):
    for life in range(4):
        journal, done = open_journal(life)
        assert journal.append(1, {"life": life}) == life + 1
        done.until(journal.sync())
        assert journal.close()
    assert [meta["life"] for _, _, meta, _ in said(tmp_path)[0]] == [0, 1, 2, 3]
    assert len(segments(tmp_path)) == 4


def test_reading_begins_at_the_segment_of_the_version(open_journal, tmp_path):
    journal, done = open_journal(0)
    for version in range(1, 7):
        fill(journal, done, version)
        if version % 2 == 0:
            journal.start_segment(version)
    journal.close()
    assert numbers(tmp_path, 0) == [1, 2, 3, 4, 5, 6]
    assert numbers(tmp_path, 1) == [1, 2, 3, 4, 5, 6]
    assert numbers(tmp_path, 2) == [3, 4, 5, 6]
    assert numbers(tmp_path, 5) == [5, 6]
    assert numbers(tmp_path, 6) == []


def test_pruning_leaves_what_a_checkpoint_needs(open_journal, tmp_path):
    journal, done = open_journal(0)
    for version in range(1, 7):
        fill(journal, done, version)
        if version % 2 == 0:
            journal.start_segment(version)
    assert len(prune_journal(tmp_path, 5)) == 2
    assert prune_journal(tmp_path, 5) == ()
    assert prune_journal(tmp_path, 1) == ()
    assert numbers(tmp_path, 5) == [5, 6]
    with pytest.raises(
        StateError, match="begins after version 4, and the checkpoint is of version 2"
    ):
        read_journal(tmp_path, 2)
    journal.append(1, {})
    journal.close()
    assert numbers(tmp_path, 4) == [5, 6, 7]


def test_an_empty_folder_has_nothing_to_read(tmp_path):
    assert numbers(tmp_path) == []
    assert numbers(tmp_path / "none") == []


def test_what_was_dropped_never_comes_again(open_journal, tmp_path):
    journal, done = open_journal(0)
    fill(journal, done, 1, 2, 3, 4)
    journal.close()
    reader = read_journal(tmp_path, 0, run_id=RUN)
    journal, done = open_journal(2, reader=reader, drop_after=2)
    assert journal.append(9, {}) == 3
    journal.close()
    assert [(one[0], one[1]) for one in said(tmp_path)[0]] == [(1, 1), (2, 1), (3, 9)]
    reader = read_journal(tmp_path, 2, run_id=RUN)
    journal, done = open_journal(2, reader=reader, drop_after=reader.start.number)
    journal.close()
    assert numbers(tmp_path) == [1, 2]
    assert numbers(tmp_path, 2) == []
    with pytest.raises(
        UsageError, match=r"record 7 was not read from the journal; numbers read: 2\.\.2"
    ):
        open_journal(2, reader=read_journal(tmp_path, 2), drop_after=7)


def test_illegal_records_are_refused(open_journal):
    journal, _ = open_journal()
    for kind in (0, 65536):
        with pytest.raises(UsageError, match=r"kind is 1\.\.65535"):
            journal.append(kind, {})
    with pytest.raises(UsageError, match="what msgpack can say"):
        journal.append(1, {"x": object()})
    with pytest.raises(UsageError, match="a run_id has 16 bytes"):
        Journal(Path(), 0, print, run_id=b"")


# ---- torn and damaged


@pytest.fixture
def in_memory():
    with memory_folder() as path:
        yield path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A segment of a few records, and for each number of promised ones how long the file was."""
    folder = tmp_path_factory.mktemp("written")
    done = Done()
    journal = Journal(folder, 0, done, run_id=RUN)
    sizes = {}
    for version in (1, 2):
        journal.append(1, {"v": version}, [bytes([version]) * 700])
        journal.append(2, {"v": version}, [b"x"])
        done.until(journal.sync())
        sizes[2 * version] = segments(folder)[0].stat().st_size
    assert journal.close()
    return segments(folder)[0].name, segments(folder)[0].read_bytes(), said(folder)[0], sizes


def test_a_journal_cut_at_any_byte_gives_all_that_was_promised_by_then(written, in_memory):
    name, whole, records, sizes = written
    (in_memory / name).write_bytes(whole)
    torn = 0
    for stop in range(len(whole), PAGE_BYTES - 1, -1):
        os.truncate(in_memory / name, stop)
        found, reader = said(in_memory)
        promised = max((number for number, size in sizes.items() if size <= stop), default=0)
        assert len(found) >= promised
        assert found == records[: len(found)]
        torn += reader.torn is not None
        if reader.torn:
            assert reader.torn.offset + reader.torn.lost_bytes == stop
    assert torn > 1000


@pytest.mark.parametrize("stop", [PAGE_BYTES, PAGE_BYTES + 1, PAGE_BYTES + 900, 8200, 8900])
def test_after_a_torn_tail_the_journal_goes_on(written, tmp_path, open_journal, stop):
    name, whole, records, _ = written
    (tmp_path / name).write_bytes(whole[:stop])
    before = said(tmp_path)[0]
    assert len(before) < len(records)
    journal, done = open_journal()
    fill(journal, done, 99)
    assert said(tmp_path)[0] == [*before, (len(before) + 1, 1, {"v": 99}, [b"abc", b""])]


@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found(written, tmp_path_factory, data):
    name, whole, records, _ = written
    at = data.draw(st.integers(0, 8 * len(whole) - 1), "bit")
    folder = tmp_path_factory.mktemp("flipped")
    flipped = bytearray(whole)
    flipped[at // 8] ^= 1 << at % 8
    (folder / name).write_bytes(flipped)
    try:
        found, reader = said(folder)
    except StateError:
        return
    assert reader.torn, "found, and only at the end"
    assert found == records, "in the last mark, which promises nothing that is not there"


def test_a_bad_record_that_was_promised_is_damage_and_no_torn_tail(written, tmp_path):
    name, whole, *_ = written
    last = whole.rindex(bytes([2]) * 700)
    (tmp_path / name).write_bytes(whole[:last] + b"\0" * 700 + whole[last + 700 :])
    with pytest.raises(StateError, match="a later record says 3 was synced; this is no torn tail"):
        said(tmp_path)


def entries(first, *texts):
    return [Entry(first + i, 1, pack_body({}, [text])) for i, text in enumerate(texts)]


def segment(folder, index=0, *, first=1, previous=RUN, version=0):
    return Segment(folder, index, SegmentHeader(RUN, b"saltsalt", version, first, previous))


def test_pages_that_reached_the_disk_out_of_order_are_a_torn_tail(tmp_path):
    one = segment(tmp_path)
    one.write(entries(1, b"a"))
    one.sync()
    one.mark()
    one.write(entries(2, b"B" * 6000, b"c"))
    one.close()
    whole = one.path.read_bytes()
    hole = whole.index(b"B" * 6000)
    one.path.write_bytes(whole[:hole] + b"\0" * 6000 + whole[hole + 6000 :])
    records, reader = said(tmp_path)
    assert [record[0] for record in records] == [1]
    assert "not all there" in reader.torn.why


def test_what_nothing_proves_to_be_synced_is_written_again_at_the_next_start(
    tmp_path, open_journal
):
    one = segment(tmp_path)
    one.write(entries(1, b"first", b"second"))
    one.close()  # killed between fsync and mark, or before
    old = one.path
    assert len(said(tmp_path)[1].unproven) == 2
    journal, done = open_journal()
    fill(journal, done, 3)
    journal.close()
    old.write_bytes(old.read_bytes()[:PAGE_BYTES])  # the page cache is gone, and had it all
    assert numbers(tmp_path) == [1, 2, 3]


def test_what_a_peer_sends_is_never_taken_for_a_header(tmp_path):
    other = segment(tmp_path, version=7)
    other.write(entries(1, b"x"))
    other.sync()
    other.mark()
    other.close()
    forged = other.path.read_bytes()[PAGE_BYTES:]
    other.path.unlink()
    one = Segment(tmp_path, 0, SegmentHeader(RUN, b"tlastlas", 0, 1, RUN))
    one.write(entries(1, forged))
    one.close()
    os.truncate(one.path, one.path.stat().st_size - 1)
    assert said(tmp_path)[1].torn


def test_a_missing_segment_is_found(open_journal, tmp_path):
    for life in range(3):
        journal, done = open_journal(life)
        fill(journal, done, life)
        journal.close()
    first, second, _ = segments(tmp_path)
    text = second.read_bytes()
    second.unlink()
    with pytest.raises(
        StateError, match="ends with record 1, and a later segment goes on after record 2"
    ):
        said(tmp_path)
    second.write_bytes(text)
    first.unlink()
    with pytest.raises(StateError, match="begins after version 1"):
        said(tmp_path)


def test_a_segment_of_another_history_or_run_is_refused(open_journal, tmp_path):
    journal, done = open_journal()
    fill(journal, done, 1)
    journal.close()
    segment(tmp_path, index=5, first=2, previous=b"another history!").close()
    with pytest.raises(StateError, match="of another history"):
        said(tmp_path)
    with pytest.raises(StateError, match=f"expected run {'ff' * 16}"):
        list(read_journal(tmp_path, 0, run_id=b"\xff" * 16))


@pytest.mark.parametrize("at", [0, 8, 25, 40, 60, 4095])
def test_a_damaged_segment_header_is_refused(written, tmp_path, at):
    name, whole, *_ = written
    (tmp_path / name).write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    with pytest.raises(StateError, match=r"has no whole header|damaged at byte 0"):
        said(tmp_path)


# ---- disks that refuse


class Disk:
    """Stands before a call of the system and refuses as told."""

    def __init__(self, monkeypatch, name, code):
        self.refusing, self.struck, self.fds = True, 0, []
        real = getattr(os, name)

        def call(fd, *rest):
            self.fds.append(fd)
            if self.refusing:
                self.struck += 1
                raise OSError(code, os.strerror(code))
            return real(fd, *rest)

        monkeypatch.setattr(f"psq.durable.files.os.{name}", call)


@pytest.mark.parametrize("name", ["fsync", "writev"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_refuses_is_reported_and_nothing_is_lost_when_it_is_back(
    open_journal, tmp_path, monkeypatch, name, code
):
    monkeypatch.setattr(journal_module, "RETRY_S", 0.01)
    journal, done = open_journal()
    fill(journal, done, 1)
    disk = Disk(monkeypatch, name, code)
    number = journal.append(1, {"v": 2}, [b"second"])
    journal.sync()
    assert os.strerror(code) in str(done.until_error())
    assert done.numbers[-1] == 1
    assert disk.struck
    journal.append(1, {"v": 3}, [b"third"])
    disk.refusing = False
    done.until(number)
    done.until(journal.sync())
    journal.close()
    assert [meta["v"] for _, _, meta, _ in said(tmp_path)[0]] == [1, 2, 3]


def test_whoever_waits_for_a_journal_whose_thread_dies_hears_of_it(open_journal, monkeypatch):
    def fail(*_):
        raise MemoryError

    journal, done = open_journal()
    fill(journal, done, 1)
    monkeypatch.setattr("psq.durable.segment.Segment.write", fail)
    journal.append(1, {"v": 2}, [b"second"])
    journal.sync()
    assert "has died of an error of our own: MemoryError" in str(done.until_error())
    journal._thread.join(END_S)
    with pytest.raises(StateError, match="has died"):
        journal.append(1, {"v": 3}, [b"third"])
    assert done.numbers[-1] == 1
    assert not journal.close()


def test_no_file_is_synced_again_after_its_fsync_has_failed(open_journal, tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "RETRY_S", 0.01)
    journal, done = open_journal()
    names, struck = [], []
    real = os.fsync

    def sync(fd):
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        names.append(name)
        if name.startswith("00000000") and not struck:
            struck.append(name)
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr("psq.durable.files.os.fsync", sync)
    fill(journal, done, 1)
    assert struck
    assert len([name for name in names if name.startswith("00000000")]) == 1
    assert [one[0] for one in said(tmp_path)[0]] == [1]
    assert len(segments(tmp_path)) == 2


def test_a_mark_that_fails_takes_no_promise_back(open_journal, tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "RETRY_S", 0.01)
    journal, done = open_journal()
    struck = []

    def refuse(self):
        if not struck:
            struck.append(self)
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Segment, "mark", refuse)
    journal.append(1, {})
    done.until(journal.sync())
    assert "No space left" in str(done.until_error())
    assert struck
    fill(journal, done, 2)
    journal.close()
    assert numbers(tmp_path) == [1, 2]


def test_a_write_that_ends_early_goes_on_where_it_ended(open_journal, tmp_path, monkeypatch):
    real, calls = os.writev, []

    def short(fd, pieces):
        calls.append(fd)
        return real(fd, [pieces[0][: max(1, pieces[0].nbytes // 2)]])

    monkeypatch.setattr("psq.durable.files.os.writev", short)
    journal, done = open_journal()
    fill(journal, done, 1, 2, data=bytes(range(256)) * 10)
    assert len(calls) > 20
    assert [one[3][0] for one in said(tmp_path)[0]] == [bytes(range(256)) * 10] * 2


def test_what_waits_for_a_disk_is_bounded(open_journal, monkeypatch):
    monkeypatch.setattr(journal_module, "MAX_UNSYNCED_BYTES", 10_000)
    journal, done = open_journal()
    free = threading.Event()
    real = os.fsync
    monkeypatch.setattr("psq.durable.files.os.fsync", lambda fd: (free.wait(END_S), real(fd)))
    journal.append(1, {}, [bytes(6000)])  # over half: it is synced unasked
    with pytest.raises(JournalFullError, match="over the limit of 10,000"):
        journal.append(1, {}, [bytes(6000)])
    assert 0 < journal.room_bytes < 6000
    free.set()
    done.until(1)
    journal.append(1, {}, [bytes(20_000)])  # one alone may be larger
    done.until(2)


def test_a_journal_on_a_broken_disk_ends_in_time_and_says_so(open_journal, monkeypatch):
    journal, done = open_journal()
    Disk(monkeypatch, "fsync", errno.EIO)
    journal.append(1, {})
    journal.sync()
    done.until_error()
    assert journal.close(timeout_s=0.05) is False


FULL = """
import queue, resource, sys
from pathlib import Path
from psq.durable import journal, read_journal
from psq.errors import StateError
journal.RETRY_S = 0.01
said, folder = queue.Queue(), Path(sys.argv[1])
log = journal.Journal(folder, 0, said.put, run_id=bytes(16))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
promised, number = 0, 0
while not isinstance(outcome := promised, StateError):
    number = log.append(1, {}, [bytes([number % 251]) * 9000])
    log.sync()
    while not isinstance(promised, StateError) and promised < number:
        promised = said.get(timeout=10)
        before = promised if isinstance(promised, int) else outcome
print(promised, flush=True)
assert [r.number for r in read_journal(folder, 0)][:before] == list(range(1, before + 1))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
assert log.close(timeout_s=10)
assert [r.number for r in read_journal(folder, 0)] == list(range(1, number + 1))
print("healed")
"""


def test_a_file_that_may_not_grow_stops_promises_until_it_may(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert "raise the limit on a file's size (ulimit -f)" in done.stdout
    assert done.stdout.splitlines()[-1] == "healed"

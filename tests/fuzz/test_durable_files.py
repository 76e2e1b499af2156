"""Spoilt journals and checkpoints: what was written, or a prefix of it, or an error."""

import contextlib
import shutil
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psq.durable import Journal, StateDirectory, read_journal
from psq.durable.checkpoint import load_checkpoint, verify, write_checkpoint
from psq.durable.retention import load_newest
from psq.errors import StateError

RUN = bytes(range(16))
RECORDS = 12
END_S = 20.0
ARRAYS = {
    "x": np.arange(3000, dtype=np.float32),
    "m": np.linspace(-1, 1, 700).astype(np.float32),
    "counts": np.arange(5, dtype=np.uint64),
}
META = {"version": 3, "ranks": [[0, 7], [1, 9]], "text": "x" * 40}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A journal's only segment, and what it says."""
    folder = tmp_path_factory.mktemp("journal")
    done, said = threading.Event(), []

    def on_done(outcome):
        said.append(outcome)
        if outcome == RECORDS:
            done.set()

    journal = Journal(folder, 0, on_done, run_id=RUN)
    for number in range(RECORDS):
        journal.append(1 + number % 3, {"round": number}, [bytes([number]) * (number * 37)])
        if number % 3 == 2:
            journal.sync()
    assert done.wait(END_S), said
    assert journal.close()
    return folder, contents(folder)


@contextlib.contextmanager
def refused_by_name(path):
    """Lets a StateError that names the path pass; gives a list that then has it."""
    refusals = []
    try:
        yield refusals
    except StateError as error:
        refusals.append(error)
    assert all(str(path) in str(error) for error in refusals)


def contents(folder):
    reader = read_journal(folder, 0, run_id=RUN)
    return [(r.number, r.kind, r.meta, [bytes(b) for b in r.buffers]) for r in reader]


@st.composite
def damages(draw):
    """What happens to a file: a function of its bytes."""
    kind = draw(st.sampled_from(["flip", "cut", "add", "zero", "move"]))
    at, size = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 300))
    noise = draw(st.binary(min_size=1, max_size=60))

    def spoil(data):
        place = int(at * len(data))
        changed = bytearray(data)
        if kind == "flip":
            changed[place] ^= 1 << (size % 8)
        elif kind == "cut":
            del changed[place:]
        elif kind == "add":
            changed[place:place] = noise
        elif kind == "zero":
            changed[place : place + size] = bytes(len(changed[place : place + size]))
        else:
            changed[place : place + size] = changed[-size:]
        return bytes(changed)

    return spoil


@given(spoils=st.lists(damages(), min_size=1, max_size=3))
def test_a_spoilt_journal_says_what_was_written_up_to_somewhere_or_is_refused(
    written, tmp_path_factory, spoils
):
    folder, truth = written
    (segment,) = folder.glob("*.journal")
    copy = tmp_path_factory.mktemp("spoilt")
    data = segment.read_bytes()
    for spoil in spoils:
        data = spoil(data) if data else data
    (copy / segment.name).write_bytes(data)
    with refused_by_name(copy):
        found = contents(copy)
        assert found == truth[: len(found)]
    shutil.rmtree(copy)


def same(arrays, meta):
    assert meta == META
    assert sorted(arrays) == sorted(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].tobytes() == array.tobytes()
    return True


@given(data=st.data())
def test_a_spoilt_checkpoint_is_the_same_or_refused_and_the_one_before_is_taken(
    tmp_path_factory, data
):
    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(folder, 2, ARRAYS, META)
    newest = write_checkpoint(folder, 3, ARRAYS, META)
    names = sorted(path.name for path in newest.iterdir())
    place = newest / data.draw(st.sampled_from(names))
    before = place.read_bytes()
    after = data.draw(damages())(before)
    place.write_bytes(after)
    problems = verify(newest)
    with refused_by_name(newest) as refusals:
        assert same(*load_checkpoint(newest))
    assert bool(refusals) == bool(problems)
    assert bool(problems) or after == before or place.name == "manifest.json"
    loaded = load_newest(folder)
    assert loaded is not None
    assert same(loaded.arrays, loaded.meta)
    assert loaded.version == (2 if problems else 3)
    assert bool(loaded.skipped) == bool(problems)
    shutil.rmtree(folder)


@given(name=st.sampled_from(["FORMAT", "EPOCH"]), spoil=damages())
def test_a_spoilt_state_directory_is_opened_as_it_was_or_refused(tmp_path_factory, name, spoil):
    path = tmp_path_factory.mktemp("state") / "s"
    with StateDirectory.open(path, create=True, run_id=RUN) as opened:
        assert opened.epoch == 1
    before = (path / name).read_bytes()
    after = spoil(before)
    (path / name).write_bytes(after)
    with refused_by_name(path) as refusals, StateDirectory.open(path, create=True) as opened:
        assert (opened.epoch, opened.run_id) == (2, RUN)
    assert bool(refusals) == (after != before)
    shutil.rmtree(path)

import os
import subprocess
import sys

import pytest

from psq.durable.directory import StateDirectory
from psq.errors import StateError

RUN = bytes(range(16))

HOLD = """
import sys
from pathlib import Path
from psq.durable.directory import StateDirectory
with StateDirectory.open(Path(sys.argv[1]), create=True):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_each_opening_has_an_epoch_of_its_own_and_the_run_stays(tmp_path):
    path = tmp_path / "above" / "state"
    with StateDirectory.open(path, create=True) as first:
        assert (first.epoch, first.created) == (1, True)
        assert first.checkpoints.is_dir()
        assert first.journal.is_dir()
    with StateDirectory.open(path, create=True) as second:
        assert (second.epoch, second.created) == (2, False)
        assert second.run_id == first.run_id


def test_a_run_that_was_named_is_kept_and_another_one_refused(tmp_path):
    with StateDirectory.open(tmp_path, create=True, run_id=RUN) as opened:
        assert opened.run_id == RUN
    StateDirectory.open(tmp_path, create=False, run_id=RUN).close()
    with pytest.raises(StateError, match=f"belongs to run {RUN.hex()}, expected run ffff"):
        StateDirectory.open(tmp_path, create=False, run_id=b"\xff" * 16)
    with pytest.raises(StateError, match="a run_id has 16 bytes, got 3"):
        StateDirectory.open(tmp_path, create=False, run_id=b"abc")


def test_a_second_opener_is_refused_and_told_who_has_it(tmp_path):
    with StateDirectory.open(tmp_path, create=True):
        with pytest.raises(StateError, match=rf"open in another process \(pid {os.getpid()}\)"):
            StateDirectory.open(tmp_path, create=False)
        with pytest.raises(StateError, match="another process"), StateDirectory.lock(tmp_path):
            pass
    with StateDirectory.lock(tmp_path), pytest.raises(StateError, match="another process"):
        StateDirectory.open(tmp_path, create=False)
    assert StateDirectory.open(tmp_path, create=False).epoch == 2, "refusals took no epoch"


def test_a_killed_holder_leaves_no_lock(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as child:
        assert child.stdout.readline() == "open\n"
        with pytest.raises(StateError, match=rf"\(pid {child.pid}\)"):
            StateDirectory.open(tmp_path, create=False)
        child.kill()
    with StateDirectory.open(tmp_path, create=False) as opened:
        assert opened.epoch == 2


def test_what_is_no_state_directory_is_left_alone(tmp_path):
    with pytest.raises(StateError, match="there is no state directory"):
        StateDirectory.open(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(StateError, match="it is empty"):
        StateDirectory.open(tmp_path, create=False)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StateError, match=r"it holds thesis\.tex"):
        StateDirectory.open(tmp_path, create=True)
    with pytest.raises(StateError, match="is a file"):
        StateDirectory.open(tmp_path / "thesis.tex", create=True)


@pytest.mark.parametrize("name", ["FORMAT", "EPOCH"])
def test_a_damaged_directory_is_refused_and_never_taken_for_a_new_one(tmp_path, name):
    StateDirectory.open(tmp_path, create=True).close()
    whole = (tmp_path / name).read_bytes()
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        (tmp_path / name).write_bytes(flipped)
        with pytest.raises(StateError, match=name):
            StateDirectory.open(tmp_path, create=True)
    for stop in range(0, len(whole), 7):
        (tmp_path / name).write_bytes(whole[:stop])
        with pytest.raises(StateError, match=name):
            StateDirectory.open(tmp_path, create=True)
    (tmp_path / name).unlink()
    with pytest.raises(StateError, match=name):
        StateDirectory.open(tmp_path, create=True)


def test_a_directory_that_lost_both_is_refused_while_it_holds_anything(tmp_path):
    with StateDirectory.open(tmp_path, create=True) as opened:
        (opened.journal / "00000000-after-0.journal").write_bytes(b"x")
    (tmp_path / "FORMAT").unlink()
    (tmp_path / "EPOCH").unlink()
    with pytest.raises(StateError, match="it has no FORMAT"):
        StateDirectory.open(tmp_path, create=True)


def test_what_a_crash_left_of_small_files_is_removed(tmp_path):
    StateDirectory.open(tmp_path, create=True).close()
    (tmp_path / ".EPOCH.7.tmp").write_bytes(b"half")
    StateDirectory.open(tmp_path, create=False).close()
    assert not (tmp_path / ".EPOCH.7.tmp").exists()


def test_a_disk_that_refuses_takes_no_epoch_and_holds_no_lock(tmp_path, monkeypatch):
    StateDirectory.open(tmp_path, create=True).close()
    struck = []

    def refuse(fd):
        struck.append(fd)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("psq.durable.files.os.fsync", refuse)
        with pytest.raises(StateError, match="No space left on device; free some space"):
            StateDirectory.open(tmp_path, create=False)
    assert struck
    with StateDirectory.open(tmp_path, create=False) as opened:
        assert opened.epoch == 2


def test_closing_twice_closes_nothing_else(tmp_path):
    opened = StateDirectory.open(tmp_path, create=True)
    opened.close()
    with StateDirectory.open(tmp_path, create=False):
        opened.close()
        with pytest.raises(StateError, match="another process"):
            StateDirectory.open(tmp_path, create=False)

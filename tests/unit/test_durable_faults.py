"""Checkpoints on disks that refuse, cut or spoil; which ones are used, and which may go."""

import errno
import os
import shutil

import numpy as np
import pytest
from durable_life import memory_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from psq.durable.checkpoint import (
    current,
    list_checkpoints,
    load_checkpoint,
    open_checkpoint,
    verify,
    write_checkpoint,
)
from psq.durable.retention import load_newest, prune
from psq.errors import StateError, UsageError

ARRAYS = {"x": np.arange(300, dtype=np.float32), "counts": np.arange(5), "none": np.zeros(0)}


def write(folder, *versions):
    paths = [
        write_checkpoint(folder, version, {"x": np.full(50, version, "f4")}, {"v": version})
        for version in versions
    ]
    return paths[-1] if len(paths) == 1 else paths


def flip(path, at=0):
    data = bytearray(path.read_bytes())
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)


def versions(folder):
    return [one.version for one in list_checkpoints(folder)]


# ---- every byte counts


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("whole"), 1, ARRAYS, {"v": [1, b"x"]})


@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found(whole, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flipped") / whole.name
    shutil.copytree(whole, path)
    sizes = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
    name = data.draw(st.sampled_from([name for name, size in sizes.items() if size]))
    flip(path / name, data.draw(st.integers(0, 8 * sizes[name] - 1), "bit"))
    assert len(verify(path)) >= 1
    with pytest.raises(StateError, match="damaged"):
        load_checkpoint(path)


@given(data=st.data())
def test_a_file_cut_or_lengthened_anywhere_is_found(whole, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / whole.name
    shutil.copytree(whole, path)
    name = data.draw(st.sampled_from(sorted(file.name for file in path.iterdir())))
    size = (path / name).stat().st_size
    change = data.draw(st.integers(-size, 5).filter(bool), "bytes")
    os.truncate(path / name, size + change)
    assert verify(path)


@pytest.mark.parametrize("name", ["manifest.json", "meta.msgpack", "arrays-00000.bin"])
def test_a_missing_file_is_found(tmp_path, name):
    path = write(tmp_path, 1)
    (path / name).unlink()
    assert name in verify(path)[0]
    with pytest.raises(StateError, match="none of the 1 checkpoints"):
        load_newest(tmp_path)


def test_memory_holds_no_values_of_a_damaged_array(tmp_path):
    path = write(tmp_path, 1)
    flip(path / "arrays-00000.bin", 77)
    with pytest.raises(StateError, match="array 'x' is not what was written"):
        open_checkpoint(path).read("x")


# ---- which one is used


def test_the_newest_valid_checkpoint_is_used_and_the_others_are_named(tmp_path):
    assert load_newest(tmp_path) is None
    write(tmp_path, 1, 2, 3, 4)
    paths = {one.version: one.path for one in list_checkpoints(tmp_path)}
    flip(paths[4] / "arrays-00000.bin")
    (paths[3] / "manifest.json").unlink()
    loaded = load_newest(tmp_path)
    assert (loaded.version, loaded.meta, loaded.arrays["x"][0]) == (2, {"v": 2}, 2)
    assert len(loaded.skipped) == 2
    assert "arrays-00000.bin is damaged" in loaded.skipped[0]
    assert load_newest(tmp_path, before=2).version == 1
    assert load_newest(tmp_path, before=1) is None


def test_no_valid_one_of_some_is_an_error_and_no_fresh_start(tmp_path):
    for path in write(tmp_path, 1, 2):
        flip(path / "manifest.json")
    with pytest.raises(StateError, match="none of the 2 checkpoints in"):
        load_newest(tmp_path)


@pytest.mark.parametrize("text", [b"", b"checkpoint-", b"../../etc\nxxh3_128 0\n"])
def test_a_torn_pointer_is_said_and_hinders_nobody(tmp_path, text):
    path = write(tmp_path, 1)
    (tmp_path / "CURRENT").write_bytes(text)
    with pytest.raises(StateError, match="CURRENT is damaged"):
        current(tmp_path)
    assert load_newest(tmp_path).checkpoint.path == path
    newer = write(tmp_path, 2)
    assert current(tmp_path) == newer


def test_what_was_begun_and_not_finished_is_no_checkpoint(tmp_path):
    path = write(tmp_path, 1)
    shutil.copytree(path, tmp_path / ".tmp-2")
    assert versions(tmp_path) == [1]
    write(tmp_path, 3)
    assert not (tmp_path / ".tmp-2").exists()


# ---- pruning


def test_pruning_keeps_the_newest_and_removes_the_oldest_first(tmp_path):
    write(tmp_path, 1, 2, 3, 4, 5)
    pruned = prune(tmp_path, 3)
    assert [path.name[:31] for path in pruned.removed] == [
        "checkpoint-00000000000000000001",
        "checkpoint-00000000000000000002",
    ]
    assert versions(tmp_path) == [5, 4, 3]
    assert pruned.oldest_version == 3
    assert prune(tmp_path, 3).removed == ()


@settings(max_examples=30)
@given(rotten=st.sets(st.integers(1, 7)), keep=st.integers(2, 4))
def test_pruning_never_takes_one_of_the_newest_valid_ones(rotten, keep):
    valid = [version for version in range(7, 0, -1) if version not in rotten]
    with memory_folder() as folder:
        paths = write(folder, *range(1, 8))
        for version in rotten:
            flip(paths[version - 1] / "arrays-00000.bin", 8 * version)
        pruned = prune(folder, keep)
        assert [v for v in versions(folder) if v not in rotten][:keep] == valid[:keep]
    if len(valid) < keep:
        assert pruned.removed == ()
    else:
        assert pruned.oldest_version == valid[keep - 1]


def test_fewer_than_two_are_never_kept(tmp_path):
    for keep in (1, 0, -1):
        with pytest.raises(UsageError, match="at least 2 checkpoints are kept"):
            prune(tmp_path, keep)


def test_a_quick_pruning_sees_sizes_and_manifests_only(tmp_path):
    paths = write(tmp_path, 1, 2, 3, 4)
    (paths[3] / "arrays-00000.bin").write_bytes(b"short")
    prune(tmp_path, 2, thorough=False)
    assert versions(tmp_path) == [4, 3, 2]


# ---- disks that refuse


@pytest.mark.parametrize("call", ["writev", "fsync"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_disk_that_refuses_leaves_what_was_there(tmp_path, monkeypatch, call, code, nth):
    kept = write(tmp_path, 1)
    real, calls = getattr(os, call), []

    def refuse(*args):
        calls.append(args)
        if len(calls) == nth:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(f"psq.durable.files.os.{call}", refuse)
    with pytest.raises(StateError, match=os.strerror(code)):
        write_checkpoint(tmp_path, 2, ARRAYS, {})
    assert len(calls) == nth
    monkeypatch.undo()
    assert load_newest(tmp_path).version == 1
    assert current(tmp_path) == kept
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["CURRENT", kept.name]
    assert load_checkpoint(write_checkpoint(tmp_path, 2, ARRAYS, {}))[1] == {}


def test_a_disk_that_refuses_to_be_read_passes_to_the_one_before(tmp_path, monkeypatch):
    write(tmp_path, 1, 2)
    real, struck = os.readv, []

    def refuse(fd, buffers):
        if not struck:
            struck.append(fd)
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers)

    monkeypatch.setattr("psq.durable.checkpoint.os.readv", refuse)
    loaded = load_newest(tmp_path)
    assert struck
    assert loaded.version == 1
    assert "Input/output error; the disk itself failed" in loaded.skipped[0]

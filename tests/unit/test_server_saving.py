from __future__ import annotations

import numpy as np
import pytest
from safetensors import safe_open

from psq.errors import StateError
from psq_server.saving import check_writable, free_bytes, save_weights

WEIGHTS = {"fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(1, np.float32)}


def test_saved_weights_are_read_back_with_what_was_said_of_them(tmp_path):
    path = tmp_path / "w.safetensors"
    size_bytes = save_weights(path, WEIGHTS, {"version": "7"})
    assert path.stat().st_size == size_bytes
    with safe_open(path, "numpy") as opened:
        assert opened.metadata() == {"version": "7"}
        assert all(np.array_equal(opened.get_tensor(name), w) for name, w in WEIGHTS.items())


def test_saving_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")
    save_weights(path, WEIGHTS, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_disk_that_refuses_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")
    struck = []

    def refuse(handle):
        struck.append(handle)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("psq_server.saving.os.fsync", refuse)
    with pytest.raises(StateError, match="No space left on device"):
        save_weights(path, WEIGHTS, {})
    assert struck
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_place_that_cannot_be_written_is_refused_beforehand(tmp_path):
    check_writable(tmp_path / "w.safetensors")
    with pytest.raises(StateError, match="there is no folder"):
        check_writable(tmp_path / "none" / "w.safetensors")
    with pytest.raises(StateError, match="it is a folder"):
        check_writable(tmp_path)


def test_what_is_free_is_that_of_the_files_own_disk(tmp_path):
    free = free_bytes(tmp_path / "w")
    assert free is not None
    assert free > 0
    assert free_bytes(tmp_path / "gone" / "w") is None

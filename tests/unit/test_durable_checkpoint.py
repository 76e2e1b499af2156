import numpy as np
import pytest

from psq.durable.checkpoint import (
    current,
    list_checkpoints,
    load_checkpoint,
    open_checkpoint,
    verify,
    write_checkpoint,
)
from psq.errors import StateError, UsageError

RNG = np.random.default_rng(0)
ARRAYS = {
    "x": RNG.standard_normal(1000, np.float32),
    "counts": np.arange(6, dtype=np.int64).reshape(2, 3),
    "mask": np.array([True, False]),
    "half": np.ones((2, 2), np.float16),
    "codes": np.arange(256, dtype=np.uint8),
    "one": np.array(2.5),
    "none": np.zeros((0, 4), np.float32),
    "größe/x[0:3]": np.zeros(3, np.uint32),
}
META = {"version": 7, 3: [1, 2], "payload": b"\x00\xff", "deep": {"a": None, "b": 1 << 63}}


def same(loaded, expected):
    assert list(loaded) == list(expected)
    for name, array in expected.items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].shape == array.shape
        assert loaded[name].tobytes() == array.tobytes()
    return True


def test_a_checkpoint_gives_back_every_byte_type_and_shape(tmp_path):
    path = write_checkpoint(tmp_path, 7, ARRAYS, META)
    arrays, meta = load_checkpoint(path)
    assert same(arrays, ARRAYS)
    assert meta == META
    arrays["x"][0] = 1  # writable: they are the caller's own
    assert verify(path) == ()
    assert current(tmp_path) == path
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["CURRENT", path.name]


def test_one_array_is_read_into_memory_that_is_there(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, 1, ARRAYS, {}))
    out = np.zeros(1000, np.float32)
    assert checkpoint.read("x", out) is out
    assert np.array_equal(out, ARRAYS["x"])
    for wrong in (np.zeros(999, np.float32), np.zeros(1000, np.int32), np.zeros(2000, "f4")[::2]):
        with pytest.raises(UsageError, match="the buffer for it is"):
            checkpoint.read("x", wrong)
    with pytest.raises(UsageError, match="has no array 'y'"):
        checkpoint.read("y")


def test_checkpoints_are_listed_newest_first_and_one_version_may_have_two(tmp_path):
    for version in (3, 20, 20, 100):
        write_checkpoint(tmp_path, version, {}, {})
    listed = list_checkpoints(tmp_path)
    assert [(one.version, one.serial) for one in listed] == [(100, 0), (20, 1), (20, 0), (3, 0)]
    assert list_checkpoints(tmp_path / "none") == []


def test_arrays_are_asked_for_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("psq.durable.checkpoint.MAX_FILE_BYTES", 400)
    alive = []

    class Lazy(dict):
        def __getitem__(self, name):
            alive.append(name)
            return super().__getitem__(name)

    arrays = Lazy({str(i): np.full(50, i, np.float32) for i in range(7)})
    path = write_checkpoint(tmp_path, 1, arrays, {})
    assert alive == list(arrays)
    assert len(list(path.glob("arrays-*.bin"))) == 4, "two arrays a file"
    assert same(load_checkpoint(path)[0], dict(arrays))


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path):
    for array in (np.array([None]), np.array(["text"]), np.zeros(3, ">f4"), np.zeros(2, "M8[s]")):
        with pytest.raises(UsageError, match="array 'x' has dtype"):
            write_checkpoint(tmp_path, 1, {"x": array}, {})
    with pytest.raises(UsageError, match="what msgpack can say"):
        write_checkpoint(tmp_path, 1, {}, {"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_strided_array_is_saved_as_its_values(tmp_path):
    path = write_checkpoint(tmp_path, 1, {"t": ARRAYS["counts"].T}, {})
    assert np.array_equal(load_checkpoint(path)[0]["t"], ARRAYS["counts"].T)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(StateError, match="name a folder that is there"):
        load_checkpoint(tmp_path / "checkpoint-00000000000000000001-0000")

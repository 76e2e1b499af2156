from __future__ import annotations

import numpy as np
import pytest
from safetensors import safe_open

from psq.errors import StateError
from psq.plan import Plan
from psq.presets import preset
from psq_server.reduce import Reducer
from psq_server.saving import (
    check_writable,
    free_bytes,
    merge,
    metadata_of,
    part_path,
    save_weights,
)

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


# ---- parts


SPECS = [("table[0:3]", (300, 100)), ("scale", ()), ("head", (70, 9))]


@pytest.fixture
def parts(tmp_path):
    """What two servers saved of a model of random weights: (paths, weights by name)."""
    plan = Plan.of(SPECS, preset("fp32"), 1, servers=2)
    x = np.random.default_rng(1).standard_normal(plan.layout.numel, np.float32)
    paths = []
    for server in (0, 1):
        mine = plan.for_server(server)
        reducer = Reducer(mine)
        for shard in mine.owned:
            reducer.init(shard.index, 0, x[shard.offset : shard.offset + shard.numel].tobytes())
        path = part_path(tmp_path / "w.safetensors", server, 2)
        save_weights(path, reducer.weights(), metadata_of(mine, bytes(16), 7 + server))
        paths.append(path)
    tensors = {t.name: x[t.offset : t.offset + t.numel] for t in plan.layout.tensors}
    return paths, {name: tensors[name].reshape(shape) for name, shape in SPECS}


def test_each_server_saves_under_its_own_name(parts):
    paths, _ = parts
    names = ["w.server0-of-2.safetensors", "w.server1-of-2.safetensors"]
    assert [path.name for path in paths] == names
    assert part_path(paths[0], 0, 1) == paths[0]


def test_parts_in_any_order_become_the_whole_with_names_and_shapes(parts, tmp_path):
    paths, weights = parts
    out = tmp_path / "merged.safetensors"
    size_bytes = merge(paths[::-1], out)
    assert out.stat().st_size == size_bytes
    with safe_open(out, "numpy") as opened:
        assert set(opened.keys()) == set(weights)
        for name, expected in weights.items():
            got = opened.get_tensor(name)
            assert got.shape == expected.shape
            assert got.tobytes() == expected.tobytes()
        assert opened.metadata()["version"] == "7..8"
        assert opened.metadata()["recipe"] == "fp32"


def spoil_metadata(paths, **changes):
    with safe_open(paths[1], "numpy") as opened:
        weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        metadata = {**opened.metadata(), **changes}
    save_weights(paths[1], weights, metadata)


def lose_a_slice(paths):
    with safe_open(paths[1], "numpy") as opened:
        weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    del weights[next(iter(weights))]
    save_weights(paths[1], weights, metadata)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda paths: paths.pop(), "expected one part of each of 2 servers, got those of"),
        (lambda paths: paths.__setitem__(1, paths[0]), "one part of each of 2 servers"),
        (lambda paths: paths.clear(), "no parts to merge"),
        (lambda paths: paths[1].unlink(), "cannot read weights from"),
        (lambda paths: paths[1].write_bytes(b"rubbish"), "cannot read weights from"),
        (lambda paths: spoil_metadata(paths, job="other"), "its job is other"),
        (lambda paths: save_weights(paths[1], WEIGHTS, {}), "is no part of a job's weights"),
        (lambda paths: spoil_metadata(paths, server="one"), "its server is 'one', no number"),
        (
            lambda paths: [spoil_metadata(p[::-1], shapes="[") for p in (paths, paths[::-1])],
            "shapes",
        ),
        (lose_a_slice, "do not make up the whole of"),
    ],
)
def test_parts_that_do_not_make_a_whole_are_refused_and_nothing_is_written(
    parts, tmp_path, spoil, words
):
    paths, _ = parts
    spoil(paths)
    out = tmp_path / "merged.safetensors"
    with pytest.raises(StateError, match=words):
        merge(paths, out)
    assert not out.exists()


def test_a_part_is_never_overwritten_by_the_whole(parts):
    paths, _ = parts
    before = paths[0].read_bytes()
    with pytest.raises(StateError, match="is one of the parts"):
        merge(paths, paths[0])
    assert paths[0].read_bytes() == before

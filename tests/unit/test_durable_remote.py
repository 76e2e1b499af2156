"""Copies of checkpoints at URLs; s3:// is tried against a server of its own, in this process."""

import json
import logging
from http.client import HTTPConnection

import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from psq.durable.checkpoint import list_checkpoints, load_checkpoint, verify, write_checkpoint
from psq.durable.remote import (
    CALL_S,
    SLOWEST_BYTES_S,
    _limit,
    copy_checkpoint,
    fetch_checkpoint,
    is_url,
    list_remote,
)
from psq.errors import ConfigError, StateError

ARRAYS = {"x": np.arange(50_000, dtype=np.float32), "count": np.array(7)}
BUCKET = "checkpoints"


@pytest.fixture(scope="module")
def s3():
    """The address of a server that speaks S3."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection = HTTPConnection(host, port)
    connection.request("PUT", f"/{BUCKET}")
    assert connection.getresponse().status == 200
    connection.close()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["file", "memory", "s3"])
def url(request, tmp_path, monkeypatch):
    """A folder that is empty, on each kind of storage."""
    if request.param == "s3":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3"))
        fsspec.get_filesystem_class("s3").clear_instance_cache()
    place = {"file": str(tmp_path / "far"), "memory": "", "s3": BUCKET}[request.param]
    yield f"{request.param}://{place}/{tmp_path.name}"
    if request.param == "s3":
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def near(tmp_path):
    (tmp_path / "near").mkdir()
    return tmp_path / "near"


def stored(url):
    return fsspec.core.url_to_fs(url)


def test_a_copy_comes_back_byte_for_byte(url, near, tmp_path):
    assert list_remote(url) == []
    path = write_checkpoint(near, 7, ARRAYS, {"v": 7})
    copied = copy_checkpoint(path, url)
    assert copied == f"{url}/{path.name}"
    write_checkpoint(near, 12, {}, {})
    later = copy_checkpoint(list_checkpoints(near)[0].path, f"{url}/")
    assert list_remote(url) == [later, copied]
    (tmp_path / "back").mkdir()
    back = fetch_checkpoint(copied, tmp_path / "back")
    arrays, meta = load_checkpoint(back)
    assert meta == {"v": 7}
    assert all(np.array_equal(arrays[name], ARRAYS[name]) for name in ARRAYS)
    assert [one.version for one in list_checkpoints(tmp_path / "back")] == [7]


def test_copying_twice_sends_nothing_and_another_one_of_the_name_is_refused(url, near, tmp_path):
    path = write_checkpoint(near, 7, ARRAYS, {})
    copied = copy_checkpoint(path, url)
    storage, place = stored(copied)
    storage.pipe_file(f"{place}/arrays-00000.bin", b"is not written again")
    assert copy_checkpoint(path, url) == copied
    assert storage.cat_file(f"{place}/arrays-00000.bin") == b"is not written again"
    (tmp_path / "other").mkdir()
    other = write_checkpoint(tmp_path / "other", 7, {}, {})
    with pytest.raises(StateError, match="there is another checkpoint at"):
        copy_checkpoint(other, url)


def test_a_copy_that_was_begun_and_not_finished_is_none(url, near):
    copied = copy_checkpoint(write_checkpoint(near, 7, ARRAYS, {}), url)
    storage, place = stored(copied)
    storage.rm_file(f"{place}/manifest.json")
    assert list_remote(url) == []
    with pytest.raises(StateError, match="cannot reach"):
        fetch_checkpoint(copied, near)
    assert [one.version for one in list_checkpoints(near)] == [7], "nothing came"
    copy_checkpoint(list_checkpoints(near)[0].path, url)
    assert list_remote(url) == [copied]


@pytest.mark.parametrize("name", ["manifest.json", "meta.msgpack", "arrays-00000.bin"])
def test_a_copy_that_was_spoiled_is_not_taken(url, near, tmp_path, name):
    copied = copy_checkpoint(write_checkpoint(near, 7, ARRAYS, {"v": 1}), url)
    storage, place = stored(copied)
    data = bytearray(storage.cat_file(f"{place}/{name}"))
    data[len(data) // 2] ^= 1
    storage.pipe_file(f"{place}/{name}", bytes(data))
    (tmp_path / "back").mkdir()
    with pytest.raises(StateError, match="damaged"):
        fetch_checkpoint(copied, tmp_path / "back")
    assert list((tmp_path / "back").iterdir()) == []


def test_a_copy_cannot_name_files_elsewhere(near, tmp_path):
    path = write_checkpoint(near, 7, ARRAYS, {})
    from psq.durable.digests import read_sealed, sealed  # noqa: PLC0415 - a forger's tools

    manifest = json.loads(read_sealed(path / "manifest.json"))
    manifest["files"][0][0] = "../../escaped"
    (path / "manifest.json").write_bytes(sealed(json.dumps(manifest) + "\n"))
    with pytest.raises(StateError, match="is no manifest of a checkpoint"):
        fetch_checkpoint(f"file://{path}", tmp_path)
    assert not (tmp_path.parent / "escaped").exists()


def test_a_damaged_checkpoint_is_not_copied(url, near):
    path = write_checkpoint(near, 7, ARRAYS, {})
    (path / "arrays-00000.bin").write_bytes(b"")
    with pytest.raises(StateError, match="a damaged checkpoint is not copied"):
        copy_checkpoint(path, url)
    assert verify(path)
    assert list_remote(url) == []


def test_storage_that_is_not_there_is_named(near, s3, monkeypatch):
    path = write_checkpoint(near, 7, ARRAYS, {})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(StateError, match=r"cannot reach s3://no-such-bucket"):
        copy_checkpoint(path, "s3://no-such-bucket/run")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(ConfigError, match=r"install psq-train\[remote\]"):
        copy_checkpoint(path, "unheard-of://bucket/run")


def test_a_path_is_no_url():
    assert not is_url("/var/psq/state")
    assert is_url("s3://bucket/run")


def test_a_store_that_takes_a_limit_gets_one_and_says_when_it_is_over(near, monkeypatch):
    asked = []

    class Hanging:
        async_impl = True

        def exists(self, place, **limit):
            asked.append((place, limit))
            raise TimeoutError

    monkeypatch.setattr("psq.durable.remote._storage", lambda _: (Hanging(), "bucket/run"))
    path = write_checkpoint(near, 1, ARRAYS, {})
    with pytest.raises(StateError, match=r"s3://bucket/run/.* did not answer in time"):
        copy_checkpoint(path, "s3://bucket/run")
    assert [limit for _, limit in asked] == [{"timeout": CALL_S}]


def test_a_store_that_takes_none_gets_none():
    storage, _ = stored("memory://x")
    assert _limit(storage, 1 << 30) == {}
    assert _limit(fsspec.get_filesystem_class("s3")(), 2 * SLOWEST_BYTES_S) == {
        "timeout": CALL_S + 2
    }

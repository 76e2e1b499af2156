"""Copies of checkpoints at URLs: whatever fsspec knows, as s3://bucket/run, file:///mnt/backup.

A copy is the same files in a folder of the same name; the manifest is sent last, so a copy without
one was never finished. What arrives is only taken if every checksum is right. Keys and endpoints
are fsspec's to find, as its page on each kind of storage says; psq reads none.

Needs the extra psq-train[remote]. Never in the way of training: it is slow, and it may fail. Where
a kind of storage takes a limit for a call (fsspec's asynchronous ones do: s3, gs, abfs, http), it
gets one; the others end when they end.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from psq.durable.checkpoint import adopt, parse_name, verify
from psq.durable.files import sync
from psq.durable.manifest import MANIFEST, META, read_manifest
from psq.errors import ConfigError, PsqError, StateError

__all__ = ["check_url", "copy_checkpoint", "fetch_checkpoint", "is_url", "list_remote"]

CALL_S: Final = 60.0
"""How long a store may take for a question, and beyond that for a file of this many bytes a second:
"""
SLOWEST_BYTES_S: Final = 1 << 20


def is_url(text: str) -> bool:
    """Whether this names something that is no path."""
    return "://" in text


def check_url(url: str) -> None:
    """Refuse a URL that nothing here can speak for; whether it can be reached is not looked at.

    Raises:
        ConfigError: as `copy_checkpoint`.
        StateError: whatever that kind of storage says of it.
    """
    with _reaching(url):
        _storage(url)


def copy_checkpoint(path: Path, url: str) -> str:
    """Put a copy of a checkpoint into a folder at a URL.

    Args:
        path: of the checkpoint, which is read to the last byte first.
        url: of the folder.

    Returns:
        The copy's URL. If the same checkpoint is there already, nothing is sent.

    Raises:
        StateError: the checkpoint is damaged, another one of its name is there, or the storage
            refused; a copy that was begun has no manifest.
        ConfigError: fsspec, or what it needs for this kind of URL, is not installed.
    """
    problems = verify(path)
    if problems:
        msg = f"a damaged checkpoint is not copied: {problems[0]}"
        raise StateError(msg)
    manifest = read_manifest(path)
    sizes = {**dict(manifest.files), META: manifest.meta_bytes}
    target = f"{url.rstrip('/')}/{path.name}"
    with _reaching(target):
        storage, place = _storage(target)
        limit = _limit(storage)
        if storage.exists(f"{place}/{MANIFEST}", **limit):
            if storage.cat_file(f"{place}/{MANIFEST}", **limit) == (path / MANIFEST).read_bytes():
                return target
            msg = f"there is another checkpoint at {target}: name another folder"
            raise StateError(msg)
        if place.startswith("/"):  # else it is a bucket's, which has no folders; none is made here
            storage.makedirs(place, exist_ok=True)
        for name, size in sizes.items():
            storage.put_file(str(path / name), f"{place}/{name}", **_limit(storage, size))
            found = storage.info(f"{place}/{name}", **limit)["size"]
            if found != size:
                msg = f"{target}/{name} has {found:,} bytes there, {size:,} were sent: try again"
                raise StateError(msg)
        storage.put_file(str(path / MANIFEST), f"{place}/{MANIFEST}", **limit)
    return target


def list_remote(url: str) -> list[str]:
    """The URLs of the finished checkpoints in a folder at a URL, newest first.

    Raises:
        StateError: the storage refused.
        ConfigError: as `copy_checkpoint`.
    """
    with _reaching(url):
        storage, place = _storage(url.rstrip("/"))
        found = storage.glob(f"{place}/checkpoint-*/{MANIFEST}")
    names = sorted((entry.rsplit("/", 2)[-2] for entry in found), reverse=True)
    return [f"{url.rstrip('/')}/{name}" for name in names if parse_name(name)]


def fetch_checkpoint(url: str, folder: Path) -> Path:
    """Bring a copy back, as a checkpoint in a folder.

    Args:
        url: of the checkpoint's copy.
        folder: of checkpoints; only this process writes there.

    Raises:
        StateError: it is no finished copy, it is damaged, or storage or disk refused; nothing is
            left of it.
        ConfigError: as `copy_checkpoint`.
    """
    source = url.rstrip("/")
    numbers = parse_name(source.rsplit("/", 1)[-1])
    if numbers is None:
        msg = f"{url} is no checkpoint's URL: name one that psq ckpt ls shows"
        raise StateError(msg)

    def fill(temporary: Path) -> None:
        with _reaching(source):
            storage, place = _storage(source)
            _bring(storage, place, MANIFEST, temporary)
            names = [name for name, _ in read_manifest(temporary).files]
            for name in (META, *names):
                _bring(storage, place, name, temporary)
        problems = verify(temporary)
        if problems:
            msg = f"the copy at {source} is damaged: {problems[0]}"
            raise StateError(msg)

    return adopt(folder, numbers[0], fill)


def _bring(storage: Any, place: str, name: str, folder: Path) -> None:
    storage.get_file(f"{place}/{name}", str(folder / name))
    fd = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(fd)
    finally:
        os.close(fd)


def _storage(url: str) -> tuple[Any, str]:
    """What speaks for a URL, and the place it means there."""
    try:
        from fsspec.core import url_to_fs  # noqa: PLC0415 - an extra, and slow to import

        storage, place = url_to_fs(url)
    except (ImportError, ValueError) as error:
        msg = f"{url} cannot be reached: {error}; install psq-train[remote], or name a path"
        raise ConfigError(msg) from error
    storage.invalidate_cache()
    return storage, str(place)


def _limit(storage: Any, nbytes: int = 0) -> dict[str, float]:
    """The argument that bounds a call, for a kind of storage that takes one."""
    takes_one = getattr(storage, "async_impl", False)
    return {"timeout": CALL_S + nbytes / SLOWEST_BYTES_S} if takes_one else {}


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Turn whatever a kind of storage raises in this block into a StateError."""
    try:
        yield
    except PsqError:
        raise
    except TimeoutError as error:
        msg = f"{url} did not answer in time: look at its endpoint, and at the network to it"
        raise StateError(msg) from error
    except Exception as error:  # each kind of storage has errors of its own
        msg = f"cannot reach {url}: {type(error).__name__}: {error}; look at its keys and endpoint"
        raise StateError(msg) from error

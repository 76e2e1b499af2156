"""Bytes to disk so that they are still there after a crash; the only place that calls fsync.

    write_all      all bytes of some buffers, by writev: no copy, short writes go on
    sync           fsync, of a file or a folder
    replace_file   a whole small file: the old one or the new one, never part of one

An fsync that failed proves nothing ever again for that descriptor: Linux marks the pages as clean
though they were not written, and the next fsync says yes. So nobody here retries one: whoever
writes keeps what is not synced, and writes it again to another file.

Interrupted calls are repeated by Python itself (PEP 475). Errors come as OSError from what takes a
descriptor, and as StateError, with path and advice, from what takes a path.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from psq.durable.failpoints import reach
from psq.errors import StateError

__all__ = [
    "Buffer",
    "bytes_of",
    "disk_error",
    "explained",
    "replace_file",
    "sync",
    "sync_folder",
    "write_all",
]

Buffer: TypeAlias = bytes | bytearray | memoryview | NDArray[Any]

MAX_PIECES: Final = 1024
"""Buffers in one writev; POSIX systems take at least 1,024."""
_ADVICE: Final = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there, or ask for a larger quota",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
    errno.EIO: "the disk itself failed: look into the kernel's log, and move the folder elsewhere",
    errno.EROFS: "mount it writable, or name another folder",
    errno.EACCES: "make it writable for this user, or name another folder",
    errno.EPERM: "make it writable for this user, or name another folder",
    errno.ENOENT: "name a folder that is there",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


def bytes_of(piece: Buffer) -> memoryview:
    """The same memory as bytes, whatever shape and type it has; no copy.

    Args:
        piece: C-contiguous.
    """
    if isinstance(piece, np.ndarray):
        return piece.reshape(-1).view(np.uint8).data
    view = memoryview(piece)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def write_all(fd: int, pieces: Iterable[Buffer]) -> int:
    """Write every byte of these buffers, one behind the other.

    Returns:
        How many bytes that were.

    Raises:
        OSError: the disk refused; some of the bytes may have been written.
    """
    left = [view for view in map(bytes_of, pieces) if view.nbytes]
    total = sum(view.nbytes for view in left)
    at = 0
    while at < len(left):
        written = os.writev(fd, left[at : at + MAX_PIECES])
        if written == 0:
            raise OSError(errno.EIO, "the system writes nothing, and does not say why")
        while at < len(left) and written >= left[at].nbytes:
            written -= left[at].nbytes
            at += 1
        if written:
            left[at] = left[at][written:]
    return total


def sync(fd: int) -> None:
    """Return when all that was written to this file is on the disk.

    Raises:
        OSError: it is not; what was written since the last success must be written elsewhere.
    """
    if sys.platform == "darwin":
        import fcntl  # noqa: PLC0415 - where fsync only hands data to the drive

        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def sync_folder(path: Path) -> None:
    """Return when the names in this folder are on the disk.

    Raises:
        OSError: they are not.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, *pieces: Buffer) -> None:
    """Make a file of these bytes, or put it in the place of another one, atomically and durably.

    Raises:
        StateError: the disk refused; unless it was the very last step, the old file is there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained("write", path):
        try:
            _write_new(temporary, pieces)
            reach("files.written")
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        reach("files.replaced")
        sync_folder(path.parent)


def _write_new(path: Path, pieces: Iterable[Buffer]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        write_all(fd, pieces)
        sync(fd)
    finally:
        os.close(fd)


def disk_error(doing: str, path: Path, error: OSError) -> StateError:
    """What the system said of a path, as an error that also says what to do."""
    advice = _ADVICE.get(error.errno or 0, "look at the folder and its disk")
    return StateError(f"cannot {doing} {path}: {error.strerror or error}; {advice}")


@contextlib.contextmanager
def explained(doing: str, path: Path) -> Iterator[None]:
    """Turn an OSError in this block into a StateError that names the path.

    Raises:
        StateError: in its place.
    """
    try:
        yield
    except OSError as error:
        raise disk_error(doing, path, error) from error

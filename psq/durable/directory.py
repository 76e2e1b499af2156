"""A state directory: what one server (or one worker) keeps between two lives.

    FORMAT         sealed text: the format's number and the run; written once, last of all
    EPOCH          sealed text: how many times it was opened; on disk before `open` returns
    LOCK           an exclusive flock, held as long as the directory is open; the holder's pid in it
    checkpoints/   see psq.durable.checkpoint
    journal/       see psq.durable.journal

Invariants: an epoch is never given twice; nobody else has the directory open; a directory that was
damaged is never taken for a new one. The lock ends with the process, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from psq.durable.digests import read_sealed, sealed
from psq.durable.failpoints import reach
from psq.durable.files import explained, replace_file, sync_folder
from psq.errors import StateError

__all__ = ["FORMAT", "RUN_ID_BYTES", "StateDirectory", "is_state_directory"]

FORMAT: Final = 1
RUN_ID_BYTES: Final = 16
MAX_EPOCH: Final = (1 << 32) - 1
_PID_BYTES: Final = 32
_FORMAT: Final = "FORMAT"
_EPOCH: Final = "EPOCH"
_LOCK: Final = "LOCK"
_EPOCH_0: Final = "epoch 0\n"


class _Lock:
    """An exclusive flock on a directory's LOCK, which also has our pid.

    Raises:
        StateError: another process holds it, or the disk refused.
    """

    def __init__(self, path: Path) -> None:
        place = path / _LOCK
        with explained("lock", place), contextlib.ExitStack() as stack:
            fd = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            stack.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, _PID_BYTES, 0).decode("ascii", "replace").strip()
                msg = (
                    f"{path} is open in another process (pid {holder or 'unknown'}): one directory "
                    "serves one process; stop that one, or name another directory"
                )
                raise StateError(msg) from None
            os.pwrite(fd, f"{os.getpid()}\n".encode().rjust(_PID_BYTES), 0)
            self._release = stack.pop_all()

    def close(self) -> None:
        self._release.close()


@dataclass(frozen=True, slots=True)
class StateDirectory:
    """A directory that is open, and ours alone.

    Attributes:
        path: where it is.
        run_id: 16 bytes, drawn when it was made.
        epoch: how many times it has been opened, this time included.
        created: whether it was made just now.
    """

    path: Path
    run_id: bytes
    epoch: int
    created: bool
    _lock: _Lock

    @classmethod
    def open(cls, path: Path, *, create: bool, run_id: bytes | None = None) -> Self:
        """Lock a directory and count its epoch up.

        Args:
            path: the directory.
            create: make it, if nothing is there.
            run_id: 16 bytes; it must belong to this run, or gets it when made. None: whatever run.

        Raises:
            StateError: it is missing, not one of ours, damaged, of another run or format, open in
                another process, or the disk refused.
        """
        path = path.absolute()
        if run_id is not None and len(run_id) != RUN_ID_BYTES:
            msg = f"a run_id has {RUN_ID_BYTES} bytes, got {len(run_id)}"
            raise StateError(msg)
        _make_or_refuse(path, create=create)
        with contextlib.ExitStack() as stack:
            lock = _Lock(path)
            stack.callback(lock.close)
            _clean(path)
            created = not (path / _FORMAT).exists()
            if created:
                _initialise(path, run_id or secrets.token_bytes(RUN_ID_BYTES), create=create)
            opened = cls(path, _check_run(path, run_id), _count_up(path), created, lock)
            stack.pop_all()
        return opened

    @classmethod
    @contextlib.contextmanager
    def lock(cls, path: Path) -> Iterator[None]:
        """Keep everybody else out of a directory for a while; its epoch stays.

        Raises:
            StateError: it is no state directory, or another process has it open.
        """
        _make_or_refuse(path.absolute(), create=False)
        with contextlib.closing(_Lock(path.absolute())):
            yield

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def journal(self) -> Path:
        """The folder of the journal's segments."""
        return self.path / "journal"

    def close(self) -> None:
        """Let others open it."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_state_directory(path: Path) -> bool:
    """Whether there is a state directory here, damaged or not."""
    return (path / _FORMAT).exists() or (path / _EPOCH).exists()


def _make_or_refuse(path: Path, *, create: bool) -> None:
    """Make sure that there is a folder, and that it is ours or empty."""
    if path.exists() and not path.is_dir():
        msg = f"{path} is a file, and a state directory is a folder: name another one"
        raise StateError(msg)
    if not path.exists():
        if not create:
            msg = f"there is no state directory {path}: name one that is there"
            raise StateError(msg)
        with explained("make", path):
            _make_folder(path)
    if is_state_directory(path):
        return
    with explained("read", path):
        strangers = sorted(e.name for e in path.iterdir() if not _is_leftover(e.name))
    if strangers or not create:
        held = f": it holds {', '.join(strangers[:3])}" if strangers else ": it is empty"
        msg = f"{path} is no state directory{held}; name another one"
        raise StateError(msg)


def _is_leftover(name: str) -> bool:
    """Whether a crash while a directory is made can leave this."""
    return name in {_LOCK, "checkpoints", "journal"} or name.endswith(".tmp")


def _make_folder(path: Path) -> None:
    """Make a folder and those above it, durably."""
    if not path.parent.exists():
        _make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def _initialise(path: Path, run_id: bytes, *, create: bool) -> None:
    """Fill a new directory; FORMAT comes last, and says that all the rest is there."""
    used = any(_has_entries(path / name) for name in ("checkpoints", "journal"))
    if (path / _EPOCH).exists():
        used |= read_sealed(path / _EPOCH) != _EPOCH_0
    if used or not create:
        msg = (
            f"{path} is damaged: it has no {_FORMAT}; take it from a copy of the directory, "
            "or start in another one"
        )
        raise StateError(msg)
    reach("directory.made")
    with explained("make", path):
        for name in ("checkpoints", "journal"):
            (path / name).mkdir(exist_ok=True)
    replace_file(path / _EPOCH, sealed(_EPOCH_0))
    reach("directory.epoch")
    replace_file(
        path / _FORMAT, sealed(f"psq state directory\nformat {FORMAT}\nrun {run_id.hex()}\n")
    )
    reach("directory.format")


def _clean(path: Path) -> None:
    """Remove what a crash left of small files."""
    with explained("clean", path):
        for leftover in path.glob(".*.tmp"):
            leftover.unlink()


def _has_entries(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _check_run(path: Path, expected: bytes | None) -> bytes:
    """The run's id, if this is a directory that we understand and want."""
    lines = read_sealed(path / _FORMAT).splitlines()
    if lines[:2] != ["psq state directory", f"format {FORMAT}"]:
        msg = (
            f"{path} has format {' '.join(lines[:2])!r:.80}, this psq reads format {FORMAT}: "
            "use the psq that made it"
        )
        raise StateError(msg)
    run_id = bytes.fromhex(lines[2].removeprefix("run "))
    if expected not in {None, run_id}:
        msg = (
            f"{path} belongs to run {run_id.hex()}, expected run {(expected or b'').hex()}: "
            "name the directory of this run, or a new one"
        )
        raise StateError(msg)
    return run_id


def _count_up(path: Path) -> int:
    """The next epoch, which is on disk as this returns."""
    text = read_sealed(path / _EPOCH)
    epoch = int(text.removeprefix("epoch ")) + 1
    if epoch > MAX_EPOCH:
        msg = f"{path} has been opened {MAX_EPOCH} times, which is the most: start in another one"
        raise StateError(msg)
    replace_file(path / _EPOCH, sealed(f"epoch {epoch}\n"))
    return epoch

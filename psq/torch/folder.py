"""Where a worker keeps what outlives its process: a folder of the state directory, and fast memory.

    STATE_DIR/worker-2/lock         held while the process lives: two of one rank would spoil it
    STATE_DIR/worker-2/parked/      the fast files as they were when it ended in order
    /dev/shm/psq-UID-.../           the fast files: they outlive the process, not the machine

Where there is no /dev/shm, or no room in it, the fast files lie in the folder itself, and the
kernel writes them to the disk in its own time. A machine that was started anew has lost what is in
memory; then the parked files count, if there are any. Files are this user's own: a folder that
belongs to somebody else is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import shutil
import zlib
from pathlib import Path
from typing import Final

from psq.durable.files import replace_file, sync_folder
from psq.errors import StateError

__all__ = ["WorkerFolder"]

FAST: Final = Path("/dev/shm")  # noqa: S108 - memory that outlives a process
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
CHUNK_BYTES: Final = 1 << 20
_held: Final[set[Path]] = set()  # by this process


class WorkerFolder:
    """See the module's docstring.

    Args:
        state_dir: the job's.
        rank: the worker's.

    Attributes:
        path: the worker's folder.
        fast: the folder of the fast files.

    Raises:
        StateError: another process is this worker, or the folder cannot be used.
    """

    def __init__(self, state_dir: str, rank: int) -> None:
        self.path = _free(Path(state_dir).resolve() / f"worker-{rank}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(
                self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            msg = f"{self.path} cannot be used ({error.strerror}): give another --state-dir"
            raise StateError(msg) from error
        self._lock(rank)
        name = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]
        self._on_disk = self.path / "slots"
        in_memory = os.access(FAST, os.W_OK) and not self._on_disk.exists()
        self.fast = FAST / f"psq-{os.getuid()}-{name}" if in_memory else self._on_disk
        self._parked = self.path / "parked"
        self._open_fast()

    def _lock(self, rank: int) -> None:
        try:
            # This process's own, not its children's: a data loader may outlive a killed worker.
            fcntl.lockf(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            other = os.pread(self._lock_fd, 32, 0).decode(errors="replace").strip()
            os.close(self._lock_fd)
            msg = (
                f"{self.path} is in use by process {other}: it is rank {rank} already; end it, or "
                "give another --state-dir"
            )
            raise StateError(msg) from error
        _held.add(self.path)
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"{os.getpid()}\n".encode(), 0)

    def _open_fast(self) -> None:
        """Have the folder of the fast files, with those of this start of the machine, or parked."""
        boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
        with contextlib.suppress(FileExistsError):
            self.fast.mkdir(mode=0o700)
        found = self.fast.lstat()
        if self.fast.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o022:
            msg = f"{self.fast} is not a folder of this user alone: remove it"
            raise StateError(msg)
        mark = self.fast / "boot"
        if mark.exists() and mark.read_text() == boot:
            return
        for each in self.fast.iterdir():
            each.unlink()
        if self._parked.exists():
            self._unpark()
        mark.write_text(boot)

    def leave_memory(self) -> bool:
        """Have the fast files on the disk, now and for all that come: there is no room in memory.

        Returns:
            False: they are there already.
        """
        if self.fast == self._on_disk:
            return False
        shutil.rmtree(self.fast, ignore_errors=True)
        self.fast = self._on_disk
        self._open_fast()
        return True

    @property
    def slots(self) -> Path:
        """The file of slots."""
        return self.fast / "slots"

    @property
    def copies(self) -> Path:
        """The folder of durable copies."""
        return self.path / "copies"

    def say(self, which: int) -> Path:
        """One of the two files in which the worker says where it stands."""
        return self.fast / f"worker.{which}"

    def park(self) -> None:
        """Copy the fast files to the disk: the machine may be turned off now.

        Raises:
            StateError: they cannot be written.
        """
        fresh = self.path / "parking"
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            fresh.mkdir()
            for source in (self.slots, self.say(0), self.say(1)):
                if source.exists():
                    _copy(source, fresh / source.name)
            sync_folder(fresh)
            shutil.rmtree(self._parked, ignore_errors=True)
            fresh.rename(self._parked)
            sync_folder(self.path)
        except OSError as error:
            msg = f"{fresh}: this worker's state cannot be written ({error.strerror})"
            raise StateError(msg) from error

    def _unpark(self) -> None:
        """Take the parked files; what is damaged is left out, so that nothing goes on from it."""
        for source in sorted(self._parked.iterdir()):
            if source.suffix == ".crc":
                continue
            check = source.with_name(source.name + ".crc")
            target = self.fast / source.name
            if not check.exists() or _copy(source, target, seal=False) != check.read_text():
                target.unlink(missing_ok=True)

    def remove(self) -> None:
        """The job is done: nobody will go on from here."""
        for folder in (self.fast, self._parked, self.copies):
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Let another process be this worker. Safe to call twice."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
            _held.discard(self.path)


def _free(path: Path) -> Path:
    """This folder, or one beside it: a script may have several workers, each with its own."""
    tries = (path.with_name(f"{path.name}-{n}") if n else path for n in itertools.count())
    return next(each for each in tries if each not in _held)


def _copy(source: Path, target: Path, *, seal: bool = True) -> str:
    """Copy a file, synced and with its checksum beside it if it is to be sealed; returns that."""
    crc = 0
    with source.open("rb") as reader, target.open("wb") as writer:
        while data := reader.read(CHUNK_BYTES):
            crc = zlib.crc32(data, crc)
            writer.write(data)
        writer.flush()
        if seal:
            os.fsync(writer.fileno())
    text = f"{crc:08x}"
    if seal:
        replace_file(target.with_name(target.name + ".crc"), text.encode())
    return text

"""Durable copies of a worker's state, one for each checkpoint of a server, written in a thread.

A server says that a version becomes a checkpoint before it says that version's verdict. When the
worker has that version its vectors are copied aside, and written while it goes on computing. Such a
copy is what there is after a machine has lost its memory: whoever begins with the weights of that
very version may go on from it.

At most one copy waits while another is written: a newer one takes its place. What cannot be written
is said once on the log, and training goes on.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from psq.durable.checkpoint import Checkpoint, list_checkpoints, open_checkpoint, write_checkpoint
from psq.durable.digests import xxh3_128
from psq.durable.failpoints import reach
from psq.durable.retention import prune
from psq.errors import StateError

__all__ = ["Copies", "Copy"]

KEPT: Final = 2
END_S: Final = 10.0
"""How long a worker that ends waits for the copy that is being written."""
_log = logging.getLogger("psq.torch")


@dataclass(frozen=True, slots=True)
class Copy:
    """What is to be written.

    Attributes:
        version: of the weights that go with it.
        servers: who made that a checkpoint.
        arrays: copies of the vectors.
        meta: what else there is.
    """

    version: int
    servers: tuple[int, ...]
    arrays: Mapping[str, NDArray[Any]]
    meta: Mapping[str, Any]


class Copies:
    """See the module's docstring.

    Args:
        folder: where they are; made when the first is written.
        rank: for the log.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self._wanted: dict[int, int] = {}
        self._waiting: Copy | None = None
        self._written: deque[tuple[tuple[int, ...], int, int]] = deque(maxlen=KEPT)
        self._wake = threading.Condition()
        self._ended = False
        self._thread: threading.Thread | None = None

    def want(self, server: int, version: int) -> None:
        """A server makes this version a checkpoint."""
        self._wanted[server] = version

    def wanted(self, version: int) -> tuple[int, ...]:
        """The servers that have said so of the version that the worker has now."""
        return tuple(sorted(s for s, wanted in self._wanted.items() if wanted == version))

    def write(self, copy: Copy) -> None:
        """Write it, as soon as the one before is written."""
        with self._wake:
            self._waiting = copy
            self._wake.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="psq-copies", daemon=True)
            self._thread.start()

    def confirm(self, tell: Callable[[int, int, int], None]) -> None:
        """Tell of each copy that is on the disk, as (server, version, digest), once."""
        while self._written:
            servers, version, digest = self._written.popleft()
            for server in servers:
                tell(server, version, digest)

    def found(self) -> list[Checkpoint]:
        """Those that are there, the newest first; damaged ones are named on the log."""
        whole = []
        for each in list_checkpoints(self._folder) if self._folder.exists() else ():
            try:
                whole.append(open_checkpoint(each.path))
            except StateError as error:
                _log.warning("%s is no copy to go on from: %s", each.path, error)
        return whole

    def close(self) -> None:
        """Let the copy that is being written be whole, for `END_S` at most."""
        with self._wake:
            self._ended = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(END_S)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting is not None or self._ended)
                copy, self._waiting = self._waiting, None
            if copy is None:
                return
            try:
                self._write(copy)
            except StateError as error:
                words = "rank %d has no copy of version %d: %s"
                _log.warning(words, self._rank, copy.version, error)

    def _write(self, copy: Copy) -> None:
        reach("keeper.store")
        self._folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(self._folder, copy.version, copy.arrays, copy.meta)
        prune(self._folder, KEPT, thorough=False)
        parts = b"".join(xxh3_128(copy.arrays[name].data) for name in sorted(copy.arrays))
        digest = int.from_bytes(xxh3_128(parts)[:8], "little")
        self._written.append((copy.servers, copy.version, digest))

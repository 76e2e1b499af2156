"""One file of the weights that several servers saved, each its share.

The format of the parts is `psq_server.saving`'s; this module is the only one of the worker's that
looks into the server's package.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from psq_server.saving import merge, part_path
from psq_worker.files import identity

__all__ = ["Parts", "merge_weights"]


def merge_weights(parts: Sequence[Path], output: Path) -> int:
    """Put parts together, in whatever order they are named; returns the file's size in bytes.

    Raises:
        StateError: a part is missing, is none, or belongs to another job; nothing was written.
    """
    return merge(parts, output)


class Parts:
    """The parts that the servers of one job will save, and what lay in their places before.

    Args:
        output: the file that was asked for.
        servers: how many there are.
    """

    def __init__(self, output: Path, servers: int) -> None:
        self._output = output
        self._paths = [part_path(output, number, servers) for number in range(servers)]
        self._before = [identity(path) for path in self._paths]

    def merge(self) -> Path | None:
        """Make one file of them and remove them, if each server has left a new one.

        Returns:
            The file; None where some server has saved nothing.

        Raises:
            StateError: they do not fit together, or the disk refused; they are still there.
        """
        now = [identity(path) for path in self._paths]
        if any(new is None or new == old for new, old in zip(now, self._before, strict=True)):
            return None
        merge_weights(self._paths, self._output)
        for path in self._paths:
            path.unlink()
        return self._output

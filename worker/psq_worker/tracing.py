"""One timeline of a launched job: the parts of its processes, put together when all have ended.

A process that was killed, or that never began, leaves no part: the others are put together without
it. Parts of an earlier job in the same place are told from new ones and left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from psq.timeline import Process, check_writable, part_path
from psq.trace import merge
from psq_worker.files import identity

__all__ = ["TraceParts", "merge_timeline"]


def merge_timeline(parts: Sequence[Path], output: Path) -> int:
    """Put parts together, in whatever order they are named; returns how many events there are.

    Raises:
        StateError: a part is none, or the parts do not belong together; nothing was written.
    """
    check_writable(output)
    return merge(parts, output)


class TraceParts:
    """The parts that the processes of one job will write, and what lay in their places before.

    Args:
        output: the file that was asked for.
        servers: how many processes there are of each kind.
        workers: as above.

    Raises:
        StateError: nothing can be written there.
    """

    def __init__(self, output: Path, servers: int, workers: int) -> None:
        check_writable(output)
        self._output = output
        processes = [Process("server", number) for number in range(servers)]
        processes += [Process("rank", number) for number in range(workers)]
        self._paths = {each.name: part_path(output, each) for each in processes}
        self._before = {name: identity(path) for name, path in self._paths.items()}

    def merge(self) -> list[str] | None:
        """Make one file of the new parts and remove them.

        Returns:
            The names of the processes that have left none; None where no process has left any.

        Raises:
            StateError: they do not fit together, or the disk refused; they are still there.
        """
        new = {
            name: path
            for name, path in self._paths.items()
            if identity(path) not in (None, self._before[name])
        }
        if not new:
            return None
        merge(list(new.values()), self._output)
        for path in new.values():
            path.unlink()
        return [name for name in self._paths if name not in new]

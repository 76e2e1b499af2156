"""Which checkpoints are used, and which may go: the newest valid one, and never fewer than two.

A checkpoint that is damaged counts for nothing: it is passed over when a process starts, and the
reason is handed back, to be said loudly; and it does not stand in for one that is to be kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from psq.durable.checkpoint import (
    TEMPORARY,
    Checkpoint,
    Listed,
    list_checkpoints,
    open_checkpoint,
    verify,
)
from psq.durable.failpoints import reach
from psq.durable.files import explained, sync_folder
from psq.errors import StateError, UsageError

__all__ = ["MIN_KEPT", "Loaded", "Pruned", "load_newest", "prune"]

MIN_KEPT: Final = 2
"""One may rot; then there is the other."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The newest valid checkpoint, in memory, and why newer ones were passed over."""

    checkpoint: Checkpoint
    arrays: dict[str, NDArray[Any]]
    skipped: tuple[str, ...]

    @property
    def meta(self) -> dict[Any, Any]:
        """The checkpoint's."""
        return self.checkpoint.meta

    @property
    def version(self) -> int:
        """The checkpoint's."""
        return self.checkpoint.version


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed, oldest first, and what is left, newest first.

    Attributes:
        oldest_version: of what is left; the journal is needed from there on. None: nothing is left.
    """

    removed: tuple[Path, ...]
    kept: tuple[Path, ...]
    oldest_version: int | None


def load_newest(folder: Path, before: int | None = None) -> Loaded | None:
    """Load the newest checkpoint that is valid.

    Args:
        folder: of checkpoints.
        before: only those of a lower version; None: any.

    Returns:
        It; None if there is none at all.

    Raises:
        StateError: there are some, and all of them are damaged.
    """
    listed = [one for one in list_checkpoints(folder) if before is None or one.version < before]
    skipped: list[str] = []
    for one in listed:
        try:
            checkpoint = open_checkpoint(one.path)
            arrays = checkpoint.read_all()
        except StateError as error:
            skipped.append(str(error))
        else:
            return Loaded(checkpoint, arrays, tuple(skipped))
    if not skipped:
        return None
    msg = (
        f"none of the {len(skipped)} checkpoints in {folder} is valid: {'; '.join(skipped)}; take "
        "the directory from a copy, or start in a new one"
    )
    raise StateError(msg)


def prune(
    folder: Path, keep: int = MIN_KEPT, *, thorough: bool = True, spared: Collection[Path] = ()
) -> Pruned:
    """Remove what is older than the newest `keep` valid checkpoints; nothing, if there are fewer.

    Args:
        folder: of checkpoints; only this process writes there.
        keep: how many, 2 or more.
        thorough: read those that are to be kept to the last byte before anything goes; otherwise
            only their manifests, metas and sizes are looked at.
        spared: not removed now, though they are too many: somebody reads them.

    Raises:
        UsageError: fewer than two were to be kept.
        StateError: the disk refused; what was removed so far is gone, oldest first.
    """
    if keep < MIN_KEPT:
        msg = f"at least {MIN_KEPT} checkpoints are kept, got {keep}"
        raise UsageError(msg)
    listed = list_checkpoints(folder)
    stop = _after_valid(listed, keep, thorough=thorough) if len(listed) > keep else None
    left = listed[:stop]
    old = [one.path for one in reversed(listed[len(left) :])]
    removed = [path for path in old if path not in spared]
    for path in removed:
        _remove(path)
    kept = tuple(one.path for one in left)
    return Pruned(tuple(removed), kept, left[-1].version if left else None)


def _after_valid(listed: list[Listed], keep: int, *, thorough: bool) -> int | None:
    """The place behind the newest `keep` valid ones; None if there are fewer."""
    valid = 0
    for place, one in enumerate(listed):
        valid += _is_valid(one.path, thorough=thorough)
        if valid == keep:
            return place + 1
    return None


def _is_valid(path: Path, *, thorough: bool) -> bool:
    if thorough:
        return not verify(path)
    try:
        open_checkpoint(path)
    except StateError:
        return False
    return True


def _remove(path: Path) -> None:
    """Take a checkpoint's name away, then its files: no half of one ever has the name."""
    dying = path.with_name(f"{TEMPORARY}removed-{path.name}")
    with explained("remove", path):
        reach("checkpoint.prune")
        path.rename(dying)
        sync_folder(path.parent)
        reach("checkpoint.pruned")
        shutil.rmtree(dying)

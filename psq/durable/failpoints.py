"""Places where a test may kill this process, as a crash would: SIGKILL, nothing is cleaned up.

    PSQ_FAILPOINT="journal.fsync:3"      this process dies as it reaches that place the third time

The variable is read once, when this module is imported, since a process that is to die at its
first write has no command line of its own to say so. Where it is unset, `reach` is one look into an
empty dictionary. Every place has its name in `NAMES`, and one that is not there is refused, so a
test cannot wait for a fault that never strikes.
"""

from __future__ import annotations

import os
import signal
from typing import Final

from psq.errors import ConfigError

__all__ = ["FAILPOINT_ENV", "NAMES", "reach"]

FAILPOINT_ENV: Final = "PSQ_FAILPOINT"
NAMES: Final = frozenset(
    {
        "checkpoint.array",  # one array is written, not synced
        "checkpoint.file",  # a file of arrays is synced
        "checkpoint.manifest",  # all but the manifest is there
        "checkpoint.rename",  # everything is synced under a temporary name
        "checkpoint.renamed",  # it has its name, the folder is not synced
        "checkpoint.current",  # CURRENT names it
        "checkpoint.prune",  # one is about to be removed
        "checkpoint.pruned",  # one lost its name, its files are still there
        "commit.durable",  # the journal says that a round is durable, the loop does not know yet
        "commit.keep",  # a server's checkpoint is about to be written
        "commit.kept",  # it is there, nobody knows
        "commit.record",  # a record is about to be handed to the journal
        "commit.released",  # what waited for a round has left
        "commit.sync",  # a round's records are handed over, and not asked for
        "directory.made",  # an empty folder, locked
        "directory.epoch",  # a new directory has an epoch, and no FORMAT yet
        "directory.format",  # it has both
        "files.written",  # a small file is synced under a temporary name
        "files.replaced",  # it has its name, the folder is not synced
        "journal.append",  # records are about to be written
        "journal.written",  # they are, nothing is synced
        "journal.fsync",  # fsync is about to be called
        "journal.synced",  # it said yes, nobody knows
        "journal.marked",  # the segment says so, its writer does not know yet
        "journal.segment",  # a new segment's file is there, and empty
        "journal.segment_written",  # it has a header, the folder is not synced
        "journal.prune",  # a segment is about to be removed
        "keeper.copy",  # a worker's shard is in its other slot, which does not count yet
        "keeper.flip",  # that slot counts, nothing was sent
        "keeper.sent",  # the shard was given to the link
        "keeper.settle",  # refused shards are about to be kept with what came back to them
        "keeper.close",  # a round is over, and the worker does not say so yet
        "keeper.closed",  # it says so, its weights are of the round before
        "keeper.weights",  # part of a shard's weights is copied
        "keeper.store",  # a durable copy is about to be written
        "recovery.loaded",  # a server has read its checkpoint
        "recovery.replayed",  # and its journal
        "recovery.round",  # a round is about to be taken again
        "recovery.served",  # the server that came back is about to listen
    }
)


def _parse(text: str) -> dict[str, int]:
    """What the variable asks for, as {name: how many times it may still be reached}."""
    if not text:
        return {}
    name, _, count = text.rpartition(":")
    if name not in NAMES or not count.isdecimal() or int(count) < 1:
        msg = (
            f"{FAILPOINT_ENV}={text!r}: expected NAME:N with N from 1 on and a NAME of "
            f"{', '.join(sorted(NAMES))}; unset it, unless this process is to die there"
        )
        raise ConfigError(msg)
    return {name: int(count)}


_armed: Final = _parse(os.environ.get(FAILPOINT_ENV, ""))


def reach(name: str) -> None:
    """Die here, if this is where and when this process was told to."""
    if not _armed:
        return
    assert name in NAMES, f"{name} is not in NAMES"  # noqa: S101 - our own mistake
    if name in _armed:
        _armed[name] -= 1
        if not _armed[name]:
            os.kill(os.getpid(), signal.SIGKILL)

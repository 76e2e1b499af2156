"""What outlives a process: a locked state directory, a journal, checkpoints. No sockets, no torch.

    directory.py    who may use a folder, and how often it was opened
    journal.py      every record appended is on disk once on_done has said so (writer)
    reader.py       the same records, told apart from a torn tail and from damage
    checkpoint.py   arrays and a meta, all or nothing
    retention.py    which checkpoints are used, and which may go
    export.py       weights for plain PyTorch
    difference.py   what differs between two checkpoints
    remote.py       copies at URLs
    failpoints.py   where tests kill a process

What is promised, and how files are laid out, is in docs/reliability.md.
"""

from __future__ import annotations

from psq.durable.directory import StateDirectory
from psq.durable.failpoints import reach
from psq.durable.journal import Journal, JournalFullError, prune_journal
from psq.durable.reader import JournalReader, Record, TornTail, read_journal

__all__ = [
    "Journal",
    "JournalFullError",
    "JournalReader",
    "Record",
    "StateDirectory",
    "TornTail",
    "prune_journal",
    "reach",
    "read_journal",
]

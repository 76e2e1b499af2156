"""Words about what a server did not apply: of the first time, and then once in so many rounds."""

from __future__ import annotations

from collections import deque
from typing import Final

from psq.client.waits import name_shards
from psq.seldom import Seldom
from psq_proto.messages import Verdict

__all__ = ["NOTE_ROUNDS", "Rejections"]

NOTE_ROUNDS: Final = 100
"""Rounds from one note to the next: some rules refuse honest messages all the time."""


class Rejections:
    """Counts them for one worker.

    Args:
        notes: where words go.
    """

    def __init__(self, notes: deque[str]) -> None:
        self._notes = notes
        self._seldom = Seldom(NOTE_ROUNDS)

    def note(self, number: int, lost: list[int], verdict: Verdict) -> None:
        """A round was rejected, or these shards of it were."""
        due = self._seldom.note("", number)
        if due is None:
            return
        what = "" if verdict.outcome == "rejected" else f": {name_shards(lost)}"
        more = f" ({due.since} times since this was said last, {due.total} in all)"
        words = f"round {number}{what} rejected: {verdict.reason}"
        self._notes.append(words + more * (due.total > 1))

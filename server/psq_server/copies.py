"""Copies of checkpoints elsewhere, made by a thread of their own: a slow store holds up nobody.

One copy is made at a time, and one waits: the newest checkpoint there is. One that is overtaken
before its turn is not copied, and counted. How long a copy may take is its maker's business
(`psq.durable.remote` has limits where a kind of storage lets it); one that never ends keeps later
copies waiting, and nothing else. What is copied, or is to be, may not be removed (`wanted`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

from psq_server.news import Copied

__all__ = ["SLOW_S", "Copies", "Copy"]

SLOW_S: Final = 60.0
"""A copy that takes longer is mentioned whenever a checkpoint has to wait for it."""

Copy: TypeAlias = Callable[[Path], str]
"""Copies a checkpoint to somewhere else; returns where."""


class Copies:
    """See the module's docstring.

    Args:
        copy: makes one.
        tell: takes what became of each; called in the thread.
        clock: monotonic seconds.

    Attributes:
        counts: by what came of it: "copied", "failed", "overtaken".
    """

    def __init__(
        self,
        copy: Copy,
        tell: Callable[[Copied], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._copy = copy
        self._tell = tell
        self._clock = clock
        self._changed = threading.Condition()
        self._next: tuple[int, Path] | None = None
        self._now: tuple[int, Path] | None = None
        self._since_s = 0.0
        self._is_closing = False
        self.counts = {"copied": 0, "failed": 0, "overtaken": 0}
        self._thread = threading.Thread(target=self._run, name="psq-copy", daemon=True)
        self._thread.start()

    @property
    def wanted(self) -> tuple[Path, ...]:
        """What is being copied, or waits for it."""
        with self._changed:
            return tuple(each[1] for each in (self._now, self._next) if each is not None)

    def offer(self, version: int, path: Path) -> str:
        """Let a checkpoint be copied, in the place of one that waits.

        Returns:
            Whom it overtakes and waits for, in words; empty if neither is worth any.
        """
        words = []
        with self._changed:
            if self._next is not None:
                self.counts["overtaken"] += 1
                words.append(f"version {self._next[0]} is not copied, this one is newer")
            self._next = (version, path)
            self._changed.notify()
            took_s = self._clock() - self._since_s
            if self._now is not None and took_s > SLOW_S:
                words.append(f"the copy of version {self._now[0]} takes {took_s:.0f} s so far")
        return "; ".join(words)

    def close(self, timeout_s: float) -> bool:
        """End the thread once nothing waits; whether it did in this time."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            version, path = taken
            try:
                news = Copied(version, self._copy(path))
            except Exception as error:  # noqa: BLE001 - a thread's edge: the loop hears of all there is
                news = Copied(version, str(error), failed=True)
            with self._changed:
                self._now = None
                self.counts["failed" if news.failed else "copied"] += 1
            self._tell(news)

    def _take(self) -> tuple[int, Path] | None:
        """The next one, as soon as there is one; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._next is not None or self._is_closing)
            self._now, self._next = self._next, None
            self._since_s = self._clock()
            return self._now

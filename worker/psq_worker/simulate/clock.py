"""Virtual time: what is to happen when, in order. Nothing here waits, and no real clock is read.

Two things at the same moment happen in the order in which they were asked for, so a run is a
function of its arguments alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

__all__ = ["Events"]


class Events:
    """A queue of things to happen.

    Attributes:
        now_s: the moment of the one that happens now.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def clock(self) -> float:
        """Now, for whoever wants a function."""
        return self.now_s

    def at(self, when_s: float, action: Callable[[], None]) -> None:
        """Let something happen then; in the past means now, after what was asked for before."""
        moment_s = max(when_s, self.now_s)
        heapq.heappush(self._queue, (moment_s, next(self._numbers), action))

    def turn(self) -> bool:
        """Let the next thing happen; False when there is none."""
        if not self._queue:
            return False
        self.now_s, _, action = heapq.heappop(self._queue)
        action()
        return True

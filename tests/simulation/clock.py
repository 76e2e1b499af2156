"""Virtual time: what is to happen when, and a story of what has happened.

Events at one moment happen in the order in which they were asked for, so a run follows from its
seed alone. A local clock is what one process sees of it: it never goes back, and may jump ahead.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Final

__all__ = ["STORY_LINES", "LocalClock", "Schedule", "Violation"]

STORY_LINES: Final = 60


class Violation(AssertionError):  # noqa: N818 - it is what the program does, not what it raises
    """Something happened that must not."""


class Schedule:
    """See the module's docstring.

    Attributes:
        now_s: the time.
        events: how many have happened.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._asked = 0
        self._story: deque[tuple[float, str, tuple[object, ...]]] = deque(maxlen=STORY_LINES)

    def at(self, when_s: float, what: Callable[[], None]) -> None:
        """Let something happen at a moment; now, if that is past."""
        self._asked += 1
        heapq.heappush(self._heap, (max(when_s, self.now_s), self._asked, what))

    def after(self, delay_s: float, what: Callable[[], None]) -> None:
        """Let something happen after so long."""
        self.at(self.now_s + delay_s, what)

    def step(self) -> bool:
        """Let the next thing happen; False if there is none."""
        if not self._heap:
            return False
        self.now_s, _, what = heapq.heappop(self._heap)
        self.events += 1
        what()
        return True

    def note(self, text: str, *details: object) -> None:
        """Remember something for the story; it is put into words only if it is read."""
        self._story.append((self.now_s, text, details))

    def story(self) -> str:
        """The last things that happened, one a line."""
        return "\n".join(
            f"  {now_s:9.4f}  {text} {' '.join(map(str, details))}".rstrip()
            for now_s, text, details in self._story
        )


class LocalClock:
    """What one machine takes for the time: monotonic, of an origin of its own."""

    def __init__(self, schedule: Schedule, origin_s: float) -> None:
        self._schedule = schedule
        self._ahead_s = origin_s

    def now_s(self) -> float:
        """The time here."""
        return self._schedule.now_s + self._ahead_s

    def jump(self, seconds: float) -> None:
        """This machine slept, or was suspended: its clock has gone on."""
        self._ahead_s += seconds

"""How far a server's clock is from this machine's, told by heartbeats and their answers.

    sent_s          server says clock_s         got_s
      |------------------------|------------------|        offset = clock_s - (sent_s + got_s) / 2

The server read its clock somewhere between `sent_s` and `got_s`, so the offset is wrong by half the
round trip at most. Of all samples the one with the shortest round trip is kept; clocks that drift
apart (some microseconds a second) are not modelled. Answers come in the order of the heartbeats.
Pure: times are arguments. `MAX_UNANSWERED` heartbeats are remembered at most; the answers to those
forgotten give no sample.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

__all__ = ["ClockOffset", "OffsetEstimate"]

MAX_UNANSWERED: Final = 64


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """One sample.

    Attributes:
        offset_s: the server's clock minus this machine's.
        round_trip_s: how long the question and its answer took.
    """

    offset_s: float
    round_trip_s: float


class OffsetEstimate:
    """The best sample of one server's clock.

    Attributes:
        best: that sample; None before the first answer.
    """

    def __init__(self) -> None:
        self.best: ClockOffset | None = None
        self._asked = self._answered = 0
        self._open: deque[tuple[int, float]] = deque(maxlen=MAX_UNANSWERED)

    def restart(self) -> None:
        """The connection is a new one: what was asked before will not be answered."""
        self._asked = self._answered = 0
        self._open.clear()

    def asked(self, sent_s: float) -> None:
        """A heartbeat left, not before `sent_s`."""
        self._open.append((self._asked, sent_s))
        self._asked += 1

    def unseen(self) -> None:
        """An answer came that nobody has looked at."""
        self._take()

    def answered(self, got_s: float, clock_s: float) -> None:
        """An answer came by `got_s`: the server read its clock as `clock_s`."""
        sent_s = self._take()
        if sent_s is None or got_s < sent_s:
            return
        sample = ClockOffset(clock_s - 0.5 * (sent_s + got_s), got_s - sent_s)
        if self.best is None or sample.round_trip_s < self.best.round_trip_s:
            self.best = sample

    def _take(self) -> float | None:
        """When the heartbeat left that an answer just came to; None if that was forgotten."""
        number, self._answered = self._answered, self._answered + 1
        while self._open and self._open[0][0] < number:
            self._open.popleft()
        if not self._open or self._open[0][0] != number:
            return None
        return self._open.popleft()[1]

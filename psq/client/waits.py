"""Waiting with a name and an end: how long until the next try, what to say meanwhile, when to stop.

Pure: the time and the randomness are arguments.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from psq.errors import ConfigError, GaveUpError
from psq_proto.messages import Status

__all__ = ["Backoff", "Patience", "Wait", "name_ranks", "name_shards"]

FIRST_RETRY_S: Final = 0.2
LAST_RETRY_S: Final = 5.0
JITTER: Final = 0.25  # each delay is drawn from +-25 %, so that a herd of workers spreads out
MAX_RANKS_NAMED: Final = 8
MAX_SHARDS_NAMED: Final = 8


@dataclass(frozen=True, slots=True)
class Patience:
    """How a client waits, in seconds.

    Attributes:
        give_up_after_s: the longest one wait (a join, or a round) may take.
        heartbeat_s: between two signs of life.
        report_s: between two words about what is being waited for.
        farewell_s: how long a finished worker waits for the server to take note.
    """

    give_up_after_s: float = 900.0
    heartbeat_s: float = 0.5
    report_s: float = 5.0
    farewell_s: float = 5.0

    def __post_init__(self) -> None:
        """A wait without an end, or a report without a pause, is refused."""
        for name in ("give_up_after_s", "heartbeat_s", "report_s", "farewell_s"):
            if not 0.0 < getattr(self, name) < float("inf"):
                msg = f"{name} must be a positive number of seconds, got {getattr(self, name)!r}"
                raise ConfigError(msg)


class Backoff:
    """Delays between retries: 0.2 s, doubling to 5 s, each jittered."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._delay_s = FIRST_RETRY_S

    def next_s(self) -> float:
        """How long to wait before the next try."""
        delay_s = self._delay_s * self._rng.uniform(1.0 - JITTER, 1.0 + JITTER)
        self._delay_s = min(2.0 * self._delay_s, LAST_RETRY_S)
        return delay_s

    def reset(self) -> None:
        """Begin again with the shortest delay: something worked."""
        self._delay_s = FIRST_RETRY_S


class Wait:
    """One wait: says what it is for every `report_s`, ends after `give_up_after_s`."""

    def __init__(self, now_s: float, patience: Patience) -> None:
        self._started_s = now_s
        self._patience = patience
        self._report_at_s = now_s + patience.report_s

    @property
    def due_s(self) -> float:
        """When `check` must be called again at the latest."""
        return min(self._report_at_s, self._started_s + self._patience.give_up_after_s)

    def waited_s(self, now_s: float) -> float:
        """How long it has taken so far."""
        return now_s - self._started_s

    def check(self, now_s: float, what: str) -> str:
        """The words that are due now; empty when there are none.

        Args:
            now_s: the time, on the clock that the wait began with.
            what: what is being waited for, as in "rank 1 (not heard for 3.2 s)".

        Raises:
            GaveUpError: the wait has lasted too long.
        """
        waited_s = self.waited_s(now_s)
        if waited_s >= self._patience.give_up_after_s:
            msg = (
                f"gave up after {waited_s:.0f} s of waiting for {what}; "
                "--give-up-after sets how long to wait"
            )
            raise GaveUpError(msg)
        if now_s < self._report_at_s:
            return ""
        self._report_at_s = now_s + self._patience.report_s
        return f"waiting for {what} for {waited_s:.0f} s"


def name_ranks(status: Status) -> str:
    """Whom the server waits for, as in "rank 1 (not heard for 3.2 s)"; empty if for nobody."""
    if not status.waiting:
        return ""
    named = [f"{rank} (not heard for {silent_s:.1f} s)" for rank, silent_s in status.waiting]
    more = len(named) - MAX_RANKS_NAMED
    tail = f" and {more} more" if more > 0 else ""
    word = "rank" if len(named) == 1 else "ranks"
    return f"{word} {', '.join(named[:MAX_RANKS_NAMED])}{tail}"


def name_shards(shards: list[int]) -> str:
    """Shards in words, as in "shards 0, 1, 2 and 4 more"."""
    named = ", ".join(map(str, shards[:MAX_SHARDS_NAMED]))
    more = len(shards) - MAX_SHARDS_NAMED
    word = "shard" if len(shards) == 1 else "shards"
    return f"{word} {named}{f' and {more} more' if more > 0 else ''}"

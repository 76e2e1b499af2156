"""The server's log: one line per event, key=value, and never more than a reader can bear.

    2026-01-31T12:00:00Z info event=joined rank=0 world_size=2 host=node-1

A value with a space, a quote or an equals sign is written as a JSON string. Lines beyond
LINES_PER_S (after a burst of BURST) are counted instead, and the next line that passes says how
many: a hostile peer cannot fill a disk by being refused.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Final, TextIO

from psq_server.state.events import Field, Level

__all__ = ["BURST", "LINES_PER_S", "LineLog"]

LINES_PER_S: Final = 20.0
BURST: Final = 200.0
_QUOTED: Final = frozenset(" \"'=\\")


class LineLog:
    """Writes events as lines.

    Args:
        stream: where to; if it breaks, nothing is written any more and nothing fails.
        wall: seconds since 1970, for the reader.
        clock: monotonic seconds, for the limit.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._wall = wall
        self._clock = clock
        self._credit = BURST
        self._credited_s = clock()
        self._suppressed = 0

    def write(self, level: Level, event: str, fields: Mapping[str, Field]) -> None:
        """Write one line, unless there have been too many."""
        now_s = self._clock()
        self._credit = min(BURST, self._credit + (now_s - self._credited_s) * LINES_PER_S)
        self._credited_s = now_s
        if self._credit < 1.0:
            self._suppressed += 1
            return
        self._credit -= 1.0
        suppressed = {"suppressed_lines": self._suppressed} if self._suppressed else {}
        self._suppressed = 0
        pairs = {"event": event, **fields, **suppressed}
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._wall()))
        words = " ".join(f"{key}={_quote(value)}" for key, value in pairs.items())
        with contextlib.suppress(OSError, ValueError):  # the reader of our stderr is gone
            self._stream.write(f"{moment} {level} {words}\n")
            self._stream.flush()


def _quote(value: Field) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if text and text.isprintable() and not _QUOTED.intersection(text):
        return text
    return json.dumps(text)

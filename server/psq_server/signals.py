"""SIGTERM and SIGINT for a loop that sleeps in a poll.

A signal writes a byte into a socket that the loop polls, so it wakes at once, and is handled
between two events. The first asks for an orderly end. A second one ends the process on the spot,
but only if it comes GRACE_S or more after the first: a terminal's Ctrl-C and a launcher that passes
it on are one wish, said twice.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Final, Self

__all__ = ["GRACE_S", "Signals"]

GRACE_S: Final = 0.5
_WATCHED: Final = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """A context in which signals are wishes.

    Args:
        clock: monotonic seconds.
        end: ends the process at once, with an exit code.

    Attributes:
        fd: becomes readable when a signal came.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._clock = clock
        self._end = end
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)  # noqa: FBT003 - the standard library's signature
        self._writer.setblocking(False)  # noqa: FBT003
        self._first_s: float | None = None
        self._wish: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._fd_before = -1
        self.fd = self._reader.fileno()

    def __enter__(self) -> Self:
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self.note) for number in _WATCHED}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._reader.close()
        self._writer.close()

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler itself; Python runs it between two instructions of the main thread."""
        del frame
        now_s = self._clock()
        if self._first_s is None:
            self._first_s, self._wish = now_s, signal.Signals(number).name
        elif now_s - self._first_s >= GRACE_S:
            self._end(128 + number)

    def take(self) -> str | None:
        """The name of the signal that came since the last call, once."""
        try:
            while self._reader.recv(4096):
                pass
        except BlockingIOError:
            pass
        wish, self._wish = self._wish, None
        return wish

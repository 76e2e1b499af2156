"""A thread that keeps saying "alive" while the process computes."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Pulse"]


class Pulse:
    """Calls `beat` every `interval_s` from a daemon thread until stopped.

    `beat` must not block: whoever is at work on the link sends heartbeats by himself.
    """

    def __init__(self, beat: Callable[[], None], interval_s: float) -> None:
        self._beat = beat
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="psq-pulse", daemon=True)

    def start(self) -> None:
        """Begin; the first beat comes after one interval."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait until a beat under way is over. Safe to call twice, or before `start`."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._beat()

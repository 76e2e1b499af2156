"""SIGTERM lets a worker end its step: what it computed is said, then it leaves, with code 0.

    first SIGTERM    between two steps, or within one: the step ends, with its verdict, and the
                     next thing that happens is `Drained`, out of `step`
    after limit_s    the step takes too long: `Drained` at once, wherever the program is; what was
                     said of it and is not complete, the server gives back
    second SIGTERM   SystemExit(143) at once, and a third one ends the process
    no worker yet    as the second one: there is nothing to end

`Drained` is a SystemExit, so `with` blocks and exit handlers run, and the worker says LEAVE: the
server goes on without it, or waits for another in its place.
"""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Final, NoReturn

from psq.errors import ConfigError
from psq.torch.opened import note_ending, opened
from psq.torch.report import LOCAL, StepReport
from psq.torch.worker import Worker, observers

__all__ = ["DRAIN_S", "Drained", "drain_on_sigterm"]

DRAIN_S: Final = 10.0

_log = logging.getLogger("psq.torch")


class Drained(SystemExit):
    """The step is over and the process was told to end: it has nothing left to do."""

    def __init__(self) -> None:
        super().__init__(0)


def drain_on_sigterm(limit_s: float = DRAIN_S) -> None:
    """Let SIGTERM end the step that this process's workers are at, and then the process.

    psq-worker does so by itself; a script that runs under plain python calls this once, in its main
    thread.

    Args:
        limit_s: a step that takes longer is given up.

    Raises:
        ConfigError: not the main thread, or no time at all.
    """
    if threading.current_thread() is not threading.main_thread() or limit_s <= 0:
        msg = f"drain_on_sigterm: expected the main thread and a limit above 0, got {limit_s} s"
        raise ConfigError(msg)
    signal.signal(signal.SIGTERM, _Drain(limit_s).on_signal)


class _Drain:
    """See the module's docstring."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._wanted = self._overdue = False
        self._timer: threading.Timer | None = None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM came, or the timer's."""
        del frame
        workers = [each for each in opened if isinstance(each, Worker) and each.in_this_process]
        if self._overdue:
            self._overdue = False  # what comes next is a person's
            _end()
        self._rest()
        if self._wanted or not workers:
            signal.signal(number, signal.SIG_DFL)
            note_ending("interrupted", "SIGTERM")
            raise SystemExit(128 + number)
        self._wanted = True
        if any(worker.version < 0 for worker in workers):
            _end()  # still joining
        _log.info("told to end: finishing the step, for %g s at most", self._limit_s)
        observers.append(self._on_step)  # the last one, so that all others see the step
        self._timer = threading.Timer(self._limit_s, self._hurry)
        self._timer.daemon = True
        self._timer.start()

    def _on_step(
        self, worker: Worker, report: StepReport, loss: float | None, samples: int
    ) -> None:
        del worker, loss, samples
        if report.reason != LOCAL:
            self._rest()
            _end()

    def _rest(self) -> None:
        """Nobody need be hurried any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _hurry(self) -> None:
        """Interrupt the main thread, whatever it does."""
        self._overdue = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _end() -> NoReturn:
    """End the program; a script whose worker is in no `with` block is not done by that either."""
    note_ending("interrupted", "SIGTERM")
    raise Drained

"""A real server on a virtual link: `psq_server.loop`, turned by events instead of by a poll."""

from __future__ import annotations

import io
from typing import cast

from psq.errors import GaveUpError
from psq.link import ServerLink
from psq_server.line_log import LineLog
from psq_server.loop import Loop
from psq_server.signals import Signals
from psq_server.state import Reduce, ServerState, Settings
from psq_worker.simulate.clock import Events
from psq_worker.simulate.network import ServerPort

__all__ = ["VirtualServer"]


class _NoSignals:
    """Nobody wants this server to end."""

    fd = -1

    def take(self) -> str | None:
        """What was wished: nothing."""
        return None


class _Deaf:
    """An observer that keeps nothing: the simulation's report has all of it."""

    def observe_step(self, duration_s: float) -> None:
        """A round was committed."""

    def observe_phase(self, phase: str, duration_s: float) -> None:
        """A phase is over."""

    def observe_staleness(self, steps: int) -> None:
        """A contribution counts."""


class VirtualServer(Loop):
    """See the module's docstring.

    Args:
        port: where frames come from.
        events: virtual time.
        reduce_s: what reducing a shard takes.
        give_up_after_s: the longest wait.
    """

    def __init__(
        self, port: ServerPort, events: Events, *, reduce_s: float, give_up_after_s: float
    ) -> None:
        settings = Settings(
            run_id=bytes([port.number % 255 + 1]) * 16, give_up_after_s=give_up_after_s
        )
        self.state = ServerState(settings, events.now_s)
        self._log_text = io.StringIO()
        super().__init__(
            cast("ServerLink", port),
            self.state,
            log=LineLog(self._log_text, clock=events.clock),
            signals=cast("Signals", _NoSignals()),
            observer=_Deaf(),
            save=None,
            clock=events.clock,
        )
        self._port, self._virtual = port, events
        self._reduce_s = reduce_s
        self._woken = False
        self._due_s: float | None = None
        port.wake = self.wake

    @property
    def log(self) -> str:
        """Everything it has logged."""
        return self._log_text.getvalue()

    @property
    def has_weights_under_way(self) -> bool:
        """Whether weights are on their way to anybody, or wait until they can be."""
        return self._port.weights_under_way > 0 or self._outbox.waiting_weights

    def wake(self) -> None:
        """Something is to be done now."""
        if not self._woken:
            self._woken = True
            self._virtual.at(self._virtual.now_s, self._run_once)

    def _run_once(self) -> None:
        self._woken = False
        if self._port.closed:
            return
        self._turn()
        if self._ending is not None:
            self._end()
            return
        if self._port.pending:
            self.wake()
        due_s = self._virtual.now_s + self._patience_s(self._virtual.now_s)
        if self._due_s is None or due_s < self._due_s:
            self._due_s = due_s
            self._virtual.at(due_s, self._on_due)

    def _on_due(self) -> None:
        self._due_s = None
        self.wake()

    def _end(self) -> None:
        assert self._ending is not None  # noqa: S101 - the caller looked
        self._outbox.flush()
        self._port.closed = True
        if self._failure is not None:
            raise self._failure
        if self._ending.exit_code:
            msg = f"the simulated server {self._port.number} gave up: {self._ending.text}"
            raise GaveUpError(msg)

    def _reduce(self, action: Reduce) -> None:
        super()._reduce(action)
        if self._reduce_s:
            self._port.rest(self._reduce_s)

"""Between the state machine and what the loop does: the gate, and the disk behind it.

    actions = state.handle(event)  ->  for action in commits.admit(actions): do it
    the disk has answered          ->  for news in commits.hear(): an event, or an action let out

Where nothing is to outlive the process there is no store, and both pass everything through.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from psq.errors import StateError
from psq_server.gate import Append, Gate, Keep, Sync
from psq_server.line_log import LineLog
from psq_server.news import Answered, Copied, Kept, News, Refused
from psq_server.saving import metadata_of
from psq_server.state import (
    Action,
    Adopt,
    Blocked,
    Checkpointed,
    Durable,
    ServerState,
)
from psq_server.state.events import LOGGED, Level
from psq_server.weights import Weights

if TYPE_CHECKING:
    from psq_server.store import Store

__all__ = ["STOP_S", "Answer", "Commits"]

STOP_S: Final = 5.5
"""How long the end of the process waits for the disk: with the end of a round (2 s), the farewell
(1.2 s) and the threads it is 10 s at most."""

Answer: TypeAlias = Durable | Blocked | Checkpointed
"""What the state machine is told of the disk."""


class Commits:
    """See the module's docstring.

    Args:
        state: whose actions these are.
        store: the disk; None: nothing outlives the process.
        held: the weights, once there are any.
        log: is told what the disk does.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        state: ServerState,
        store: Store | None,
        held: Callable[[], Weights],
        log: LineLog,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._store = store
        self._held = held
        self._log = log
        self._clock = clock
        self._since_s: float | None = None
        self._last_keep: int | None = None
        """The ticket of the checkpoint that the process ends with."""
        self._shadowed = -1
        """The version of the checkpoint that is written while rounds go on."""
        version = state.snapshot(clock()).version
        self._gate = Gate(
            state.level, whole=state.closes_whole, version=version if version >= 0 else None
        )

    @property
    def is_busy(self) -> bool:
        """Whether a crash could take back something of what this process knows."""
        return self._gate.is_busy

    @property
    def durable_version(self) -> int:
        """The newest version that a crash does not take back; -1: none."""
        if self._store is None:
            return -1
        return max(self._gate.durable_version, self._store.version)

    @property
    def dropped(self) -> int:
        """How many answers were dropped because too many waited for the disk."""
        return self._gate.dropped

    @property
    def blocked(self) -> str:
        """Why the disk refuses; empty if it does not."""
        return self._gate.blocked

    def admit(self, actions: Sequence[Action]) -> Iterator[Action]:
        """What may be done now, one after another; what is to be written is written between.

        Raises:
            StateError: the disk cannot be used, and the server cannot go on.
        """
        for step in self._gate.admit(actions, self._changes):
            if isinstance(step, Append | Sync | Keep):
                self._write_down(step)
                continue
            yield step
            if isinstance(step, Adopt) and step.level in LOGGED:
                self._need_store().open_journal(0)

    def hear(self) -> Iterator[Answer | Action]:
        """What the disk has answered: events for the state machine, and what they let out."""
        if self._store is None:
            return
        for news in self._store.news():
            yield from self._take(news)
        if self._is_overdue():
            yield from self._end_by_journal()

    def give_up(self) -> StateError | None:
        """Why the process ends although the disk has not taken its end; None while it waits.

        Nobody hears what waited for it: it is as if this process had died.
        """
        if not self._is_overdue():
            return None
        why = self._gate.blocked or "it is slow"
        text = f"the disk did not take the last state within {STOP_S:g} s: {why}"
        self._log.write("error", "not-kept", {"text": text})
        return StateError(text)

    def _is_overdue(self) -> bool:
        """Whether the end of the process has waited for the disk for too long."""
        if not self._gate.holds_stop:
            return False
        now_s = self._clock()
        self._since_s = now_s if self._since_s is None else self._since_s
        return now_s - self._since_s >= STOP_S

    def _end_by_journal(self) -> Iterator[Action]:
        """Do without the last checkpoint, where the journal has all that would be in it."""
        if self._last_keep is None or self._gate.level != "journal" or self._gate.blocked:
            return
        ticket, self._last_keep = self._last_keep, None
        text = "the last checkpoint is not finished: the next start replays the journal instead"
        self._log.write("warning", "no-checkpoint", {"text": text})
        yield from self._gate.done(ticket)

    def _take(self, news: News) -> Iterator[Answer | Action]:
        match news:
            case Answered():
                released = self._gate.done(news.ticket)
                yield Durable(self._gate.durable_version)
                yield from released
                self._need_store().released()
            case Refused() if news.text != self._gate.blocked:
                self._gate.blocked = news.text
                if news.text:
                    self._log.write("error", "blocked", {"text": news.text})
                else:
                    self._log.write("info", "unblocked", {})
                yield Blocked(news.text)
            case Kept():
                if news.version == self._shadowed:  # an older one's answer may come after its begin
                    self._held().let_go()
                if not news.text:
                    note = {"note": news.note} if news.note else {}
                    level: Level = "warning" if news.is_alone else "info"
                    self._log.write(level, "checkpointed", {"version": news.version, **note})
                yield Checkpointed(news.version, news.text)
            case Copied(failed=True):
                self._log.write(
                    "warning", "not-copied", {"version": news.version, "text": news.text}
                )
            case Copied():
                self._log.write("info", "copied", {"version": news.version, "to": news.text})

    def _write_down(self, step: Append | Sync | Keep) -> None:
        store = self._need_store()
        match step:
            case Append():
                store.append(step)
            case Sync():
                store.sync(step.ticket)
            case Keep():
                self._keep(store, step)

    def _keep(self, store: Store, step: Keep) -> None:
        held, run_id = self._held(), self._state.settings.run_id
        facts, parameters = held.facts()
        meta = {
            "server": self._state.capture(),
            "facts": facts,
            "parameters": parameters,
            "export": metadata_of(held.plan, run_id, step.version),
        }
        self._last_keep = step.ticket
        # While something waits for it nothing moves: no copy is needed, and it can be tried again.
        if step.ticket is None:
            self._shadowed = step.version
        arrays = held.shadow() if step.ticket is None else held.still()
        store.keep(step.version, arrays, meta, step.ticket)

    def _changes(self, committed: bool) -> Mapping[str, Any]:  # noqa: FBT001 - see gate.Changes
        return self._state.changes(committed=committed)

    def _need_store(self) -> Store:
        assert self._store is not None, "a job is kept where there is no disk"  # noqa: S101
        return self._store

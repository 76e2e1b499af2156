"""Processes of a launched job that died: started again, done without, or the end of the job.

Each process has so many restarts, at the same address or as the same rank. Not started again is
one that another try would not help: a wrong command line or configuration, a state directory that
cannot be used, a key that is refused, or a rank that another process has taken. Nor is a worker
after the end of its servers, since they end when every rank has done its part. Where servers go on
without workers that are lost, as long as so many are there (--min-workers), so does the launcher.
This module decides and says so; `psq_worker.children` starts and ends processes.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from psq.durable.failpoints import FAILPOINT_ENV
from psq.errors import EXIT_CONFIG, EXIT_FENCED, EXIT_REFUSED, EXIT_STATE, EXIT_USAGE
from psq_worker.children import Children
from psq_worker.display import View

__all__ = ["Restarts"]

FINAL_CODES: Final = frozenset({EXIT_USAGE, EXIT_STATE, EXIT_FENCED, EXIT_REFUSED, EXIT_CONFIG})
"""Codes of processes that would end the same way again."""

Order = tuple[list[str], Mapping[str, str], bool]
"""Command, environment, whether it outlives the others."""


@dataclass(slots=True)
class Restarts:
    """What to start again, and how often it was.

    Attributes:
        allowed: how often each process may be started again.
        view: where it is said.
        orders: how to start a process, by its name; asked when it is needed, since a server's
            address is known only once it has begun.
        servers: the names of those that end last.
        workers: the names of the others.
        least: how many workers rounds need; None: all.
        on_lost: told of each worker that the job goes on without and its code.
        counts: how often each was started again.
    """

    allowed: int
    view: View
    orders: dict[str, Callable[[], Order]] = field(default_factory=dict)
    servers: tuple[str, ...] = ()
    workers: tuple[str, ...] = ()
    least: int | None = None
    on_lost: Callable[[str, int], object] = lambda *_: None
    counts: dict[str, int] = field(default_factory=dict)

    def revive(self, children: Children, name: str, code: int) -> str | None:
        """Start a process again that ended with this code.

        Returns:
            Why not, in words; empty if it was, and None if the job goes on without.
        """
        why = self._try_again(children, name, code)
        if why and self.may_lose(children, name):
            said = f", {why}" if why.strip() else ""
            left = sum(self._is_there(children, other, name) for other in self.workers)
            words = f"the job goes on with {left} of {len(self.workers)} workers"
            self.view.say("", f"{name} {_how(code)}{said}: {words} (--min-workers {self.least})")
            self.on_lost(name, code)
            return None
        return why

    def may_lose(self, children: Children, name: str) -> bool:
        """Whether the job can end well without this worker.

        As the servers see it: rounds need so many workers, of those that are not done yet; and once
        somebody is done, nobody need be there any more.
        """
        if self.least is None or name not in self.workers:
            return False
        others = [other for other in self.workers if other != name]
        left = sum(children.code(other) is None for other in others)
        done = sum(children.code(other) == 0 for other in others)
        if not left:
            return done > 0
        return left >= min(self.least, len(self.workers) - done)

    def _try_again(self, children: Children, name: str, code: int) -> str:
        if not self.allowed or name not in self.orders:
            return " "
        if code in FINAL_CODES:
            return "not started again: another try would end the same way"
        if name not in self.servers and not children.running(*self.servers):
            return "not started again: its servers have ended"
        count = self.counts.get(name, 0) + 1
        if count > self.allowed:
            return f"given up after {self.allowed} restarts (--max-restarts)"
        self.counts[name] = count
        self.view.say("", f"{name} {_how(code)}: started again ({count} of {self.allowed})")
        command, env, outlives = self.orders[name]()
        first_life_only = {key: value for key, value in env.items() if key != FAILPOINT_ENV}
        children.start(name, command, first_life_only, outlives=outlives)
        return ""

    @staticmethod
    def _is_there(children: Children, other: str, name: str) -> bool:
        return other != name and children.code(other) in {None, 0}


def _how(code: int) -> str:
    if code > 128 and code - 128 in set(signal.Signals):  # noqa: PLR2004 - the shell's convention
        return f"was killed by {signal.Signals(code - 128).name}"
    return f"ended with code {code}"

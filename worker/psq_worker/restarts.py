"""Processes of a launched job that died are started again: at the same address, as the same rank.

Each process has so many restarts. Not started again is one that another try would not help: a
wrong command line or configuration, a state directory that cannot be used, a key that is refused,
or a rank that another process has taken. Nor is a worker after the end of its servers, since they
end when every rank has done its part. This module decides and says so; `psq_worker.children` starts
and ends processes.
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
        counts: how often each was started again.
    """

    allowed: int
    view: View
    orders: dict[str, Callable[[], Order]] = field(default_factory=dict)
    servers: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)

    def revive(self, children: Children, name: str, code: int) -> str:
        """Start a process again that ended with this code.

        Returns:
            Why not, in words; empty if it was.
        """
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


def _how(code: int) -> str:
    if code > 128 and code - 128 in set(signal.Signals):  # noqa: PLR2004 - the shell's convention
        return f"was killed by {signal.Signals(code - 128).name}"
    return f"ended with code {code}"

"""Who waits for one server can say nothing to another: it says so there, or both might wait for it.

Where rounds are not one step (ssp), each server decides for itself whose contributions a round
takes, and a worker begins its next step when all of them have answered. So one server might wait
for a worker that another holds, and that one for one that the first holds, for ever: a ring. A
worker that has waited for a while therefore tells each server that has answered it that it is
held; while it is, that server does not wait for it.

Pure: the time is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from psq.client.machine import Machine

__all__ = ["HELD_S", "tell"]

HELD_S: Final = 1.0
"""How long a worker has waited for a server before it is held."""


def tell(machines: Sequence[Machine], waited_s: float, *, in_step: bool) -> None:
    """Let the machines of all servers say whether their worker is held, after it waited so long.

    Args:
        machines: one for each server.
        waited_s: how long the worker has waited for some of them; 0.0: it does not wait.
        in_step: all servers' rounds are one step of the worker; then none is ever ahead for long.
    """
    if in_step or len(machines) == 1:
        return
    for machine in machines:
        machine.hold(waited_s >= HELD_S and machine.settled)

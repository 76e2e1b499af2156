"""Asking server 0 which data the next contribution is to be computed from.

A DRAW names the contribution by the version that it will be computed from; the same one always gets
the same answer, so it is asked again, whatever happened to the connection, until that answer comes.
Weights are not looked at meanwhile: the version must stay what was asked for.

Pure but for the machine that it asks through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from psq.client.machine import Machine
from psq.errors import UsageError
from psq_proto.messages import Draw, Range

__all__ = ["ASK_AGAIN_S", "Asking", "Terms"]

ASK_AGAIN_S: Final = 0.5


class Terms(NamedTuple):
    """What every worker of a job names alike: the data set's size, a batch, the order's seed."""

    size: int
    batch: int
    seed: int


class Asking:
    """One question, until it is answered.

    Args:
        machines: of all servers; the first one is asked.
        epoch: the one that the worker is at.
        terms: see `Terms`.
        in_step: all servers' rounds are one step of the worker. Then one that is ahead, because it
            has this worker's word from a process before, would take the data for another step than
            the others: the worker has to sit this one out.

    Raises:
        UsageError: a step is open.
    """

    def __init__(
        self, machines: Sequence[Machine], epoch: int, terms: Terms, *, in_step: bool
    ) -> None:
        self._machine = machines[0]
        if any(machine.round is not None and not machine.holds for machine in machines):
            msg = "data are drawn between two steps: end the one that is open first"
            raise UsageError(msg)
        seq = _next_seq(self._machine)
        self._draw = Draw(seq, epoch, terms.size, terms.batch, terms.seed)
        self._asked_s: float | None = None
        self._machine.answer = None
        if in_step and seq != min(map(_next_seq, machines)):
            self._machine.answer = Range(seq, "late", epoch)

    @property
    def answer(self) -> Range | None:
        """What the server said."""
        said = self._machine.answer
        return said if said is not None and said.seq == self._draw.seq else None

    @property
    def pause_s(self) -> float:
        """How long to wait before asking again."""
        return ASK_AGAIN_S

    def ask(self, now_s: float) -> None:
        """Say it, if it was not said just now."""
        if self._asked_s is None or now_s - self._asked_s >= ASK_AGAIN_S:
            self._asked_s = now_s if self._machine.ready else None
            self._machine.ask(self._draw)


def _next_seq(machine: Machine) -> int:
    """The name of the next contribution: of the one that was taken up, or of the version there is.

    A worker that has joined has one.
    """
    return machine.replica.version if machine.round is None else machine.round.number

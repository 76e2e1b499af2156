"""Which data count: every index of an epoch once, whoever computed from it.

A contribution has the data that it was computed from; it visits them if anything of it counts. So
what is asked here is asked of what servers reduced, not of what their books say.
"""

from __future__ import annotations

from typing import TypeAlias

from .clock import Violation

__all__ = ["Data", "Visits"]

Data: TypeAlias = tuple[int, tuple[tuple[int, int], ...]]
"""An epoch, and spans of positions in it."""
Name: TypeAlias = tuple[int, int]
"""Of a contribution: whose it was, and the version that it was computed from."""


class Visits:
    """See the module's docstring.

    Args:
        size: of an epoch.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._epoch = 0
        self._data: dict[Name, Data] = {}
        self._counting: dict[Name, set[int]] = {}

    def computes(self, name: Name, data: Data | None) -> None:
        """Something of a contribution is computed from these data, as all else of it is.

        Raises:
            Violation: from none, or from others than the rest.
        """
        if data is None or self._data.setdefault(name, data) != data:
            msg = (
                f"contribution {name} is computed from {data}, and was from {self._data.get(name)}"
            )
            raise Violation(msg)

    def counts(self, name: Name, ticket: int) -> None:
        """A shard of a contribution was reduced.

        Raises:
            Violation: another contribution has visited an index of its own.
        """
        if name not in self._counting:
            epoch, spans = self._data[name]
            mine = set(_positions(spans))
            for other in self._counting:
                at, theirs = self._data[other]
                if at == epoch and not mine.isdisjoint(_positions(theirs)):
                    msg = f"{name} and {other} visit the same: {spans} and {theirs} of {epoch}"
                    raise Violation(msg)
        self._counting.setdefault(name, set()).add(ticket)

    def is_void(self, name: Name, ticket: int) -> None:
        """A crash took this back."""
        if name in self._counting:
            self._counting[name].discard(ticket)
            if not self._counting[name]:
                del self._counting[name]

    def is_at(self, epoch: int) -> None:
        """The server is at this epoch: those before it are over.

        Raises:
            Violation: of one of them an index was not visited.
        """
        for over in range(self._epoch, epoch):
            visited = {
                position
                for name in self._counting
                if self._data[name][0] == over
                for position in _positions(self._data[name][1])
            }
            missing = sorted(set(range(self._size)) - visited)
            if missing:
                msg = f"epoch {over} is over, and {missing} of {self._size} were not visited"
                raise Violation(msg)
        self._epoch = epoch


def _positions(spans: tuple[tuple[int, int], ...]) -> list[int]:
    return [position for low, high in spans for position in range(low, high)]

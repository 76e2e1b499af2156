"""The workers that this process has open: closed one by one, or all when a program ends."""

from __future__ import annotations

import atexit
import sys
from typing import Final, Literal, Protocol, TypeAlias

__all__ = ["Reason", "close_workers", "note_ending", "opened", "reason_of"]

Reason: TypeAlias = Literal["done", "error", "interrupted"]


class Closable(Protocol):
    """A worker, as far as its end is concerned."""

    @property
    def in_this_process(self) -> bool:
        """Whether this process made it."""
        ...

    def close(self, reason: Reason = "done", text: str = "") -> None:
        """Leave the job."""


opened: Final[list[Closable]] = []
_endings: Final[list[tuple[Reason, str]]] = []


def close_workers(reason: Reason, text: str = "") -> None:
    """Close every worker this process has open: for programs that run a user's script."""
    for worker in tuple(opened):
        if worker.in_this_process:
            worker.close(reason, text)


def reason_of(error: BaseException | None) -> tuple[Reason, str]:
    """Why a program that ends like this leaves its jobs."""
    if error is None:
        return "done", ""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        return "interrupted", type(error).__name__
    return "error", f"{type(error).__name__}: {error}"


def note_ending(reason: Reason, text: str) -> None:
    """Say why this program is about to end, where at its exit nothing shows it: by a SystemExit."""
    _endings[:] = [(reason, text)]


@atexit.register
def _close_at_exit() -> None:
    """A script that ends without `close` has done its work, unless an error or a signal ended it.

    (Of `sys.exit` in the script itself, whatever its code, nothing is known here.)
    """
    error = getattr(sys, "last_value", None)
    close_workers(*(_endings[0] if _endings and error is None else reason_of(error)))

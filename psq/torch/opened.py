"""The workers that this process has open: closed one by one, or all when a program ends."""

from __future__ import annotations

import atexit
import sys
from typing import Final, Literal, Protocol, TypeAlias

__all__ = ["Reason", "close_workers", "opened", "reason_of"]

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


@atexit.register
def _close_at_exit() -> None:
    """A script that ends without `close` has done its work, unless an error ended it."""
    close_workers(*reason_of(getattr(sys, "last_value", None)))

"""The workers that this process has open: closed one by one, or all when a program ends.

A worker that nobody has closed says at the program's exit whether its work is done, and that must
not be said of a program that failed. An exception that nobody caught is seen by Python itself
(`sys.last_value`), but a SystemExit leaves no trace. So

- `sys.exit` is a function that remembers its argument and does what it did, from the import of this
  module on: in `sys.exit(main())` it is looked up before there is a worker;
- the outermost frame of the program is kept: one that ran to its end stands at a RETURN.

A program that neither ran to its end nor said `sys.exit(0)` is not done.
"""

from __future__ import annotations

import atexit
import logging
import opcode
import sys
import threading
from types import FrameType
from typing import Any, Final, Literal, NoReturn, Protocol, TypeAlias

__all__ = ["Reason", "close_workers", "note_ending", "note_opened", "opened", "reason_of"]

Reason: TypeAlias = Literal["done", "error", "interrupted"]

_log = logging.getLogger("psq.torch")


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
_outermost: Final[list[FrameType]] = []
_exits: Final[list[object]] = []
_exit: Final = sys.exit


def note_opened(worker: Closable) -> None:
    """A worker is open from now on; how the program ends is watched."""
    opened.append(worker)
    frame = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001 - the way
    while frame is not None and frame.f_back is not None:
        frame = frame.f_back
    _outermost[:] = [] if frame is None else [frame]


def _noting_exit(*status: Any) -> NoReturn:
    _exits[:] = status[:1] or [None]
    _exit(*status)


sys.exit = _noting_exit


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
    """A script that ends without `close` has done its work, unless something else ended it."""
    if any(worker.in_this_process for worker in opened):
        close_workers(*_reason_at_exit())


def _reason_at_exit() -> tuple[Reason, str]:
    error = getattr(sys, "last_value", None)
    if error is not None:
        return reason_of(error)
    if _endings:
        return _endings[0]
    if _ran_to_its_end():
        return "done", ""
    if not _exits:
        _log.warning(
            "this program ended by a SystemExit of which nothing is known, and its worker was not "
            "closed: its rank stays in the job; say sys.exit(0), or use `with`, if it is done"
        )
        return "interrupted", "SystemExit"
    code = _exits[0]
    return ("error", f"sys.exit({code!r:.80})") if code else ("done", "")


def _ran_to_its_end() -> bool:
    """Whether the program's last line was its last; also where it still runs, and was not asked."""
    if not _outermost:
        return True
    frame, now = _outermost[0], sys._getframe()  # noqa: SLF001 - to look at the caller's frames
    while now is not frame:
        if now.f_back is None:
            break
        now = now.f_back
    if now is frame or frame.f_lasti < 0:
        return True
    return opcode.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN")

"""Child processes that end together: the part of `psq launch` that must never leave an orphan.

    with Children(on_line) as children:
        children.start("server", [...], outlives=True)
        children.start("rank 0", [...])
        while children.running("rank 0"):
            children.pump(0.2)                      # lines, signals, exits

- Each child is the leader of a session of its own, so a Ctrl-C in the terminal reaches only the
  parent, which then ends the children in order: SIGTERM, to those that the others talk to last,
  and SIGKILL to the whole process group after `STOP_GRACE_S`.
- Each child holds the read end of a pipe whose write end only the parent has (`psq.process`): when
  the parent is killed in a way it cannot handle, the children end themselves.
- One child that ends with a code other than 0 ends all, unless somebody starts it again, or does
  without it (`on_death`); the error carries its code and last words.

Signals are turned into `InterruptedByError` inside `pump`, never in the middle of something else.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import IO, Final, Self

from psq.errors import PsqError
from psq.process import PARENT_FD_ENV

__all__ = ["STOP_GRACE_S", "ChildFailedError", "Children", "InterruptedByError"]

STOP_GRACE_S: Final = 1.2  # with what else must be done, all is over within 2 s of a Ctrl-C
OUTLIVES_S: Final = 0.3
TAIL_LINES: Final = 12
MAX_LINE_BYTES: Final = 65_536
READ_BYTES: Final = 65_536
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

OnLine = Callable[[str, str], None]
OnDeath = Callable[["Children", str, int], str | None]


class ChildFailedError(PsqError):
    """A child ended although it should not have, or with a code other than 0."""

    def __init__(
        self, name: str, code: int, tail: Sequence[str], why: str = "", how: str = ""
    ) -> None:
        self.child = name
        self.exit_code = code
        said = "".join(f"\n    {line}" for line in tail)
        words = f"its last words:{said}" if said else "it said nothing"
        words = f"{why}; {words}" if why else words
        super().__init__(f"{name} ended {how or f'with {_describe(code)}'}; {words}")


class InterruptedByError(PsqError):
    """A signal asked this process to end; `exit_code` is 128 plus its number."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name}; its processes have ended")


@dataclass(slots=True)
class _Child:
    name: str
    process: subprocess.Popen[bytes]
    outlives: bool
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    open_streams: int = 2
    is_missed: bool = True


@dataclass(slots=True)
class _Stream:
    child: _Child
    pipe: IO[bytes]
    partial: bytes = b""


class Children:
    """A group of processes; leaving the block stops those that still run.

    Args:
        on_line: called with a child's name and each line it prints, on stdout or stderr.
        on_death: called with this, the name of a child that ended with a code other than 0, and the
            code; it may `start` a child of that name, and returns why it did not; None if the
            others go on without.
        grace_s: how long children that are told to end may take for it.
    """

    def __init__(
        self, on_line: OnLine, on_death: OnDeath | None = None, *, grace_s: float = STOP_GRACE_S
    ) -> None:
        self._on_line = on_line
        self._on_death = on_death
        self._grace_s = grace_s
        self._children: dict[str, _Child] = {}
        self._selector = selectors.DefaultSelector()
        self._signals: list[int] = []
        self._stopping = False

    def __enter__(self) -> Self:
        self._parent_reader, self._parent_writer = os.pipe()
        self._wake_reader, self._wake_writer = os.pipe()
        for fd in (self._wake_reader, self._wake_writer):
            os.set_blocking(fd, False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, None)
        self._old_wakeup = signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.stop(self._grace_s)
        finally:
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old_wakeup)
            for key in list(self._selector.get_map().values()):
                if isinstance(key.data, _Stream):
                    self._close_stream(key.data)
            self._selector.close()
            for fd in (
                self._parent_reader,
                self._parent_writer,
                self._wake_reader,
                self._wake_writer,
            ):
                os.close(fd)

    def start(
        self, name: str, command: Sequence[str], env: Mapping[str, str], *, outlives: bool = False
    ) -> int:
        """Start a child; its stdin is empty. Returns its process id.

        Args:
            name: what it is called in lines and errors.
            command: program and arguments.
            env: its whole environment.
            outlives: the others talk to it, so `stop` ends it after them.
        """
        os.set_inheritable(self._parent_reader, True)  # noqa: FBT003 - as above
        process = subprocess.Popen(  # noqa: S603 - psq's own commands
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**env, PARENT_FD_ENV: str(self._parent_reader)},
            pass_fds=(self._parent_reader,),
            start_new_session=True,
        )
        child = self._children[name] = _Child(name, process, outlives)
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None  # noqa: S101 - both were asked for
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ, _Stream(child, pipe))
        return process.pid

    def running(self, *names: str) -> bool:
        """Whether any of these has not ended, or has lines that were not passed on yet."""
        return any(
            child.process.returncode is None or child.open_streams > 0
            for child in (self._children[name] for name in names)
        )

    def code(self, name: str) -> int | None:
        """What a child ended with, as far as that has been looked at; None while it runs."""
        code = self._children[name].process.returncode
        return code if code is None or code >= 0 else 128 - code

    def terminate(self, name: str) -> None:
        """Ask one child to end."""
        _terminate([self._children[name]])

    def pump(self, timeout_s: float) -> None:
        """Pass on what the children print, for at most `timeout_s`, or until something happens.

        Raises:
            InterruptedByError: this process got SIGINT, SIGTERM or SIGHUP.
            ChildFailedError: a child ended with a code other than 0.
        """
        self._read(timeout_s)
        if self._signals:
            raise InterruptedByError(self._signals[0])
        for child in list(self._children.values()):
            code = child.process.poll()
            if code and child.is_missed:
                self._read_rest(child)
                self._bury(child, code if code > 0 else 128 - code)

    def _bury(self, child: _Child, code: int) -> None:
        """A child has died: another takes its place, or the others do without, or all end."""
        self._kill_group(child)
        why = "" if self._on_death is None else self._on_death(self, child.name, code)
        child.is_missed = why is not None
        if why is not None and self._children[child.name] is child:
            raise ChildFailedError(child.name, code, child.tail, why.strip())
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, _Stream) and key.data.child is child:
                self._close_stream(key.data)

    def fail(self, name: str, why: str = "") -> ChildFailedError:
        """The error for a child that ended with code 0 but too early, and why, if that is known."""
        return ChildFailedError(name, 1, self._children[name].tail, why, "before the job did")

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """End every child: SIGTERM, then SIGKILL to what is left after `grace_s`.

        Those that outlive the others are told when these have ended, or `OUTLIVES_S` later: to say
        goodbye to nobody would cost the others half a second. A signal that comes meanwhile (a
        second Ctrl-C) ends the patience at once.
        """
        self._signals.clear()
        others = [child for child in self._children.values() if not child.outlives]
        last = [child for child in self._children.values() if child.outlives]
        began_s = time.monotonic()
        _terminate(others)
        self._wait_ended(others, began_s + min(OUTLIVES_S, grace_s))
        _terminate(last)
        self._wait_ended([*last, *others], began_s + grace_s)
        for child in self._children.values():
            self._kill_group(child)
            self._read_rest(child)

    def _wait_ended(self, children: Sequence[_Child], deadline_s: float) -> None:
        """Pass on what the children still say, until they have ended or patience has."""
        while any(c.process.poll() is None for c in children) and not self._signals:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return
            self._read(min(left_s, 0.05))

    def _kill_group(self, child: _Child) -> None:
        """End a child, and whatever it started and left behind in its session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.process.pid, signal.SIGKILL)
        child.process.wait()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._signals.append(number)

    def _read(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.data, _Stream):
                self._read_stream(key.data)
            else:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_reader, READ_BYTES)

    def _read_rest(self, child: _Child) -> None:
        for key in list(self._selector.get_map().values()):
            stream = key.data
            if isinstance(stream, _Stream) and stream.child is child:
                while self._read_stream(stream):
                    pass

    def _read_stream(self, stream: _Stream) -> bool:
        """Pass on what is there; whether there may be more."""
        try:
            data = os.read(stream.pipe.fileno(), READ_BYTES)
        except BlockingIOError:
            return False
        *lines, stream.partial = (stream.partial + data).split(b"\n")
        if not data or len(stream.partial) > MAX_LINE_BYTES:
            lines, stream.partial = [*lines, stream.partial], b""
        for line in lines:
            self._pass_on(stream.child, line)
        if not data:
            self._close_stream(stream)
        return bool(data)

    def _close_stream(self, stream: _Stream) -> None:
        self._selector.unregister(stream.pipe)
        stream.pipe.close()
        stream.child.open_streams -= 1

    def _pass_on(self, child: _Child, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            if not text.startswith('{"psq":'):
                child.tail.append(text)
            self._on_line(child.name, text)


def _terminate(children: Sequence[_Child]) -> None:
    for child in children:
        if child.process.poll() is None:
            child.process.terminate()


def _describe(code: int) -> str:
    if code > 128 and code - 128 in set(signal.Signals):  # noqa: PLR2004 - the shell's convention
        return f"{signal.Signals(code - 128).name} (code {code})"
    return f"code {code}"

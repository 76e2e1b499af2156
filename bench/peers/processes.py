"""The processes of one measured system: started, talked to, weighed and ended.

A child speaks in marked lines (see `job`); what else it prints, and its stderr, goes to a file that
is quoted when it fails. Only processes started here are ended, by pid; what they leave behind is
ended too, found as their descendants.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from netns import Star
from peers.job import MARK

HEAR_S = 240.0  # the longest a child may be silent: a few dense steps over a slow link
END_S = 15.0
READ_BYTES = 1 << 16
TICKS_S = os.sysconf("SC_CLK_TCK")
CPU_FIELDS = slice(11, 13)  # utime and stime, counted from the state that follows the name


class FailedError(Exception):
    """A system could not be started, or ended before its time; says why in one line."""


@dataclass(frozen=True)
class Site:
    """Where a system's processes run: on machines of a star, or all on this one's loopback."""

    net: Star | None
    logs: Path

    def address(self, machine: str) -> str:
        return "127.0.0.1" if self.net is None else self.net.addresses[machine]

    def interface(self) -> str:
        return "lo" if self.net is None else "eth0"

    def argv(self, machine: str, argv: Sequence[str]) -> list[str]:
        return list(argv) if self.net is None else self.net.argv(machine, argv)


class Child:
    """One process; `name` is its part in the system (server, worker0)."""

    def __init__(
        self, site: Site, machine: str, name: str, argv: Sequence[str], env: Mapping[str, str]
    ) -> None:
        self.name = name
        self.import_kb = 0
        self._log_path = site.logs / f"{name}-{time.monotonic_ns()}.log"
        self._buffer = b""
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                site.argv(machine, argv),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", **env},
                start_new_session=True,
            )
        self.pid = self._process.pid

    def say(self, text: str) -> None:
        stream = self._stream(self._process.stdin)
        try:
            stream.write(text.encode() + b"\n")
            stream.flush()
        except BrokenPipeError:
            self._fail("ended")

    def hear(self, key: str, timeout_s: float = HEAR_S) -> dict[str, Any]:
        """The next marked line, which must have this key."""
        while True:
            line = self.line(timeout_s)
            if line.startswith(MARK):
                said: dict[str, Any] = json.loads(line.removeprefix(MARK))
                if key not in said:
                    self._fail(f"said {sorted(said)} where {key!r} was expected")
                return said

    def line(self, timeout_s: float = HEAR_S) -> str:
        """The next line of its stdout."""
        stream, deadline_s = self._stream(self._process.stdout), time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([stream], [], [], left_s)[0]:
                self._fail(f"said nothing for {timeout_s:.0f} s")
            data = os.read(stream.fileno(), READ_BYTES)
            if not data:
                self._fail("ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode(errors="replace")

    def hang_up(self) -> None:
        """Tell it that nothing more comes."""
        with contextlib.suppress(BrokenPipeError):
            self._stream(self._process.stdin).close()

    def end(self, *, at_once: bool = False) -> None:
        """Wait until it has ended; first ask, then make it."""
        family = [self.pid, *descendants(self.pid)]
        self.hang_up()
        if not at_once:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pid in family[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._stream(self._process.stdout).close()

    def peak_kb(self) -> int:
        """Its peak of resident memory so far."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)

    def _fail(self, what: str) -> None:
        lines = self._log_path.read_text(errors="replace").strip().splitlines()
        lines = [line for line in lines if "Error" in line] or lines
        msg = f"{self.name} {what}: {lines[-1] if lines else 'it wrote nothing to stderr'}"
        raise FailedError(msg)

    @staticmethod
    def _stream(stream: IO[bytes] | None) -> IO[bytes]:
        assert stream is not None  # noqa: S101
        return stream


@dataclass
class Running:
    """A system that is up.

    Attributes:
        children: all its processes; the first of `stepping` is rank 0.
        stepping: those that do steps when told.
        versions: of what it runs.
    """

    children: list[Child] = field(default_factory=list)
    stepping: list[Child] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def add(self, child: Child) -> Child:
        self.children.append(child)
        return child

    def ready(self, children: Sequence[Child]) -> None:
        """Wait until these are ready to do steps."""
        for child in children:
            said = child.hear("ready")
            child.import_kb = said["import_kb"]
            self.versions |= said["ready"]
        self.stepping += children

    def steps(self, count: int) -> dict[str, Any]:
        """Do so many steps.

        Rank 0's seconds and notes, all processes' CPU seconds per step, and the digests of the
        weights that ranks ended with, of systems that tell them.
        """
        before_s = self.cpu_s()
        for child in self.stepping:
            child.say(f"steps {count}")
        said = [child.hear("steps") for child in self.stepping]
        cpu_s = self.cpu_s() - before_s - sum(s["fill_cpu_s"] for s in said)
        digests = [s["notes"]["digest"] for s in said if "digest" in s["notes"]]
        first = {"steps": said[0]["steps"], "notes": said[0]["notes"]}
        return {**first, "cpu_s": cpu_s / count, "digests": digests}

    def cpu_s(self) -> float:
        return sum(_cpu_s(pid) for child in self.children for pid in family(child.pid))

    def peaks_kb(self) -> dict[str, int]:
        """Peak resident memory by process, without what importing its libraries took.

        Only of those that said how much that was.
        """
        return {c.name: c.peak_kb() - c.import_kb for c in self.children if c.import_kb}

    def end(self, *, at_once: bool = False) -> None:
        for child in self.stepping:
            child.hang_up()
        for child in reversed(self.children):
            child.end(at_once=at_once)


@contextlib.contextmanager
def ending(running: Running) -> Iterator[Running]:
    """Ends the system when the context is left: in peace, or at once after an error."""
    try:
        yield running
    except BaseException:
        running.end(at_once=True)
        raise
    running.end()


def family(pid: int) -> list[int]:
    return [pid, *descendants(pid)]


def descendants(pid: int) -> list[int]:
    """Pids of its children and theirs."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += family(child)
    return found


def _cpu_s(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    return sum(map(int, text.rpartition(")")[2].split()[CPU_FIELDS])) / TICKS_S

"""What one process did when: spans of time by phase, shard and round, for one picture of a job.

    recorder = Timeline()                                     a ring, made once
    start_s = time.monotonic()
    ...                                                       encode shard 3 of round 7
    recorder.add(Phase.ENCODE, start_s, time.monotonic(), 3, 7)
    write_part(path, recorder, Process("rank", 0), ...)       Chrome's trace event format

The ring holds the last `MAX_SPANS` spans. At the limit the oldest are overwritten, and the file
says how many were (`lost_spans`): a long job is seen by its end. Spans go into memory that was
allocated when the recorder was made; adding one costs about a microsecond, and who has no recorder
pays one `is None`. Several threads may add.

Times are this machine's monotonic clock, which its processes share. A worker's file also says how
far the servers' clocks are from its own, so that `psq.trace` can put the parts of several machines
on one axis. Never here: clocks of other machines, or anything that changes what is recorded.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from psq.errors import StateError

__all__ = [
    "MAX_SPANS",
    "MIN_WAIT_S",
    "NOWHERE",
    "Phase",
    "Process",
    "Span",
    "Timeline",
    "check_writable",
    "machine_clock",
    "part_path",
    "write_lines",
    "write_part",
]

MAX_SPANS: Final = 131_072
"""Spans in a ring: 9 MB, and a file of about 20 MB. 30 shards make some 200 spans a round."""
MIN_WAIT_S: Final = 20e-6
"""Shorter waits are not recorded: a busy process looks at its link thousands of times a second."""
NOWHERE: Final = -1
"""The shard, round or rank of a span that has none."""
_SPAN: Final = struct.Struct("<qqqqqqdd")
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_FIRST_SERVER: Final = 1_000_000  # servers are shown below ranks


class Phase(IntEnum):
    """What a process was at: one row in the picture, in this order."""

    COMPUTE = 1  # worker: the user's forward and backward pass
    ENCODE = 2  # worker: gradients of a shard into its payload
    PUSH = 3  # worker: that payload handed to the link
    DECODE = 4  # worker: a shard's answer into the weights
    ZERO = 5  # worker: gradients set to zero, answers decoded in between
    LOCAL = 6  # worker: a step on its own weights
    RECEIVE = 7  # server: a push checked and staged
    REDUCE = 8  # server: a shard's pushes into weights and answer
    BROADCAST = 9  # server: the answer handed to the links of all
    SAVE = 10  # server: the weights written to disk
    WAIT = 11  # nothing to do but to wait for others


@dataclass(frozen=True, slots=True)
class Process:
    """Whose spans: a rank, or a server, by number."""

    role: Literal["rank", "server"]
    number: int

    @property
    def name(self) -> str:
        """As in "rank 0"."""
        return f"{self.role} {self.number}"

    @property
    def pid(self) -> int:
        """A number of its own in the picture."""
        return self.number + 1 + (_FIRST_SERVER if self.role == "server" else 0)


class Span(NamedTuple):
    """One stretch of time.

    Attributes:
        phase: what the process was at.
        start_s, end_s: on the machine's monotonic clock.
        shard, round: of which; `NOWHERE` if of none.
        rank: whose push, on a server; else `NOWHERE`.
        nbytes: of the payload, or of the frame; 0 if there is none.
    """

    phase: Phase
    start_s: float
    end_s: float
    shard: int
    round: int
    rank: int
    nbytes: int


class Timeline:
    """A bounded recorder of spans.

    Args:
        limit: how many are kept.
    """

    def __init__(self, limit: int = MAX_SPANS) -> None:
        self._limit = limit
        self._ring = bytearray(limit * _SPAN.size)
        self._numbers = itertools.count(1)  # `next` is atomic: two threads get two slots

    def add(  # noqa: PLR0913, PLR0917 - what a span is; names double what a call costs
        self,
        phase: Phase,
        start_s: float,
        end_s: float,
        shard: int = NOWHERE,
        round: int = NOWHERE,  # noqa: A002 - the word of the field
        rank: int = NOWHERE,
        nbytes: int = 0,
    ) -> None:
        """Record a span that has ended; what it was of may be left out."""
        number = next(self._numbers)
        offset = number % self._limit * _SPAN.size
        _SPAN.pack_into(
            self._ring, offset, number, phase, shard, round, rank, nbytes, start_s, end_s
        )

    def spans(self) -> list[Span]:
        """What is in the ring, in the order in which it was recorded."""
        return [
            Span(Phase(phase), start_s, end_s, shard, round_, rank, nbytes)
            for _, phase, shard, round_, rank, nbytes, start_s, end_s in sorted(self._records())
        ]

    @property
    def lost_spans(self) -> int:
        """How many were overwritten, because there were more than the limit."""
        return min((record[0] for record in self._records()), default=1) - 1

    def _records(self) -> Iterator[tuple[Any, ...]]:
        return (record for record in _SPAN.iter_unpack(self._ring) if record[0])


def machine_clock() -> str:
    """What names the monotonic clock of this machine: it starts anew at each boot."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return platform.node()


def part_path(path: Path, process: Process) -> Path:
    """Where a process that was told `path` writes: t.rank0.json, or t.server1.json, for t.json."""
    return path.with_name(f"{path.stem}.{process.role}{process.number}{path.suffix}")


def check_writable(path: Path) -> None:
    """Refuse a place that cannot be written, before anybody has trained for hours.

    Raises:
        StateError: the folder does not exist or cannot be written, or the path is a folder.
    """
    folder = path.absolute().parent
    if path.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        msg = (
            f"cannot write a timeline to {path}: name a file in a folder that exists and may be "
            "written"
        )
        raise StateError(msg)


def write_part(
    path: Path, recorder: Timeline, process: Process, *, job: str, offsets: Any = ()
) -> Path:
    """Write what one process recorded, beside `path`; see `part_path`.

    Args:
        path: what the process was told.
        recorder: the spans.
        process: whose they are.
        job: names the job, so that parts of two are not mixed up.
        offsets: of a worker: plain maps (server, offset_s, round_trip_s), see `psq.trace`.

    Returns:
        The part's own path.

    Raises:
        StateError: the disk refused; what was there before still is.
    """
    spans = recorder.spans()
    about = {
        "process": process.name,
        "job": job,
        "clock": machine_clock(),
        "offsets": list(offsets),
        "lost_spans": recorder.lost_spans,
    }
    part = part_path(path, process)
    write_lines(part, about, itertools.chain(_names(process, spans), _events(process, spans)))
    return part


def write_lines(path: Path, about: Mapping[str, Any], events: Iterable[str]) -> None:
    """Write a trace file, one event a line, so that nobody need hold all of it to read it.

    Raises:
        StateError: the disk refused; what was there before still is.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="ascii") as file:
            file.write(f'{{"displayTimeUnit":"ms","otherData":{json.dumps(dict(about))},')
            file.write('"traceEvents":[')
            for number, event in enumerate(events):
                file.write(f"{',' if number else ''}\n{event}")
            file.write("\n]}\n")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        msg = f"cannot write the timeline to {path}: {error.strerror or error}"
        raise StateError(msg) from error


def _names(process: Process, spans: Iterable[Span]) -> Iterator[str]:
    """Events that name the process and its rows."""
    for what, value in (("name", process.name), ("sort_index", process.pid)):
        yield _meta(f"process_{what}", process.pid, 0, what, value)
    for phase in sorted({span.phase for span in spans}):
        for what, value in (("name", phase.name.lower()), ("sort_index", int(phase))):
            yield _meta(f"thread_{what}", process.pid, phase, what, value)


def _meta(name: str, pid: int, tid: int, key: str, value: str | int) -> str:
    return json.dumps({"name": name, "ph": "M", "pid": pid, "tid": int(tid), "args": {key: value}})


def _events(process: Process, spans: Iterable[Span]) -> Iterator[str]:
    """One complete event for each span, times in microseconds. By hand: json takes four times."""
    names = {phase: phase.name.lower() for phase in Phase}
    for span in spans:
        start_us, lasts_us = span.start_s * 1e6, max(0.0, span.end_s - span.start_s) * 1e6
        rank = f',"rank":{span.rank}' if span.rank != NOWHERE else ""
        yield (
            f'{{"name":"{names[span.phase]}","cat":"{process.role}","ph":"X","pid":{process.pid},'
            f'"tid":{span.phase:d},"ts":{start_us:.3f},"dur":{lasts_us:.3f},"args":{{'
            f'"shard":{span.shard},"round":{span.round},"bytes":{span.nbytes}{rank}}}}}'
        )

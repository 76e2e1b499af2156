"""Timelines of several processes on one clock: `t.rank0.json`, `t.server0.json`, ... -> `t.json`.

Processes of one machine share its monotonic clock; each machine has its own. A worker has measured
how far every server's clock is from its own (`psq.client.offset`), so clocks are nodes of a graph,
and a worker with a server on another machine is an edge. All times are moved to server 0's clock
along the path with the shortest round trips in all: half of that is the most they can be wrong by.
A server that knows only its own clock is so placed by a worker that talks to both.

The parts are read line by line, as `psq.timeline` writes them; none is held in memory whole. Pure
but for the files it reads and writes. The result begins at 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from psq.errors import StateError
from psq.timeline import write_lines

__all__ = ["Part", "merge", "place"]

REFERENCE: Final = "server 0"
_END: Final = "]}"


@dataclass(frozen=True, slots=True)
class Part:
    """What one file says of itself.

    Attributes:
        path: the file.
        process: as in "rank 0".
        job: which job.
        clock: which machine's clock.
        offsets: of each server by number: (its clock minus this one, seconds; the round trip).
        lost_spans: how many were overwritten.
    """

    path: Path
    process: str
    job: str
    clock: str
    offsets: Mapping[int, tuple[float, float]]
    lost_spans: int


def merge(paths: Sequence[Path], output: Path) -> int:
    """Make one trace of several processes' parts, in whatever order they are named.

    Returns:
        How many events it has.

    Raises:
        StateError: a file cannot be read or is no part, two are of one process or of different
            jobs, or nothing tells how two machines' clocks lie; nothing was written.
    """
    parts = [_read_about(path) for path in paths]
    _check_together(parts)
    shifts = place(parts)
    starts = [
        event["ts"] * 1e-6 + shifts[part.process]
        for part in parts
        for event in _events(part.path)
        if "ts" in event
    ]
    origin_s = min(starts, default=0.0)
    about = {
        "processes": [part.process for part in parts],
        "job": parts[0].job,
        "clock_shifts_s": {p.process: shifts[p.process] for p in parts},
        "lost_spans": {p.process: p.lost_spans for p in parts},
    }
    write_lines(output, about, _shifted(parts, shifts, origin_s))
    return len(starts)


def place(parts: Sequence[Part]) -> dict[str, float]:
    """What to add to each process's times, in seconds, to have them on server 0's clock.

    Where server 0 has left no part, the clock of the first part takes its place.

    Raises:
        StateError: no chain of measurements joins two machines.
    """
    clocks = {part.process: part.clock for part in parts}
    reference = clocks.get(REFERENCE, parts[0].clock)
    nearest = _nearest(reference, _edges(parts, clocks))
    for part in parts:
        if part.clock not in nearest:
            msg = (
                f"{part.path}: {part.process} ran on another machine than {REFERENCE}, and no "
                "worker's part says how their clocks lie: name the parts of workers that talked to "
                "both, or leave this one out"
            )
            raise StateError(msg)
    return {part.process: nearest[part.clock][1] for part in parts}


def _edges(
    parts: Sequence[Part], clocks: Mapping[str, str]
) -> dict[str, list[tuple[str, float, float]]]:
    """From each clock: (another one, what to add there to be here, round trip), both ways."""
    edges: dict[str, list[tuple[str, float, float]]] = {}
    for part in parts:
        for server, (offset_s, trip_s) in part.offsets.items():
            other = clocks.get(f"server {server}", f"server {server}")
            edges.setdefault(other, []).append((part.clock, offset_s, trip_s))
            edges.setdefault(part.clock, []).append((other, -offset_s, trip_s))
    return edges


def _nearest(
    reference: str, edges: Mapping[str, Sequence[tuple[str, float, float]]]
) -> dict[str, tuple[float, float]]:
    """Of each clock in reach: (round trips on the shortest way, what to add to its times)."""
    found: dict[str, tuple[float, float]] = {}
    open_ = {reference: (0.0, 0.0)}
    while open_:
        clock = min(open_, key=lambda name: open_[name])
        trip_s, shift_s = found[clock] = open_.pop(clock)
        for other, offset_s, more_s in edges.get(clock, ()):
            far = open_.get(other, (math.inf, 0.0))
            if other not in found and trip_s + more_s < far[0]:
                open_[other] = (trip_s + more_s, shift_s + offset_s)
    return found


def _check_together(parts: Sequence[Part]) -> None:
    if not parts:
        msg = "no parts were named"
        raise StateError(msg)
    seen: dict[str, Part] = {}
    for part in parts:
        if part.process in seen:
            msg = f"{part.path} and {seen[part.process].path} are both of {part.process}: leave one"
            raise StateError(msg)
        seen[part.process] = part
        if part.job != parts[0].job:
            msg = (
                f"{part.path} is of job {part.job}, {parts[0].path} of job {parts[0].job}: "
                "name the parts of one job"
            )
            raise StateError(msg)


def _read_about(path: Path) -> Part:
    try:
        with path.open(encoding="ascii") as file:
            about: dict[str, Any] = json.loads(file.readline() + _END)["otherData"]
        offsets = {
            int(each["server"]): (float(each["offset_s"]), float(each["round_trip_s"]))
            for each in about["offsets"]
        }
        process, job, clock = (str(about[key]) for key in ("process", "job", "clock"))
        return Part(path, process, job, clock, offsets, int(about["lost_spans"]))
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror or error}"
        raise StateError(msg) from error
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(_no_part(path)) from error


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a part, one at a time."""
    try:
        with path.open(encoding="ascii") as file:
            file.readline()
            for line in file:
                if line.startswith(_END):
                    return
                yield json.loads(line.rstrip(",\n"))
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror or error}"
        raise StateError(msg) from error
    except ValueError as error:
        raise StateError(_no_part(path)) from error
    raise StateError(_no_part(path))  # it has no end


def _shifted(parts: Sequence[Part], shifts: Mapping[str, float], origin_s: float) -> Iterator[str]:
    for part in parts:
        shift_us = (shifts[part.process] - origin_s) * 1e6
        for event in _events(part.path):
            if "ts" in event:
                event["ts"] = round(event["ts"] + shift_us, 3)
            yield json.dumps(event, separators=(",", ":"))


def _no_part(path: Path) -> str:
    return (
        f"{path} is no part of a timeline, or not all of it: expected a file that a process with "
        "--timeline-filename has written, such as t.rank0.json"
    )

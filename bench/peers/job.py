"""What a measured process does besides its library's own work: the talk with `processes.Child`.

    it writes  {"at": ...}     where it can be reached, when others must know
               {"ready": ...}  versions, and the peak of memory before there was a model
    it reads   steps N         N times: fill (not timed), step (timed)
    it writes  {"steps": ...}  seconds of each step, CPU seconds of the fills, what the system adds
    its input ends             it closes

Lines carry a mark, because libraries print what they like. Runs on every Python a peer needs (3.8
and later); no library is imported here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

MARK = "PSQBENCH "


class Job(ABC):
    """One process's part in a step. `fill` lays the given gradients ready; it is not timed."""

    def __init__(self) -> None:
        self.versions: dict[str, str] = {}

    def fill(self) -> None:  # noqa: B027 - many jobs need none
        """Lay the gradients ready."""

    @abstractmethod
    def step(self) -> None:
        """From gradients to new weights."""

    def notes(self) -> dict[str, Any]:
        """What the system itself says of the steps since the last call."""
        return {}

    def close(self) -> None:  # noqa: B027 - likewise
        """Leave."""


def say(**said: Any) -> None:
    """Tell the parent."""
    print(MARK + json.dumps(said), flush=True)


def peak_kb() -> int:
    """This process's peak of resident memory so far."""
    with open("/proc/self/status", encoding="ascii") as lines:  # noqa: PTH123 - one line
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def serve(make: Callable[[argparse.Namespace], Job], more: dict[str, str] | None = None) -> None:
    """Parse the command line, make the job, and do what the parent says until it hangs up.

    `more`: further options by name, with their defaults. Import the library before calling this:
    the peak of memory taken here is called the library's own.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--size", default="1M")
    parser.add_argument("--lr", type=float, default=1e-4)
    for name, default in (more or {}).items():
        parser.add_argument("--" + name, default=default)
    options = parser.parse_args()
    import_kb = peak_kb()
    job = make(options)
    say(ready=job.versions, import_kb=import_kb)
    try:
        for line in sys.stdin:
            say(**run(job, int(line.split()[1])))
    finally:
        job.close()


def run(job: Job, steps: int) -> dict[str, Any]:
    """So many steps."""
    steps_s, fill_cpu_s = [], 0.0
    for _ in range(steps):
        before_s = time.process_time()
        job.fill()
        start_s, filled_s = time.perf_counter(), time.process_time()
        job.step()
        steps_s.append(time.perf_counter() - start_s)
        fill_cpu_s += filled_s - before_s
    return {"steps": steps_s, "fill_cpu_s": fill_cpu_s, "notes": job.notes()}

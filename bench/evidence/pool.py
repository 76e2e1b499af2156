"""Works through cells with a few processes, in order of importance, until time is up.

Every cell is a process of its own. One that dies without a word leaves no file: it is told, and not
tried again in this run. When time is up nothing new is begun, and what runs is waited for.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from evidence.cells import Cell, Store

BENCH = Path(__file__).resolve().parent.parent
LOOK_S = 0.2
CELL_S = 3600.0
"""The longest that a cell may take."""

Choose = Callable[[frozenset[Cell]], Cell | None]


class Pool:
    """See the module's docstring.

    Args:
        store: where cells are kept.
        processes: how many at a time.
        until_s: on `time.monotonic`, when nothing new is begun; infinite: never.
    """

    def __init__(self, store: Store, processes: int, until_s: float) -> None:
        self._store, self._processes, self._until_s = store, processes, until_s
        self._running: dict[Cell, subprocess.Popen[str]] = {}
        self._begun_s: dict[Cell, float] = {}
        self._died: set[Cell] = set()
        self.done = 0

    def run(self, choose: Choose) -> None:
        """Until there is nothing left to do, or no time."""
        try:
            while self._begin(choose) or self._running:
                time.sleep(LOOK_S)
                self._collect()
        except BaseException:
            for process in self._running.values():
                process.terminate()
                process.wait()
            raise

    def _begin(self, choose: Choose) -> bool:
        """Whether a cell was begun."""
        if len(self._running) >= self._processes or time.monotonic() >= self._until_s:
            return False
        cell = choose(frozenset([*self._running, *self._died]))
        if cell is None:
            return False
        self._running[cell] = self.start(cell)
        self._begun_s[cell] = time.monotonic()
        return True

    def start(self, cell: Cell) -> subprocess.Popen[str]:
        """Its process."""
        told = json.dumps(dataclasses.asdict(cell))
        folder = str(self._store.folder.resolve())
        return subprocess.Popen(
            [sys.executable, "-m", "evidence.train", folder, told],
            cwd=BENCH,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _collect(self) -> None:
        for cell, process in list(self._running.items()):
            if process.poll() is None:
                if time.monotonic() - self._begun_s[cell] > CELL_S:
                    process.kill()
                continue
            del self._running[cell]
            self._tell(cell, process.communicate()[1])

    def _tell(self, cell: Cell, errors: str) -> None:
        result = self._store.get(cell)
        if result is None:
            self._died.add(cell)
            words = (errors or "it wrote nothing to stderr").strip().splitlines()[-1]
            print(f"{cell.name}: died: {words}", flush=True)
            return
        self.done += 1
        said = result.get("failure") or f"{result['scores'][-1][1]}"
        print(f"{cell.name}: {said}, {result['wall_s']:.0f} s", flush=True)

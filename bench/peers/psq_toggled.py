"""A psq worker that records its timeline in half of its steps: on, off, off, on, and again."""

from __future__ import annotations

import sys
from pathlib import Path

from job import serve

sys.path.insert(0, str(Path(__file__).parents[1]))  # psq_worker is a package of psq's, too
from peers.psq_worker import PsqWorker

PATTERN = (True, False, False, True)


class Toggled(PsqWorker):
    """Needs PSQ_TIMELINE_FILENAME. Steps before the first that counts follow the pattern too."""

    count = 0

    def step(self) -> None:
        worker = self.worker
        if not self.count:
            self.recorder = worker._timeline  # noqa: SLF001 - no setting changes within a job
        recorder = self.recorder if PATTERN[self.count % len(PATTERN)] else None
        self.count += 1
        worker._timeline = worker._exchange._timeline = recorder  # noqa: SLF001 - as above
        worker._client._timeline = worker._steps._timeline = recorder  # noqa: SLF001 - as above
        super().step()


if __name__ == "__main__":
    serve(Toggled, {"connect": "tcp://127.0.0.1:5555"})

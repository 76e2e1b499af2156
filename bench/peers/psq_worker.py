"""One psq worker of a measured step: `Worker.step` zeroes gradients, so they are filled again.

After each round of steps it tells a digest of its weights: those of all ranks must be equal.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import crc32c
import torch
from given import Given
from job import Job, serve

import psq
from psq import kernels
from psq.torch import StepReport, Worker


class PsqWorker(Job):
    """A worker whose model's gradients are given."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.versions = {
            "psq": psq.__version__,
            "kernel": kernels.level(),
            "torch": torch.__version__,
        }
        self.model = Given(options.size, options.rank)
        self.worker = Worker(
            self.model,
            lr=options.lr,
            connect=options.connect,
            rank=options.rank,
            world_size=options.world_size,
        )
        if self.worker.choice and options.rank == 0:
            self.versions["codec=auto"] = self.worker.choice
        self.reports: list[StepReport] = []

    def fill(self) -> None:
        self.model.fill()

    def step(self) -> None:
        self.reports.append(self.worker.step())

    def notes(self) -> dict[str, Any]:
        """Mean seconds by phase, steps that did not count, and the weights' digest."""
        reports, self.reports = [asdict(report) for report in self.reports], []
        phases = [name for name in reports[0] if name.endswith("_s") and name != "compute_s"]
        means = {name: sum(r[name] for r in reports) / len(reports) for name in phases}
        missed = sum(not r["applied"] for r in reports)
        return {"phases": means, "not_applied": missed, "digest": self.digest()}

    def digest(self) -> int:
        value = 0
        for tensor in self.model.tensors:
            value = crc32c.crc32c(tensor.detach().numpy().reshape(-1).view("u1"), value)
        return value

    def close(self) -> None:
        self.worker.close()


if __name__ == "__main__":
    serve(PsqWorker, {"connect": "tcp://127.0.0.1:5555"})

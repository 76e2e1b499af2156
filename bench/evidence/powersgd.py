"""Torch's own PowerSGD, by real processes: DistributedDataParallel over gloo, one for each worker.

    train(...)                                          starts the ranks and collects what they say
    python -m evidence.powersgd '{"rank": 0, ...}'      is one of them, in bench/

Model, initial weights, samples and rates are the task's own, as for psq; Adam takes the steps.
Torch's settings hold but for the dense start, which is two steps here, the least it accepts, and
for one bucket (why: `peers/torch_ddp.py`). Bytes are the factors' and what stays dense, as torch
counts them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent.parent
PATIENCE_S = 1800.0
DENSE_STEPS = 2
F32 = 4


def train(workers: int, power: int, task: str, job: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 said in the end.

    Raises:
        RuntimeError: a rank failed; with the last line that it wrote.
    """
    told = {"world_size": workers, "power": power, "task": task, "job": job}
    lead = _start({**told, "rank": 0, "store": "127.0.0.1:0"})
    ranks = [lead]
    try:
        store = json.loads(_line(lead))["at"]
        ranks += [_start({**told, "rank": rank, "store": store}) for rank in range(1, workers)]
        said: dict[str, Any] = json.loads(_line(lead))
        for rank in ranks:
            rank.communicate(timeout=PATIENCE_S)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
    return said


def _start(told: dict[str, Any]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "evidence.powersgd", json.dumps(told)],
        cwd=BENCH,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


def _line(rank: subprocess.Popen[str]) -> str:
    assert rank.stdout is not None  # noqa: S101 - it is a pipe
    line = rank.stdout.readline()
    if not line:
        _, errors = rank.communicate()
        words = (errors or "it said nothing").strip().splitlines()
        raise RuntimeError(words[-1])
    return line


def main() -> None:
    """One rank."""
    from evidence import powersgd_rank  # noqa: PLC0415 - torch, which the parent needs not

    powersgd_rank.run(json.loads(sys.argv[1]))


if __name__ == "__main__":
    main()

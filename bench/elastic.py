"""How long a job stands still when a worker dies, hangs or is told to end: real processes.

    python bench/elastic.py --trials 10                     # SIGKILL, SIGSTOP and SIGTERM
    python bench/elastic.py --trials 10 --signals kill      # one of them

Per trial: a server with --min-workers 1, three workers of examples/elastic/train.py, and a signal
to one of them while it computes. The time runs from the signal to the end of the next step that a
worker makes which was not in flight then: to the second step after it, so that the step that waits
for the lost one is over. Reported are best, median and worst of all trials, in seconds.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "examples" / "elastic" / "train.py"
WORKERS = 3
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
WAIT_S = 60.0
LOOK_S = 0.002
STEPS_BEFORE = 20
STEPS_AFTER = 2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--signals", default="kill,stop,term")
    parser.add_argument("--lease", type=float, default=10.0, help="of the server, s")
    parser.add_argument("--step-ms", type=float, default=20.0, help="what a step takes besides")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    for name in given.signals.split(","):
        times_s = sorted(trial(SIGNALS[name], given) for _ in range(given.trials))
        middle = statistics.median(times_s)
        print(
            f"SIG{name.upper()}: best {times_s[0]:.2f} s, median {middle:.2f} s, "
            f"worst {times_s[-1]:.2f} s of {given.trials} (lease {given.lease:g} s, "
            f"steps of {given.step_ms:g} ms)"
        )


def trial(number: int, given: argparse.Namespace) -> float:
    """One job, one signal; returns how long the others stood still, in seconds."""
    with tempfile.TemporaryDirectory() as folder, job(Path(folder), given) as workers:
        for out, _ in workers:
            wait(lambda out=out: steps(out) >= STEPS_BEFORE, "the first steps")
        victim = workers[-1][1]
        os.kill(victim.pid, number)
        began_s = time.monotonic()
        at = [steps(out) for out, _ in workers[:-1]]
        for (out, _), before in zip(workers[:-1], at, strict=True):
            wait(lambda out=out, n=before: steps(out) >= n + STEPS_AFTER, "a step without it")
        return time.monotonic() - began_s


@contextmanager
def job(
    folder: Path, given: argparse.Namespace
) -> Iterator[list[tuple[Path, subprocess.Popen[bytes]]]]:
    """A server and its workers, each with the file that it prints to."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    processes: list[subprocess.Popen[bytes]] = []

    def start(name: str, *words: str) -> tuple[Path, subprocess.Popen[bytes]]:
        out = folder / name
        with out.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", *words], stdout=stream, stderr=stream, env=env
            )
        processes.append(process)
        return out, process

    try:
        told = ["--world-size", str(WORKERS)]
        elastic = ["--min-workers", "1", "--lease", str(given.lease)]
        server, _ = start("server", "psq_server", "--bind", "tcp://127.0.0.1:0", *told, *elastic)
        wait(lambda: "ready endpoint" in server.read_text(), "the server")
        [endpoint] = re.findall(r"endpoint=(\S+)", server.read_text())
        script = [str(TRAIN), "--", "--epochs", "1000", "--pause-ms", str(given.step_ms)]
        yield [
            start(
                f"rank{rank}",
                *("psq_worker", "--connect", endpoint, "--rank", str(rank), *told),
                *("--progress", "none", *script),
            )
            for rank in range(WORKERS)
        ]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def steps(out: Path) -> int:
    """How many steps a worker has printed."""
    return out.read_bytes().count(b" step ")


def wait(condition: Callable[[], bool], what: str) -> None:
    """Look again and again until `condition()` is true."""
    ends_s = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > ends_s:
            msg = f"{what} did not come within {WAIT_S:g} s"
            raise SystemExit(msg)
        time.sleep(LOOK_S)


if __name__ == "__main__":
    main()

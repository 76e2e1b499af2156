"""Measures honest rounds beside each kind of hostile peer, and the server's memory.

    PYTHONPATH=tests python -m faults.hostile [--seconds 10] [KIND ...]

Quiet and attacked stretches take turns, so that what else the machine does falls on both. The
attackers are a process of their own at a lower priority, but on the same processors: a figure over
1 is what they take of these, too. Exit code 1: the server died, or the memory bound was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from faults.honest import Job, resident_mb
from faults.peers import KINDS

__all__ = ["MOST_GROWTH_MB", "Attacked", "attack"]

TESTS: Final = Path(__file__).resolve().parents[1]
TURNS: Final = 3
NICE: Final = 10
MARGIN_S: Final = 60.0
MOST_GROWTH_MB: Final = 640.0
"""How much more memory a server may take, whoever attacks it: see docs/reliability.md."""


@dataclass(frozen=True, slots=True)
class Attacked:
    """What one kind of peer did to a server."""

    kind: str
    attacks: int
    quiet_s: tuple[float, ...]
    attacked_s: tuple[float, ...]
    before_mb: float
    peak_mb: float

    @property
    def median_ratio(self) -> float:
        """Median round with attack over median round without."""
        return statistics.median(self.attacked_s) / statistics.median(self.quiet_s)

    @property
    def best_ratio(self) -> float:
        """The same of the fastest rounds, which feel least of what else the machine does."""
        return min(self.attacked_s) / min(self.quiet_s)


def attack(job: Job, kind: str, seconds: float, turns: int = TURNS) -> Attacked:
    """Let rounds go on, by turns without and with such peers; each stretch lasts `seconds`."""
    quiet, attacked, attacks = [], [], 0
    before_mb = peak_mb = resident_mb(job.server.pid)
    for _ in range(turns):
        ends_s = time.monotonic() + seconds
        while time.monotonic() < ends_s:
            quiet.append(job.round())
        with _peers(job, kind, seconds) as peers:
            while peers.poll() is None:
                attacked.append(job.round())
                peak_mb = max(peak_mb, resident_mb(job.server.pid))
            said, _ = peers.communicate(timeout=MARGIN_S)
        assert peers.returncode == 0, f"{kind} ended with {peers.returncode}"
        attacks += json.loads(said)["attacks"]
    assert attacks, f"{kind} did not attack"
    return Attacked(kind, attacks, tuple(quiet), tuple(attacked), before_mb, peak_mb)


def _peers(job: Job, kind: str, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "faults.peers", kind, job.host, str(job.port), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        preexec_fn=lambda: os.nice(NICE),  # noqa: PLW1509 - one thread
    )


def _line(it: Attacked) -> str:
    return (
        f"{it.kind:<16} {it.attacks:>9,} {1e3 * min(it.quiet_s):>8.2f} {it.best_ratio:>7.2f}"
        f" {1e3 * statistics.median(it.quiet_s):>9.2f} {it.median_ratio:>7.2f}"
        f" {it.peak_mb - it.before_mb:>+9.0f}"
    )


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="Honest rounds beside hostile peers.")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each stretch")
    parser.add_argument("kinds", nargs="*", default=list(KINDS), metavar="KIND")
    asked = parser.parse_args()
    held = True
    sys.stdout.write("kind               attacks  best ms   ratio median ms   ratio  grew MiB\n")
    for kind in asked.kinds:
        with tempfile.TemporaryDirectory() as folder, Job(Path(folder)) as job:
            attacked = attack(job, kind, asked.seconds)
            held &= job.server.poll() is None
        held &= attacked.peak_mb - attacked.before_mb <= MOST_GROWTH_MB
        sys.stdout.write(_line(attacked) + "\n")
        sys.stdout.flush()
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())

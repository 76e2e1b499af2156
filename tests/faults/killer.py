"""Kills servers and workers, thousands of times, and counts updates that are lost or doubled.

    PYTHONPATH=tests python -m faults.killer [--kills 1000] [--seconds 600] [--seed 1]

One small job after another. Again and again, at a random moment, the server, a worker, or the
server and a worker are killed with SIGKILL and started again. Every job must end with the bytes of
one that was left alone: an update that is lost or counted twice would change them. Ends when so
many servers and so many workers have been killed, or the time is up; exit code 1 if one job ended
otherwise, or did not end.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cluster.conftest import Zygote

from faults.life import SERVER, Life, Outcome

__all__ = ["Tally", "disturbed_job"]

STEPS: Final = 120
QUIET_STEPS: Final = 6
"""At the end of a job, where nobody is killed: who has ended well is not started again."""
SHORTEST_S: Final = 0.01
LONGEST_S: Final = 0.4
RECIPES: Final = ("server-adam", "qadam-1bit", "shared-direction")
STALL_S: Final = 90.0


@dataclass(slots=True)
class Tally:
    """What was done so far."""

    jobs: int = 0
    servers: int = 0
    workers: int = 0
    resets: int = 0
    violations: list[str] = field(default_factory=list)

    def line(self, seconds: float) -> str:
        """For people."""
        return (
            f"{seconds:7.0f} s  {self.jobs:4} jobs  {self.servers:5} servers and {self.workers:5}"
            f" workers killed  {self.resets} resets  {len(self.violations)} violations"
        )


def disturbed_job(
    life: Life,
    rng: random.Random,
    tally: Tally,
    enough: Callable[[], bool],
    *,
    servers_alone: bool = False,
) -> None:
    """Run a job to its end, and kill while it runs until there is `enough` of it."""
    pause, last, moved_s = threading.Event(), -1, time.monotonic()
    while not enough():
        pause.wait(rng.uniform(SHORTEST_S, LONGEST_S))
        now = min(life.step(rank) for rank in range(life.world_size))
        reached = max(life.step(rank) for rank in range(life.world_size))
        if now != last:
            last, moved_s = now, time.monotonic()
        if reached >= life.steps - QUIET_STEPS:
            return
        assert time.monotonic() < moved_s + STALL_S, f"no step in {STALL_S:.0f} s, at {now}"
        worker = rng.randrange(life.world_size)
        kinds: list[tuple[int, ...]] = [(SERVER,), (worker,), (SERVER, worker)]
        if servers_alone:
            kinds = kinds[:1]
        untouched = not (tally.servers and tally.workers)
        struck = life.kill(*(kinds[-1] if untouched else rng.choice(kinds)))
        for place in sorted(struck, key=lambda _: rng.random()):
            life.fill(place, ready=place == SERVER)
            tally.servers += place == SERVER
            tally.workers += place != SERVER


def _resets(life: Life) -> int:
    said = [path.read_text() for path in life.folder.glob("rank*.out")]
    return sum(text.count("resumed=False") for text in said) - life.world_size


def _job(
    life: Life, rng: random.Random, tally: Tally, expected: Outcome, enough: Callable[[], bool]
) -> None:
    tally.jobs += 1
    try:
        disturbed_job(life.start(), rng, tally, enough)
        found = life.outcome()
        differ = sorted(name for name in expected if found.get(name) != expected[name])
        assert not differ, f"other bytes than undisturbed: {', '.join(differ[:8])}"
    except BaseException as error:  # pytest's Failed is none of Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        tally.violations.append(f"{life.folder} {life.recipe}: {error}")
    finally:
        tally.resets += max(0, _resets(life))
        life.end()


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="Kill servers and workers, and compare.")
    parser.add_argument("--kills", type=int, default=1000, help="of servers, and of workers")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    begun_s, tally = time.monotonic(), Tally()
    rng = random.Random(asked.seed)  # noqa: S311 - no secret
    folder = Path(tempfile.mkdtemp(prefix="psq-killer-"))
    zygote, expected = Zygote(), {}

    def enough() -> bool:
        late = time.monotonic() > begun_s + asked.seconds
        return late or min(tally.servers, tally.workers) >= asked.kills

    while not enough():
        recipe = RECIPES[tally.jobs % len(RECIPES)]
        if recipe not in expected:
            whole = Life(folder / f"whole-{recipe}", zygote, STEPS, recipe=recipe).start()
            expected[recipe] = whole.outcome()
            whole.end()
        life = Life(folder / f"job{tally.jobs}", zygote, STEPS, recipe=recipe)
        _job(life, rng, tally, expected[recipe], enough)
        if not tally.violations or str(life.folder) not in tally.violations[-1]:
            shutil.rmtree(life.folder)
        sys.stdout.write(tally.line(time.monotonic() - begun_s) + "\n")
        sys.stdout.flush()
    zygote.close()
    for violation in tally.violations:
        sys.stdout.write(f"VIOLATION: {violation}\n")
    if not tally.violations:
        shutil.rmtree(folder)
    return int(bool(tally.violations))


if __name__ == "__main__":
    raise SystemExit(main())

"""One long job, and a fault every ten seconds: what leaks, what is lost, what is counted twice.

    PYTHONPATH=tests python -m faults.soak [--seconds 600] [--every 10] [--seed 1]

The job runs twice: with faults for about so many seconds, then undisturbed, which takes as long as
it takes; both must end with the same bytes. Of every process that lived for a while it says how its
memory grew (least squares, MiB an hour; without what is mapped from files, whose pages come one by
one) and how many descriptors it had at most. Faults: server, worker, or both killed and started
again; either stopped for a while; connections cut, held up and then cut, delayed, and bits flipped,
by a proxy. Exit code 1: other bytes, or a job without an end.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from cluster.conftest import Zygote

from faults.honest import descriptors, resident_mb
from faults.life import SERVER, Life
from faults.proxy import Proxy, delay, flip, hold, nothing

__all__ = ["FAULTS", "Watch"]

PROBE_STEPS: Final = 200
SAMPLE_S: Final = 1.0
WARM_S: Final = 10.0
"""Of a process' life, which do not count for its slope."""
LIFE_S: Final = 30.0
"""A shorter life has no slope."""
STOPPED_S: Final = 2.0
HELD_S: Final = 3.0
STALL_S: Final = 180.0


@dataclass(slots=True)
class Watch:
    """Memory and descriptors of one process, over time."""

    name: str
    at_s: list[float] = field(default_factory=list)
    resident_mb: list[float] = field(default_factory=list)
    descriptors: int = 0

    def slope(self) -> float | None:
        """MiB an hour; None if it did not live long enough."""
        at, mb = np.array(self.at_s), np.array(self.resident_mb)
        if not len(at) or at[-1] - at[0] < LIFE_S:
            return None
        late = at > at[0] + WARM_S
        return float(np.polyfit(at[late], mb[late], 1)[0] * 3600)


class Soak:
    """A job, its proxy, and who watches it."""

    def __init__(self, folder: Path, zygote: Zygote, steps: int, *, proxied: bool) -> None:
        self.proxy: Proxy | None = None
        self.life = Life(folder, zygote, steps, through=self._through if proxied else str)
        self.watches: dict[tuple[int, int], Watch] = {}
        self.faults: Counter[str] = Counter()
        self._pause = threading.Event()

    def _through(self, endpoint: str) -> str:
        self.proxy = self.proxy or Proxy(endpoint)
        return self.proxy.endpoint

    def rest(self, seconds: float) -> bool:
        """Let time pass and sample; False as soon as the job nears its end."""
        ends_s = time.monotonic() + seconds
        while time.monotonic() < ends_s:
            self._pause.wait(min(SAMPLE_S, max(0.0, ends_s - time.monotonic())))
            self._sample()
            if self.reached >= self.life.steps - 20:
                return False
        return True

    @property
    def reached(self) -> int:
        """The step that the fastest worker has done."""
        return max(self.life.step(rank) for rank in range(self.life.world_size))

    def _sample(self) -> None:
        for place, program in self.life.programs.items():
            key = place, self.life.starts[place]
            watch = self.watches.setdefault(key, Watch(program.name))
            try:
                mb, count = resident_mb(program.pid, "RssAnon"), descriptors(program.pid)
            except (OSError, StopIteration):
                continue  # it has ended
            watch.at_s.append(time.monotonic())
            watch.resident_mb.append(mb)
            watch.descriptors = max(watch.descriptors, count)

    def kill(self, *places: int) -> None:
        """Kill and start again."""
        for place in self.life.kill(*places):
            self.life.fill(place)

    def stop(self, place: int) -> None:
        """Stop a process for a while."""
        self.life.programs[place].signal(signal.SIGSTOP)
        self._pause.wait(STOPPED_S)
        self.life.programs[place].signal(signal.SIGCONT)

    def harm(self, harm: Callable[..., object], seconds: float, *, cut: bool = False) -> None:
        """Let the proxy do harm for a while."""
        assert self.proxy is not None
        self.proxy.harm = harm  # type: ignore[assignment]
        self._pause.wait(seconds)
        self.proxy.harm = nothing
        if cut:
            self.proxy.cut()

    def close(self) -> None:
        """End what is left."""
        self.life.end()
        if self.proxy is not None:
            self.proxy.close()


FAULTS: Final[dict[str, Callable[[Soak, int], None]]] = {
    "server killed": lambda soak, _: soak.kill(SERVER),
    "worker killed": lambda soak, rank: soak.kill(rank),
    "server and worker killed": lambda soak, rank: soak.kill(SERVER, rank),
    "server stopped": lambda soak, _: soak.stop(SERVER),
    "worker stopped": lambda soak, rank: soak.stop(rank),
    "connections cut": lambda soak, _: soak.harm(nothing, 0.0, cut=True),
    "connections held, then cut": lambda soak, _: soak.harm(hold(), HELD_S, cut=True),
    "delays": lambda soak, _: soak.harm(delay(0.0, 0.05), HELD_S),
    "flipped bits": lambda soak, _: soak.harm(flip(50_000), HELD_S),
}


def _faults(rng: random.Random) -> Iterator[str]:
    """All kinds, again and again, in an order that is never the same."""
    while True:
        yield from rng.sample(sorted(FAULTS), len(FAULTS))


def _steps_a_second(folder: Path, zygote: Zygote) -> float:
    begun_s = time.monotonic()
    probe = Soak(folder, zygote, PROBE_STEPS, proxied=True)
    probe.life.start().outcome()
    probe.close()
    return PROBE_STEPS / (time.monotonic() - begun_s)


def _disturb(soak: Soak, every_s: float, rng: random.Random) -> None:
    last, moved_s = -1, time.monotonic()
    for name in _faults(rng):
        if not soak.rest(every_s):
            return
        if soak.reached != last:
            last, moved_s = soak.reached, time.monotonic()
        assert time.monotonic() < moved_s + STALL_S, f"no step for {STALL_S:.0f} s, at {last}"
        FAULTS[name](soak, rng.randrange(soak.life.world_size))
        soak.faults[name] += 1


def _report(title: str, soak: Soak, seconds: float) -> None:
    restarts = sum(soak.life.starts.values())
    sys.stdout.write(f"{title}: {soak.life.steps} steps in {seconds:.0f} s, {restarts} restarts\n")
    for name, count in sorted(soak.faults.items()):
        sys.stdout.write(f"  {count:4} x {name}\n")
    for kind in ("server", "rank"):
        mine = [watch for watch in soak.watches.values() if watch.name.startswith(kind)]
        slopes = sorted(slope for watch in mine if (slope := watch.slope()) is not None)
        said = f"{slopes[len(slopes) // 2]:+.1f} (most {slopes[-1]:+.1f})" if slopes else "none"
        most = max((watch.descriptors for watch in mine), default=0)
        peak = max((max(watch.resident_mb, default=0) for watch in mine), default=0)
        sys.stdout.write(
            f"  {kind:7} slope of memory, MiB an hour, median of {len(slopes)} lives: {said};"
            f" peak {peak:.0f} MiB; descriptors at most {most}\n"
        )
    sys.stdout.flush()


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="A fault every ten seconds.")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--every", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    rng = random.Random(asked.seed)  # noqa: S311 - no secret
    folder, zygote = Path(tempfile.mkdtemp(prefix="psq-soak-")), Zygote()
    rate = _steps_a_second(folder / "probe", zygote)
    steps = max(PROBE_STEPS, round(rate * asked.seconds))
    outcomes = []
    for title, proxied in (("with faults", True), ("undisturbed", False)):
        soak, begun_s = Soak(folder / title.replace(" ", "-"), zygote, steps, proxied=proxied), 0.0
        try:
            begun_s = time.monotonic()
            soak.life.start()
            if proxied:
                _disturb(soak, asked.every, rng)
            while soak.rest(LIFE_S):
                pass
            outcomes.append(soak.life.outcome())
            _report(title, soak, time.monotonic() - begun_s)
        finally:
            soak.close()
    zygote.close()
    differ = sorted(name for name, digest in outcomes[1].items() if outcomes[0].get(name) != digest)
    sys.stdout.write(f"violations: {len(differ)} {', '.join(differ[:10])}\n")
    if not differ:
        shutil.rmtree(folder)
    return int(bool(differ))


if __name__ == "__main__":
    raise SystemExit(main())

# ruff: noqa: T201 - a command prints
"""`python -m tests.simulation`: show one seed again, or run many on all cores.

One seed prints its story and what it came to. Many stop at the first that fails, and print how to
see it again; `--from N` goes on where a run was stopped.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from typing import Any, Final

from .case import Case
from .run import Failure, Simulation, Tally, replay_command, run_seeds

BLOCK: Final = 250
"""Seeds that one process runs before it reports."""
SAY_S: Final = 10.0
GARBAGE: Final = 100_000
"""A job is small and over soon: its rings of references can wait."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; 1 if a seed fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one, and tell its story")
    parser.add_argument("--seeds", type=int, default=1000, help="run so many")
    parser.add_argument("--from", dest="start", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    asked = parser.parse_args(argv)
    given = dict(_choice(parser, text) for text in asked.set)
    if asked.seed is not None:
        return _one(Case.of(asked.seed, given))
    return _many(asked.start, asked.seeds, asked.jobs, given)


def _choice(parser: argparse.ArgumentParser, text: str) -> tuple[str, Any]:
    """One choice of a case, from NAME=VALUE."""
    name, _, value = text.partition("=")
    kinds = {field.name: type(getattr(Case(0), field.name)) for field in fields(Case)}
    if name not in kinds:
        parser.error(f"--set: expected one of {', '.join(kinds)}, got {name!r}")
    if kinds[name] is bool:
        return name, value in {"True", "true", "1"}
    return name, kinds[name](value)


def _one(case: Case) -> int:
    simulation = Simulation(case)
    try:
        outcome = simulation.run()
    except Exception as error:  # noqa: BLE001 - whatever it is, the story belongs to it
        print(f"{case}\n{simulation.schedule.story()}")
        print(f"seed {case.seed}: {type(error).__name__}: {error}\nagain: {replay_command(case)}")
        return 1
    print(f"{case}\n{simulation.schedule.story()}")
    print(f"seed {case.seed}: no violation, {outcome.events} events, {outcome.struck}")
    return 0


def _block(start: int, count: int, given: dict[str, Any]) -> tuple[Tally, str]:
    gc.set_threshold(GARBAGE)
    try:
        return run_seeds(range(start, start + count), given), ""
    except Failure as failure:
        return Tally(), str(failure)


def _many(start: int, count: int, jobs: int, given: dict[str, Any]) -> int:
    began_s = said_s = time.monotonic()
    end, tally = start + count, Tally()
    with ProcessPoolExecutor(jobs) as pool:
        blocks = [(at, min(BLOCK, end - at)) for at in range(start, end, BLOCK)]
        waiting = [pool.submit(_block, at, many, given) for at, many in blocks]
        for (at, many), future in zip(blocks, waiting, strict=True):
            part, failure = future.result()
            if failure:
                pool.shutdown(cancel_futures=True)
                print(f"{failure}\n{at - start} seeds before its block had no violation")
                return 1
            tally.join(part)
            if time.monotonic() - said_s > SAY_S:
                said_s = time.monotonic()
                rate = tally.seeds / (said_s - began_s)
                print(
                    f"{tally.seeds} of {count} seeds, {rate:.0f} a second, no violation; "
                    f"to go on from here: --from {at + many} --seeds {end - at - many}",
                    flush=True,
                )
    took_s = time.monotonic() - began_s
    print(f"{tally.text()}; {tally.seeds / took_s:.0f} seeds a second in {jobs} processes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

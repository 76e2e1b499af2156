"""Every bar in its cheapest honest form: name, measured, target, holds. `make bars`; 6 minutes.

    python bench/bars.py [--json] [--kept] [--only step,codecs] [--quick]

Few rounds of few steps: systems take turns as in the long runs, so that what disturbs the machine
disturbs all, but medians of so few are rough; `make bench` has the long ones (docs/performance.md).
A command that would start after --limit seconds is not run, and its bars say so. What takes longer
than this allows (advice at every rate, time to accuracy) is taken from what `make bench` has kept,
if it has. --kept takes everything from there and runs nothing.

The exit status is 0 unless a bench failed: a bar that does not hold is a fact, not an error.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from peers.venvs import default_cache
from reporting.judge import Bar, Results, bars
from reporting.runs import Kept, Run, Settings, facts, facts_line, perform, read

from psq import kernels

OUT = Path(__file__).resolve().parent / "out"
LIMIT_S = 360.0
LEVELS = ",".join(level for level in kernels.available() if level != "reference") or "reference"
CODECS = (
    "sign log:k=0 log:k=1 log:k=2 log:k=3 log:k=6 uniform:bits=2 uniform:bits=4 uniform:bits=8 "
    "uniform:bits=2,stochastic=true uniform:bits=4,stochastic=true uniform:bits=8,stochastic=true"
)
TWO = "log:k=2 uniform:bits=4,stochastic=true"
LONG = ("advise", "accuracy")  # only from what make bench has kept
QUIT = "not run: the limit of {:.0f} s was reached"


def steps(rate: str, systems: str, words: str, expected_s: float) -> Run:
    """The 25 M step at a rate."""
    return Run(
        f"step-{rate}-25M",
        f"step.py --rates {rate} --sizes 25M --systems {systems} {words}",
        f"step.py --rates {rate} --sizes 1M --systems {systems} --rounds 2 --seconds 0.2",
        expected_s,
        takes_cache=True,
    )


RUNS = (
    Run(
        "codecs",
        f"codec.py --levels {LEVELS} --rounds 7 --verbs encode_ef,decode,decode_add "
        f'--codecs "{CODECS}"',
        f'codec.py --levels {LEVELS} --rounds 1 --numel 1048576 --codecs "{CODECS}"',
        15,
    ),
    Run(
        "two-threads",
        f'codec.py --halves --rounds 5 --verbs encode_ef --codecs "{TWO}"',
        f'codec.py --halves --rounds 1 --numel 2097152 --verbs encode_ef --codecs "{TWO}"',
        2,
    ),
    Run(
        "server",
        "server.py --rounds 7 --uplinks sign",
        "server.py --rounds 1 --numel 1048576 --uplinks sign",
        10,
    ),
    Run(
        "server-whole",
        "server.py --rounds 5 --uplinks sign --workers 2 --shard 25000000",
        "server.py --rounds 1 --uplinks sign --workers 2 --shard 1048576 --numel 1048576",
        6,
    ),
    Run("package", "package.py --repeats 5", "package.py --repeats 2 --quick", 45),
    Run(
        "memory",
        "memory.py --cases server-adam-1bit,server-adam-1bit:bf16,qadam-1bit,qadam-1bit:bf16",
        "memory.py --quick",
        35,
        takes_cache=True,
    ),
    steps("loopback", "psq,ddp-fp32,ddp-bf16,powersgd-1", "--rounds 3 --seconds 0.7", 40),
    steps("10gbit", "psq,ddp-fp32", "--rounds 3 --seconds 0.7", 18),
    steps(
        "1gbit",
        "psq,ddp-fp32,ddp-bf16,powersgd-1",
        "--rounds 3 --seconds 1 --least-steps 1",
        40,
    ),
    steps(
        "100mbit",
        "psq,psq-s2,ddp-fp32",
        "--rounds 2 --seconds 2 --least-steps 1",
        95,
    ),
    Run(
        "straggler",
        "straggler.py --rules ssp:8 --seconds 6 --repeats 1",
        "straggler.py --rules ssp:8 --workers 2 --seconds 2 --repeats 1 --compute 0.1",
        30,
    ),
    Run(
        "timeline",
        "timeline.py --rounds 3 --steps 40",
        "timeline.py --size 1M --rounds 1 --steps 8",
        18,
    ),
)


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what runs, and tidies up
    settings = Settings(OUT / "bars", options.cache, options.quick, again=True)
    results = kept(OUT) if options.kept else measured(options, settings)
    found = bars(results)
    if options.json:
        print(json.dumps([as_plain(each) for each in found]))
    else:
        if options.quick:
            print("TRIED OUT AT SMALL SIZES: these figures mean nothing\n")
        print("\n".join(each.line() for each in found))
        counts = [sum(each.holds is state for each in found) for state in (True, False, None)]
        print(f"\n{counts[0]} hold, {counts[1]} do not, {counts[2]} not run; {facts_line(facts())}")
    return int(any(crashed(each) for each in results.values()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [run.name for run in RUNS]
    parser.add_argument("--only", default="", help=", ".join(names))
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for all of it")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--kept", action="store_true", help="judge what make bench has kept")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="small sizes: only to try it out")
    options = parser.parse_args()
    options.only = [name for name in options.only.split(",") if name]
    if unknown := set(options.only) - set(names):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(names)}")
    return options


def measured(options: argparse.Namespace, settings: Settings) -> dict[str, Kept]:
    """Run what there is time for; what is too long comes from the long runs."""
    end_s = time.monotonic() + options.limit
    results = {name: found for name in LONG if (found := read(OUT / f"{name}.json"))}
    for run in RUNS:
        if options.only and run.name not in options.only:
            continue
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            results[run.name] = {"error": QUIT.format(options.limit), "result": None}
            continue
        results[run.name] = perform(run, settings, limit_s=min(left_s, run.limit_s))
    return results


def kept(folder: Path) -> dict[str, Kept]:
    """All that the long runs have kept, by name."""
    return {p.stem: found for p in sorted(folder.glob("*.json")) if (found := read(p))}


def crashed(found: Kept) -> bool:
    return str(found["error"]).startswith("ended with")


def as_plain(found: Bar) -> dict[str, Any]:
    keys = ("name", "measured", "sense", "target", "holds", "note")
    return {key: getattr(found, key) for key in keys}


__all__ = ["RUNS", "Results", "kept"]

if __name__ == "__main__":
    sys.exit(main())

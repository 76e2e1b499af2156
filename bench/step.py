"""Step time of psq and of what one could pick instead, gradients given, over links of stated rates.

    python bench/step.py --quick                                   loopback, 1 M values: a minute
    python bench/step.py --rates loopback,100mbit,1gbit,10gbit --sizes 1M,11.7M,25M \
        --systems psq,ddp-fp32,ddp-bf16,powersgd-1 --rounds 5

A step is what a system does from gradients to new weights, its optimizer included; there is no
forward and no backward pass. Gradients come from a small pool of fixed values; where a system
consumes them they are filled again between steps, outside of the step's time and its CPU. Every
process computes with one thread. Step times are rank 0's; no barrier is added, a synchronous system
paces itself. CPU is user + system of all processes of the system, servers included, per step.

Systems take turns, a round is so many steps of each: what disturbs the machine disturbs all. `best`
is the best step of all, `median` that of all steps. "psq is faster" divides the row's best by the
best of the first psq row, and gives the median over the rounds of the ratio of the rounds' medians.
`floor` is what the step's messages take on the busiest way of a link (`peers/wire.py`); `link MB`
is what that way really carried, frame headers included. Memory is the peak beyond what importing
the libraries took, of the largest worker (weights and gradients, 8 bytes a parameter, are in it)
and of the largest server. Each peer has a virtual environment of its own under --cache. Without
root or without ip and tc only loopback is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import netns
from peers.processes import FailedError, Running, Site
from peers.shapes import SIZES
from peers.systems import SYSTEMS, Setup, System, machines
from peers.venvs import UnavailableError, default_cache
from peers.wire import floor_s

LOOPBACK = "loopback"
RATES = "loopback,100mbit,1gbit,10gbit"
PEERS = "psq,ddp-fp32,gloo-fp32,ddp-bf16,ddp-fp16,powersgd-1,powersgd-2,powersgd-4"
MAX_STEPS = 200
MB, MIB_KB = 1e6, 1024


@dataclass
class Seat:
    """One system in one comparison, and what was measured of it, a list entry a round."""

    system: System
    running: Running | None = None
    count: int = 0
    least_steps: int = 2
    failure: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    rounds: list[list[float]] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    link_bytes: list[float] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    digests: list[list[int]] = field(default_factory=list)
    peaks_kb: dict[str, int] = field(default_factory=dict)


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    tables = []
    with tempfile.TemporaryDirectory(prefix="psq-bench-") as logs:
        for rate in options.rates.split(","):
            for size in options.sizes.split(","):
                result = compare(rate, size, options, Path(logs))
                tables.append(result)
                if not options.json:
                    print(table(result), flush=True)
    if options.json:
        print(json.dumps(tables))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="systems: " + ", ".join(SYSTEMS),
    )
    parser.add_argument("--rates", default=RATES)
    parser.add_argument("--sizes", default="25M", help=", ".join(SIZES))
    parser.add_argument("--systems", default=PEERS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of steps a system and round")
    parser.add_argument("--least-steps", type=int, default=2, help="a round, however slow")
    parser.add_argument("--fresh", action="store_true", help="start anew each round: less memory")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="loopback, 1M, 3 short rounds")
    options = parser.parse_args()
    if options.quick:
        options.rates, options.sizes, options.rounds, options.seconds = LOOPBACK, "1M", 3, 0.5
    check(parser, options)
    return options


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what would only fail an hour later."""
    for what, known in (("sizes", SIZES), ("systems", SYSTEMS)):
        for name in getattr(options, what).split(","):
            if name not in known:
                parser.error(f"--{what}: {name!r} is none of {', '.join(known)}")
    for rate in options.rates.split(","):
        try:
            _ = rate == LOOPBACK or netns.rate_of(rate)
        except ValueError as error:
            parser.error(f"--rates: {error}")
    if min(options.workers, options.rounds, options.least_steps) < 1 or options.seconds <= 0:
        parser.error("--workers, --rounds, --least-steps and --seconds must be positive")


# ---- measuring


def compare(rate: str, size: str, options: argparse.Namespace, logs: Path) -> dict[str, Any]:
    """All systems at one rate and size."""
    names = options.systems.split(",")
    seats = [Seat(SYSTEMS[name], least_steps=options.least_steps) for name in names]
    result = {"rate": rate, "size": size, "workers": options.workers}
    if rate != LOOPBACK and (reason := netns.unavailable()):
        return {**result, "skipped": reason}
    with site_of(rate, options.workers, logs) as site:
        setup = Setup(size, options.workers, site, options.cache)
        try:
            for turn in range(options.rounds):
                for seat in seats:
                    if not seat.failure:
                        take_turn(seat, setup, options, last=turn == options.rounds - 1)
        finally:
            for seat in seats:
                end(seat, at_once=sys.exc_info()[0] is not None)
    return {**result, "numel": setup.numel, "rows": rows_of(seats, setup)}


@contextlib.contextmanager
def site_of(rate: str, workers: int, logs: Path) -> Iterator[Site]:
    if rate == LOOPBACK:
        yield Site(None, logs)
        return
    with netns.star(machines(workers), netns.rate_of(rate)) as net:
        yield Site(net, logs)


def take_turn(seat: Seat, setup: Setup, options: argparse.Namespace, *, last: bool) -> None:
    """One round of one system, which is started for it if it does not run."""
    try:
        if seat.running is None:
            start(seat, setup, options.seconds)
        measure(seat, setup.site)
    except (FailedError, UnavailableError) as error:
        seat.failure = str(error)
        end(seat, at_once=True)
        return
    if options.fresh or last or not seat.system.quiet:
        end(seat)


def start(seat: Seat, setup: Setup, seconds: float) -> None:
    """Start it, warm it up, and settle how many steps a round has."""
    seat.running = Running()
    seat.system.start(setup, seat.running)
    seat.versions = seat.running.versions
    warm = seat.running.steps(seat.system.warm_up)
    wanted = round(seconds / warm["steps"][-1])
    seat.count = seat.count or max(seat.least_steps, min(MAX_STEPS, wanted))


def measure(seat: Seat, site: Site) -> None:
    assert seat.running is not None  # noqa: S101
    before = ways(site)
    done = seat.running.steps(seat.count)
    carried = [after - was for after, was in zip(ways(site), before, strict=True)]
    seat.rounds.append(done["steps"])
    seat.cpu_s.append(done["cpu_s"])
    seat.notes.append(done["notes"])
    seat.digests.append(done["digests"])
    seat.link_bytes.append(max(carried, default=0) / seat.count)
    for name, kb in seat.running.peaks_kb().items():
        seat.peaks_kb[name] = max(kb, seat.peaks_kb.get(name, 0))


def ways(site: Site) -> list[int]:
    """Bytes that every way of every link has carried."""
    return [] if site.net is None else [n for pair in site.net.sent_bytes().values() for n in pair]


def end(seat: Seat, *, at_once: bool = False) -> None:
    running, seat.running = seat.running, None
    if running is not None:
        running.end(at_once=at_once)


# ---- what came out


def rows_of(seats: list[Seat], setup: Setup) -> list[dict[str, Any]]:
    ours = next((s for s in seats if s.system.name.startswith("psq") and not s.failure), None)
    return [row_of(seat, ours, setup) for seat in seats]


def row_of(seat: Seat, ours: Seat | None, setup: Setup) -> dict[str, Any]:
    row: dict[str, Any] = {"system": seat.system.name, "text": seat.system.text}
    if seat.failure:
        return {**row, "failure": seat.failure}
    steps = [step for steps in seat.rounds for step in steps]
    net = setup.site.net
    floor = None if net is None else floor_s(seat.system.transfers(setup), net.rate_bit_s)
    kinds = ("worker", "server")
    peaks = {
        k: max((v for n, v in seat.peaks_kb.items() if n.startswith(k)), default=0) for k in kinds
    }
    return row | {
        "versions": seat.versions,
        "steps": len(steps),
        "best_s": min(steps),
        "median_s": statistics.median(steps),
        "cpu_s": statistics.median(seat.cpu_s),
        "floor_s": floor,
        "link_mb": statistics.median(seat.link_bytes) / MB,
        "peak_mib": {kind: kb / MIB_KB for kind, kb in peaks.items()},
        "rounds_s": seat.rounds,
        "notes": seat.notes,
        "replicas_equal": all(len(set(each)) <= 1 for each in seat.digests),
        **({} if ours is None else against(seat, ours)),
    }


def against(seat: Seat, ours: Seat) -> dict[str, float]:
    """How much faster ours is, and what its CPU is of this one's."""
    pairs = zip(seat.rounds, ours.rounds, strict=False)  # of one that failed later: what there is
    ratios = [statistics.median(a) / statistics.median(b) for a, b in pairs]
    return {
        "faster_best": min(map(min, seat.rounds)) / min(map(min, ours.rounds)),
        "faster_median": statistics.median(ratios),
        "cpu_share": statistics.median(ours.cpu_s) / statistics.median(seat.cpu_s),
    }


HEAD = (
    "system",
    "best ms",
    "median ms",
    "CPU ms",
    "floor ms",
    "median / floor",
    "link MB",
    "psq is faster: best",
    "median",
    "psq's CPU",
    "worker MiB",
    "server MiB",
)


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    title = "{size} values, {workers} workers, {rate}".format(**result)
    if "skipped" in result:
        return f"\n### {title}\n\nskipped: {result['skipped']}"
    lines = [f"| {' | '.join(HEAD)} |", "|---" + "|--:" * (len(HEAD) - 1) + "|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in result["rows"]]
    found = {
        f"{name} {version}"
        for row in result["rows"]
        for name, version in row.get("versions", {}).items()
    }
    return "\n".join([f"\n### {title}\n", *lines, f"\n{', '.join(sorted(found))}"])


def cells(row: dict[str, Any]) -> list[str]:
    if "failure" in row:
        reason = row["failure"].replace("|", "/")
        return [row["system"], f"not measured: {reason}", *[""] * (len(HEAD) - 2)]
    floor = row["floor_s"]
    return [
        row["system"],
        *(f"{row[key] * 1e3:.1f}" for key in ("best_s", "median_s", "cpu_s")),
        f"{floor * 1e3:.1f}" if floor else "",
        f"{row['median_s'] / floor:.2f}" if floor else "",
        f"{row['link_mb']:.2f}" if floor else "",
        *(f"{row[key]:.2f}" if key in row else "" for key in ("faster_best", "faster_median")),
        f"{row['cpu_share']:.2f}" if "cpu_share" in row else "",
        *(f"{mib:.0f}" if mib else "" for mib in row["peak_mib"].values()),
    ]


if __name__ == "__main__":
    main()

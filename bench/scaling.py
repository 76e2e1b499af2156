"""Step time of psq by the number of workers and of servers, beside all-reduce.

    python bench/scaling.py --quick
    python bench/scaling.py --rates loopback,1gbit --workers 1,2,4,8 --servers 1,2,4 --size 1M

One server has a machine of its own; 2 and 4 servers stand beside the first workers. How a step is
measured is said in `step.py`: systems of one number of workers take turns. All processes share the
cores of this machine, so on loopback, and wherever the link is fast, what is measured beyond
`cores` processes is how the cores are shared, not how psq scales; `processes` says how many there
are. `floor` is what the busiest way of a link needs: it shows what more servers save where links
and not cores are the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers.shapes import SIZES
from peers.systems import SYSTEMS
from peers.venvs import default_cache
from step import LOOPBACK, compare

OURS = {1: "psq", 2: "psq-s2", 4: "psq-s4"}
PEER = "ddp-fp32"
DEFAULTS = {"rates": f"{LOOPBACK},1gbit", "workers": "1,2,4,8", "servers": "1,2,4"}
QUICK = {"rates": LOOPBACK, "workers": "1,2", "servers": "1,2"}


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    tables = []
    with tempfile.TemporaryDirectory(prefix="psq-bench-") as logs:
        for rate in options.rates.split(","):
            rows = []
            for workers in map(int, options.workers.split(",")):
                rows += at(rate, workers, options, Path(logs))
            tables.append({"rate": rate, "size": options.size, "cores": cores(), "rows": rows})
            if not options.json:
                print(table(tables[-1]), flush=True)
    if options.json:
        print(json.dumps(tables))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--size", default="1M", help=", ".join(SIZES))
    parser.add_argument("--peer", default=PEER, help="beside it, or nothing: ''")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of steps a system and round")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="loopback, 1 and 2 workers")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK, rounds=2, seconds=0.3)
    if options.size not in SIZES:
        parser.error(f"--size: {options.size!r} is none of {', '.join(SIZES)}")
    if unknown := {int(s) for s in options.servers.split(",")} - set(OURS):
        parser.error(f"--servers: {unknown} is none of {', '.join(map(str, OURS))}")
    return options


def cores() -> int:
    return len(os.sched_getaffinity(0))


def systems_of(workers: int, servers: list[int], peer: str) -> list[str]:
    """What is compared at so many workers: no more servers beside them than there are workers."""
    ours = [OURS[count] for count in servers if count == 1 or count <= workers]
    return [*ours, *([peer] if peer and workers > 1 else [])]


def at(rate: str, workers: int, options: argparse.Namespace, logs: Path) -> list[dict[str, Any]]:
    """The rows of one number of workers."""
    names = systems_of(workers, list(map(int, options.servers.split(","))), options.peer)
    given = argparse.Namespace(
        systems=",".join(names),
        workers=workers,
        rounds=options.rounds,
        seconds=options.seconds,
        least_steps=2,
        fresh=False,
        cache=options.cache,
    )
    result = compare(rate, options.size, given, logs)
    if "skipped" in result:
        return [{"workers": workers, "servers": 0, "failure": result["skipped"]}]
    return [brief(row, workers) for row in result["rows"]]


def brief(row: dict[str, Any], workers: int) -> dict[str, Any]:
    """What a row of `step.py` says here."""
    servers = next((count for count, name in OURS.items() if name == row["system"]), 0)
    about = {
        "workers": workers,
        "servers": servers,
        "system": row["system"],
        "processes": workers + servers,
    }
    if "failure" in row:
        return {**about, "failure": row["failure"]}
    keys = ("best_s", "median_s", "cpu_s", "floor_s", "link_mb", "replicas_equal", "versions")
    return {**about, **{key: row[key] for key in keys}, **SYSTEM_TEXT[row["system"]]}


SYSTEM_TEXT = {name: {"text": system.text} for name, system in SYSTEMS.items()}


HEAD = (
    "workers",
    "system",
    "servers",
    "processes",
    "best ms",
    "median ms",
    "CPU ms",
    "floor ms",
    "median / floor",
    "link MB",
)


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    title = "### {rate}, {size} values, {cores} cores".format(**result)
    lines = [f"| {' | '.join(HEAD)} |", "|--:|---" + "|--:" * (len(HEAD) - 2) + "|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in result["rows"]]
    return "\n".join([f"\n{title}\n", *lines])


def cells(row: dict[str, Any]) -> list[str]:
    if "failure" in row:
        reason = row["failure"].replace("|", "/")
        named = row.get("system", "")
        return [str(row["workers"]), f"{named} not measured: {reason}", *[""] * (len(HEAD) - 2)]
    floor = row["floor_s"]
    return [
        str(row["workers"]),
        row["system"],
        str(row["servers"] or ""),
        str(row["processes"]),
        *(f"{row[key] * 1e3:.1f}" for key in ("best_s", "median_s", "cpu_s")),
        f"{floor * 1e3:.1f}" if floor else "",
        f"{row['median_s'] / floor:.2f}" if floor else "",
        f"{row['link_mb']:.2f}" if floor else "",
    ]


if __name__ == "__main__":
    main()

"""Memory of each process in bytes per parameter, by recipe and by the residual's type.

    python bench/memory.py --quick
    python bench/memory.py --size 25M --cases server-adam,server-adam:bf16,qadam-1bit,ddp-fp32

A job of 2 workers does a few steps with gradients given; then the peak of resident memory (VmHWM)
is read of every process and of it taken what that process held when its libraries were imported.
The peak includes what starting took, and page granularity. A worker's weights and gradients (8
bytes) are the model's own, and the pool that the benchmark cuts its gradients from is the
benchmark's: `overhead` is what is left, the system's own. `server payloads` is what all workers'
staged pushes of one round take at most. Each case is a job of its own, started for it alone.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers.processes import FailedError, Running, Site, ending
from peers.shapes import SIZES, numel, shapes_of
from peers.systems import PSQ_1BIT, SYSTEMS, Psq, Setup
from peers.venvs import UnavailableError, default_cache

from psq.presets import preset

F32 = 4
KB = 1024
STEPS = 4
WORKERS = 2
BITS = 8
ONE_BIT = "server-adam-1bit"
CASES = (
    "server-adam,server-adam:bf16,server-adam-1bit,server-adam-1bit:bf16,"
    "qadam-1bit,qadam-1bit:bf16,local-adam,ddp-fp32,powersgd-1"
)


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="psq-bench-") as logs:
        setup = Setup(options.size, WORKERS, Site(None, Path(logs)), options.cache)
        rows = [measure(case, setup) for case in options.cases.split(",")]
    result = {"size": options.size, "numel": setup.numel, "workers": WORKERS, "rows": rows}
    print(json.dumps(result) if options.json else table(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="25M", help=", ".join(SIZES))
    parser.add_argument("--cases", default=CASES, help="RECIPE[:bf16] or a system of step.py")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="1M, two cases")
    options = parser.parse_args()
    if options.quick:
        options.size, options.cases = "1M", "server-adam-1bit,ddp-fp32"
    return options


def measure(case: str, setup: Setup) -> dict[str, Any]:
    """One job: started, a few steps, weighed."""
    name, _, residual = case.partition(":")
    row: dict[str, Any] = {"case": name, "residual": ""}
    try:
        if name in SYSTEMS:
            how: Any = SYSTEMS[name]
        else:
            how = psq_of(name, residual or "f32")
            row["residual"] = residual or "f32"
        with ending(Running()) as running:
            how.start(setup, running)
            running.steps(STEPS)
            peaks = running.peaks_kb()
    except (FailedError, UnavailableError, ValueError) as error:
        return {**row, "failure": str(error)}
    staged = WORKERS * payload_bytes(name, setup.numel)
    return row | weighed(peaks, setup, staged)


def psq_of(name: str, residual: str) -> Psq:
    if name == ONE_BIT:
        return Psq(*PSQ_1BIT, residual=residual)
    preset(name)  # says so if there is none of that name
    return Psq(name, residual=residual)


def payload_bytes(name: str, values: int) -> float:
    """Of one worker's push, by the codec's bits; scales are in the server's slack."""
    from psq.codec import get_codec  # noqa: PLC0415 - with the recipe's codec only

    if name in SYSTEMS:
        return 0.0
    spec = PSQ_1BIT[1] if name == ONE_BIT else preset(name).uplink.codec
    shard = 1 << 20
    return values * get_codec(spec).nbytes(shard) / shard


def weighed(peaks_kb: dict[str, int], setup: Setup, staged: float) -> dict[str, Any]:
    """Bytes per parameter of the largest worker and the largest server."""
    total = setup.numel
    pool = max(map(numel, shapes_of(setup.size))) * F32
    kinds = {
        kind: max((kb * KB for name, kb in peaks_kb.items() if name.startswith(kind)), default=0)
        for kind in ("worker", "server")
    }
    own = kinds["worker"] - pool
    return {
        "worker": own / total,
        "overhead": own / total - 2 * F32,
        "server": kinds["server"] / total,
        "server_payloads": staged / total,
    }


HEAD = ("recipe or system", "residual", "worker", "overhead", "server", "of it payloads")


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "### {size} ({numel:,} values), {workers} workers, bytes per parameter\n".format(**result),
        f"| {' | '.join(HEAD)} |",
        "|---|---" + "|--:" * (len(HEAD) - 2) + "|",
    ]
    return "\n".join(lines + [f"| {' | '.join(cells(row))} |" for row in result["rows"]])


def cells(row: dict[str, Any]) -> list[str]:
    if "failure" in row:
        reason = row["failure"].replace("|", "/")
        return [row["case"], row["residual"], f"not measured: {reason}", *[""] * 3]
    figures = [f"{row[key]:.2f}" for key in ("worker", "overhead")]
    server = (
        [f"{row['server']:.2f}", f"{row['server_payloads']:.2f}"] if row["server"] else ["", ""]
    )
    return [row["case"], row["residual"], *figures, *server]


if __name__ == "__main__":
    main()

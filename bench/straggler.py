"""One worker several times slower than the others: how many rounds a second are left of those
without it?

    python bench/straggler.py                          # bsp and ssp:8, 4 workers, one 4 x slower
    python bench/straggler.py --rules ssp:8,asp --slowness 10 --json

Every run is `psq launch` with real processes over loopback. Computing is waiting (`--compute`
seconds a step), because what matters is that a worker is late, and so that any number of workers
fits on few cores. For each rule two jobs take turns, `--repeats` times: all workers equally fast,
and the last one slow. Counted are the server's versions, as the first worker sees them, between the
end of a warm-up and the end of its time.

Printed is the ratio of the rounds a second with the straggler to those without: of the best runs,
and the median over pairs; and how stale contributions were at most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

WARM_UP_SHARE = 0.3  # of the time: a deadline needs samples
LIMIT_S = 120.0  # beyond a run's own time: start and end


@dataclass(frozen=True)
class Run:
    """What one job came to."""

    rounds_per_s: float
    max_staleness: int


def main() -> None:
    given = parse()
    if given.worker:
        work(given)
        return
    tables = [compare(rule, given) for rule in given.rules.split(",,")]
    text = json.dumps(tables, indent=1) if given.json else table(tables)
    sys.stdout.write(text + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rules", default="bsp,,ssp:8", help="separated by two commas")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--slowness", type=float, default=4.0)
    parser.add_argument("--compute", type=float, default=0.2, help="seconds a step")
    parser.add_argument("--seconds", type=float, default=20.0, help="of one run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=256, help="of the model's two layers")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(rule: str, given: argparse.Namespace) -> dict[str, object]:
    pairs = []
    for _ in range(given.repeats):
        alike, late = run(rule, 1.0, given), run(rule, given.slowness, given)
        pairs.append((alike, late))
    best = [max(run.rounds_per_s for run in runs) for runs in zip(*pairs, strict=True)]
    return {
        "rule": rule,
        "slowness": given.slowness,
        "rounds_per_s": round(best[0], 2),
        "with_straggler": round(best[1], 2),
        "ratio_best": round(best[1] / best[0], 3),
        "ratio_median": round(
            statistics.median(late.rounds_per_s / alike.rounds_per_s for alike, late in pairs), 3
        ),
        "max_staleness": max(late.max_staleness for _, late in pairs),
    }


def run(rule: str, slowness: float, given: argparse.Namespace) -> Run:
    """One job under `psq launch`."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "rate.json"
        mine = {"compute": given.compute, "seconds": given.seconds, "width": given.width}
        mine |= {"slowness": slowness, "slow": given.workers - 1, "told": str(told)}
        command = [str(Path(sys.executable).with_name("psq")), "launch", "--json"]
        command += ["-n", str(given.workers), "--consistency", rule, "--uplink", "sign"]
        command += ["--downlink", "delta:sign", str(Path(__file__).resolve())]
        done = subprocess.run(
            [*command, "--", "--worker", json.dumps(mine)],
            capture_output=True,
            text=True,
            timeout=given.seconds * (1 + slowness) + LIMIT_S,
            check=False,
        )
        if done.returncode:
            sys.exit(f"psq launch ended with {done.returncode}:\n{done.stderr[-2000:]}")
        measured = json.loads(told.read_text())
        stale = json.loads(done.stdout)["staleness"]["max"]
    return Run(measured["rounds"] / measured["seconds"], stale)


def work(given: argparse.Namespace) -> None:
    """One worker's part of a run."""
    import torch  # noqa: PLC0415 - the parent does without
    from torch import nn  # noqa: PLC0415

    import psq.torch  # noqa: PLC0415

    mine = json.loads(given.worker)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(mine["width"], mine["width"]) for _ in range(2)))
    rates = []
    with psq.torch.Worker(model, lr=1e-4) as worker:
        wait_s = mine["compute"] * (mine["slowness"] if worker.rank == mine["slow"] else 1.0)
        ends_s = warm_s = 0.0
        report = None
        while not rates or time.monotonic() < ends_s:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            time.sleep(wait_s)
            report = worker.step()
            now_s = time.monotonic()
            if not ends_s:  # everybody is there
                ends_s = now_s + mine["seconds"]
                warm_s = now_s + WARM_UP_SHARE * mine["seconds"]
            if now_s >= warm_s:
                rates.append((now_s, report.version))
    if worker.rank == 0:
        (from_s, first), (to_s, last) = rates[0], rates[-1]
        measured = {"rounds": last - first, "seconds": to_s - from_s}
        Path(mine["told"]).write_text(json.dumps(measured))


def table(rows: list[dict[str, object]]) -> str:
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "--|" * len(head)]
    lines += ["| " + " | ".join(str(row[key]) for key in head) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

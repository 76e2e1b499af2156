"""What a timeline costs, and what it looks like.

    python bench/timeline.py                                   steps with and without, by turns
    python bench/timeline.py --picture docs/timeline.png       a job over a slow link, drawn

The cost: one job of real processes with gradients given, whose workers record in every other step
(on, off, off, on: `peers/psq_toggled.py`), so that both kinds of steps see the same machine; a job
beside it would differ by more than the per cent that is looked for. The second row compares steps
without a timeline among themselves in the same way: what noise makes of it. The server records all
the while, since it cannot be told otherwise; what its spans and the workers' take by themselves,
measured in this process, stands below.

The picture: two workers and two servers, each beside a worker on a machine of its own, joined by
links of --rate (loopback where that cannot be had); the recipe is --recipe. Some rounds in the
middle of the job are drawn. It also says how much of the servers' work fell into time in which some
worker encoded, and how many shards were reduced while a later one was being encoded.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import netns
import step as steps
from peers.processes import Running
from peers.systems import SERVER, SYSTEMS, Psq, Setup, System, workers
from peers.venvs import default_cache

from psq.timeline import Phase, Timeline
from psq.trace import merge

PEERS = Path(__file__).parent / "peers"
PATTERN = (True, False, False, True)  # as in peers/psq_toggled.py
WORKERS = 2
VARIABLE = "PSQ_TIMELINE_FILENAME"
Event = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="25M")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=40, help="in a round")
    parser.add_argument("--json", action="store_true", help="the cost")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--rate", default="10gbit")
    parser.add_argument("--recipe", default="server-adam")
    parser.add_argument("--drawn", type=int, default=2, help="rounds in the picture")
    parser.add_argument("--keep", type=Path, help="write the picture's trace here as well")
    options = parser.parse_args()
    options.fresh, options.seconds = False, 1.0
    with tempfile.TemporaryDirectory(prefix="psq-timeline-") as folder:
        if options.picture is None:
            print(cost(options, Path(folder)))
        else:
            print(picture(options, Path(folder)))


# ---- what it costs


def cost(options: argparse.Namespace, folder: Path) -> str:
    system = System("psq-toggled", "", toggled, SYSTEMS["psq"].transfers, warm_up=len(PATTERN))
    count = max(1, options.steps // len(PATTERN)) * len(PATTERN)
    seat = steps.Seat(traced(system, folder / "t.json"), count=count)
    with steps.site_of(steps.LOOPBACK, WORKERS, folder) as site:
        setup = Setup(options.size, WORKERS, site, default_cache())
        try:
            for _ in range(options.rounds):
                steps.take_turn(seat, setup, options, last=False)
        finally:
            steps.end(seat)
    if seat.failure:
        raise SystemExit(seat.failure)
    spans = spans_per_step(sorted(folder.glob("t.*.json")))
    times = [step for steps_s in seat.rounds for step in steps_s]
    if options.json:
        return json.dumps(figures(options.size, times, spans=spans, span_s=span_cost_s()))
    return cost_table(options, times, spans=spans, span_s=span_cost_s())


def toggled(setup: Setup, running: Running) -> None:
    how = Psq("server-adam", "sign", "delta:sign")
    endpoint = how._server(setup, running, SERVER)  # noqa: SLF001 - as `Psq.start` does
    argv = [sys.executable, str(PEERS / "psq_toggled.py"), "--connect", endpoint]
    env = {"PSQ_UPLINK": "sign", "PSQ_DOWNLINK": "delta:sign"}
    running.ready(workers(setup, running, argv, env))


def figures(
    size: str, times: list[float], *, spans: dict[str, float], span_s: float
) -> dict[str, Any]:
    """What the table says, for programs."""
    groups = [times[place :: len(PATTERN)] for place in range(len(PATTERN))]
    on, off = groups[0] + groups[3], groups[1] + groups[2]
    return {
        "size": size,
        "steps": len(times),
        "step_with_by_without_best": min(on) / min(off),
        "step_with_by_without_median": statistics.median(on) / statistics.median(off),
        "noise_best": min(groups[1]) / min(groups[2]),
        "noise_median": statistics.median(groups[1]) / statistics.median(groups[2]),
        "spans_a_step_at_most": max(spans.values()),
        "span_us": span_s * 1e6,
        "spans_share_of_best_step": max(spans.values()) * span_s / min(off),
    }


def cost_table(
    options: argparse.Namespace, times: list[float], *, spans: dict[str, float], span_s: float
) -> str:
    """`times`: of steps that follow PATTERN, from its beginning on."""
    groups = [times[place :: len(PATTERN)] for place in range(len(PATTERN))]
    on, off = groups[0] + groups[3], groups[1] + groups[2]
    each = ", ".join(f"{name} {count:.0f}" for name, count in spans.items())
    share = max(spans.values()) * span_s / min(off)
    return (
        f"{options.size} values, {WORKERS} workers, 1 server, loopback, 1 bit both ways, "
        f"{len(times)} steps in turns of on, off, off, on\n\n"
        "| step time as ratios | best | median |\n|---|--:|--:|\n"
        f"| with timeline / without | {ratios(on, off)} |\n"
        f"| without / without: noise | {ratios(groups[1], groups[2])} |\n\n"
        f"spans a step: {each} (workers in half of them); {span_s * 1e6:.2f} us each: at most "
        f"{share:.2%} of the best step ({min(off) * 1e3:.1f} ms)"
    )


def ratios(one: list[float], other: list[float]) -> str:
    best, middle = min(one) / min(other), statistics.median(one) / statistics.median(other)
    return f"{best:.3f} | {middle:.3f}"


def span_cost_s(count: int = 20_000) -> float:
    """One span, its clock included, while the ring is being filled for the first time."""
    best = float("inf")
    for _ in range(5):
        recorder = Timeline()
        before_s = time.perf_counter()
        for number in range(count):
            recorder.add(Phase.ENCODE, 1.0, time.monotonic(), number, 7, 1, 100)
        best = min(best, time.perf_counter() - before_s)
    return best / count


def spans_per_step(parts: Iterable[Path]) -> dict[str, float]:
    counts = {}
    for part in parts:
        trace = json.loads(part.read_text())
        spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
        rounds = {event["args"]["round"] for event in spans} - {-1}
        counts[trace["otherData"]["process"]] = len(spans) / len(rounds)
    return counts


def traced(system: System, path: Path) -> System:
    """The same system, recording in all its processes."""

    def start(setup: Setup, running: Running) -> None:
        with variable(VARIABLE, str(path)):
            system.start(setup, running)

    return replace(system, name=f"{system.name}-traced", start=start)


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


# ---- what it looks like


def picture(options: argparse.Namespace, folder: Path) -> str:
    rate = options.rate
    if rate != steps.LOOPBACK and netns.unavailable():
        rate = steps.LOOPBACK
    how = Psq(options.recipe, beside=WORKERS)
    system = System("psq", "", how.start, how.transfers)
    seat = steps.Seat(traced(system, folder / "t.json"), count=10)
    with steps.site_of(rate, WORKERS, folder) as site:
        setup = Setup(options.size, WORKERS, site, default_cache())
        steps.take_turn(seat, setup, options, last=True)
    if seat.failure:
        raise SystemExit(seat.failure)
    output = options.keep or folder / "t.json"
    merge(sorted(folder.glob("t.*.json")), output)
    spans = load(output)
    first = max(span["args"]["round"] for span in spans) // 2
    title = (
        f"{options.recipe}, {options.size} values, {WORKERS} workers and {WORKERS} servers, {rate}:"
        f" {options.drawn} rounds, gradients given; colours are shards"
    )
    draw(options.picture, title, spans, range(first, first + options.drawn))
    return f"{options.picture}: {title}\n{overlap_words(spans)}"


def load(path: Path) -> list[Event]:
    """The spans of a trace, each with its process's name."""
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    return [{**event, "process": names[event["pid"]]} for event in events if event["ph"] == "X"]


def overlap_words(spans: list[Event]) -> str:
    reduces = [span for span in spans if span["name"] == "reduce"]
    encodes = [span for span in spans if span["name"] == "encode"]
    hidden = sum(sum(shared(r, e) for e in union(encodes)) for r in reduces)
    total = sum(r["dur"] for r in reduces)
    ahead = sum(any(is_next(e, r) and shared(r, e) > 0 for e in encodes) for r in reduces)
    return (
        f"{hidden / total:.0%} of the servers' {total / 1e3:.0f} ms of reducing fell into time in "
        f"which a worker encoded; {ahead} of {len(reduces)} shards were reduced while a later one "
        "of the same round was being encoded"
    )


def is_next(encode: Event, reduce: Event) -> bool:
    one, other = encode["args"], reduce["args"]
    return bool(one["round"] == other["round"] and one["shard"] > other["shard"])


def shared(one: Event, other: Event) -> float:
    """Microseconds in which both were under way."""
    end = min(one["ts"] + one["dur"], other["ts"] + other["dur"])
    return float(max(0.0, end - max(one["ts"], other["ts"])))


def union(spans: list[Event]) -> list[Event]:
    """Stretches in which at least one of them was under way."""
    joined: list[Event] = []
    for span in sorted(spans, key=lambda each: each["ts"]):
        if joined and span["ts"] <= joined[-1]["ts"] + joined[-1]["dur"]:
            end = max(joined[-1]["ts"] + joined[-1]["dur"], span["ts"] + span["dur"])
            joined[-1]["dur"] = end - joined[-1]["ts"]
        else:
            joined.append({"ts": span["ts"], "dur": span["dur"]})
    return joined


def draw(path: Path, title: str, spans: list[Event], rounds: range) -> None:
    import matplotlib as mpl  # noqa: PLC0415 - the cost needs none

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - as above

    drawn = [span for span in spans if span["args"]["round"] in rounds]
    start = min(s["ts"] for s in drawn if s["name"] in ("compute", "encode"))
    end = max(s["ts"] + s["dur"] for s in drawn)
    rows: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for span in spans:  # a server's waits are of no round
        if span["ts"] < end and span["ts"] + span["dur"] > start:
            rows[span["pid"], span["tid"]].append(span)
    shards = 1 + max(span["args"]["shard"] for span in spans)
    figure, axes = plt.subplots(figsize=(14, 0.28 * len(rows) + 1.6), layout="constrained")
    labels = []
    for place, key in enumerate(sorted(rows)):
        first = rows[key][0]
        labels.append(f"{first['process']}  {first['name']}")
        bars = [((s["ts"] - start) / 1e3, s["dur"] / 1e3) for s in rows[key]]
        colours = [colour(plt.get_cmap("turbo"), s["args"]["shard"], shards) for s in rows[key]]
        axes.broken_barh(bars, (place - 0.42, 0.84), facecolors=colours, linewidth=0)
    for place, (one, other) in enumerate(zip(sorted(rows), sorted(rows)[1:], strict=False)):
        if one[0] != other[0]:
            axes.axhline(place + 0.5, color="0.6", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8, family="monospace")
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, (end - start) / 1e3)
    axes.set_xlabel("milliseconds")
    axes.set_title(title, fontsize=10, loc="left")
    figure.savefig(path, dpi=110)


def colour(table: Any, shard: int, shards: int) -> Any:
    return "0.75" if shard < 0 else table(0.05 + 0.9 * shard / max(1, shards - 1))


if __name__ == "__main__":
    main()

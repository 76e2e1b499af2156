"""Predicted and measured seconds per step, and whether `codec = "auto"` chose well.

    python bench/advise.py --quick                     loopback, 1 M values: a minute
    python bench/advise.py --cases 100mbit:1M,1gbit:11.7M,10gbit:25M,25gbit:25M,loopback:25M

Every fixed candidate of `psq advise` and auto itself do steps in turn (`step.py` says how a step is
measured), each machine a network namespace with a shaped link; all of them share the cores of this
one, which the prediction is told. Auto is told nothing: it probes the link as on any cluster.

`predicted` comes from rates that are measured right before the case, with nothing else of it
running. `model` is predicted / best: the model knows of no other work on the machine. CPU is of
all processes, ms a step. Where this machine does not get a stream up to a fast link's rate, the
prediction is told what it gets; where that is less than half, the case is left out. At the end of a
case: what auto chose, the median over the rounds of auto's median step over that of the best
fixed candidate, and the same for the fixed candidate that auto took, which is the choice without
the noise of two runs of one and the same thing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import netns
from peers.processes import Running
from peers.shapes import SIZES, shapes_of
from peers.systems import Psq, Setup, System
from step import LOOPBACK, Seat, end, site_of, take_turn

from psq.advice import LOOPBACK as NO_LINK
from psq.advice import (
    Advice,
    Cluster,
    Link,
    Step,
    advise,
    candidates,
    copy_s,
    cores,
    measure_rates,
)
from psq.recipe import Recipe

CASES = "100mbit:1M,1gbit:11.7M,10gbit:25M,25gbit:25M,loopback:25M"
TCP_SHARE = netns.FRAME_PAYLOAD_BYTES / netns.FRAME_BYTES
ROUND_TRIP_S = 1e-4
LEAST_SHARE = 0.5
CHECKED_FROM_BIT_S = 5e9  # from here on it is not sure that this machine keeps up with the link
AUTO = "auto"


class Candidates:
    """The seats of one case, by the candidates' names; auto has the last."""

    def __init__(self) -> None:
        self.choices = candidates()
        self.seats = {
            c.name: Seat(_system(c.name, Psq(c.recipe, c.uplink, c.downlink))) for c in self.choices
        }
        self.seats[AUTO] = Seat(_system(AUTO, Psq("server-adam"), codec=AUTO))


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = []
    with tempfile.TemporaryDirectory(prefix="psq-bench-") as logs:
        for case in options.cases.split(","):
            rate, _, size = case.partition(":")
            results.append(run_case(rate, size, options, Path(logs)))
            if not options.json:
                print(table(results[-1]), flush=True)
    if options.json:
        print(json.dumps(results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=CASES, help="RATE:SIZE,...; sizes: " + ", ".join(SIZES))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of steps a seat and round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="loopback, 1M, 3 short rounds")
    options = parser.parse_args()
    if options.quick:
        options.cases, options.rounds, options.seconds = f"{LOOPBACK}:1M", 3, 0.3
    for case in options.cases.split(","):
        rate, _, size = case.partition(":")
        if size not in SIZES:
            parser.error(f"--cases: {case!r} has no size of {', '.join(SIZES)}")
        try:
            _ = rate == LOOPBACK or netns.rate_of(rate)
        except ValueError as error:
            parser.error(f"--cases: {error}")
    options.fresh, options.cache = False, Path()
    return options


def run_case(rate: str, size: str, options: argparse.Namespace, logs: Path) -> dict[str, Any]:
    result = {"rate": rate, "size": size, "workers": options.workers, "cores": cores()}
    stream_bit_s, reason = stream_of(rate)
    if reason:
        return {**result, "skipped": reason}
    result["stream_mbit_s"] = stream_bit_s / 1e6
    advice = predict(stream_bit_s, size, options.workers)
    table = Candidates()
    with site_of(rate, options.workers, logs) as site:
        setup = Setup(size, options.workers, site, options.cache)
        try:
            for turn in range(options.rounds):
                for seat in table.seats.values():
                    if not seat.failure:
                        take_turn(seat, setup, options, last=turn == options.rounds - 1)
        finally:
            for seat in table.seats.values():
                end(seat, at_once=sys.exc_info()[0] is not None)
    return result | outcome(table, advice)


def stream_of(rate: str) -> tuple[float, str]:
    """Bits per second that a stream gets of a link, and why the case cannot be measured, if so."""
    if rate == LOOPBACK:
        return math.inf, ""
    if reason := netns.unavailable():
        return 0.0, reason
    nominal = netns.rate_of(rate)
    if nominal < CHECKED_FROM_BIT_S:
        return nominal * TCP_SHARE, ""
    found = netns.measure(rate, 1.0)
    if found["share"] < LEAST_SHARE:
        share = f"{found['share']:.2f}"
        return 0.0, f"one stream gets {share} of this rate: the machine would be measured, no link"
    return found["payload_bit_s"], ""


def predict(bit_s: float, size: str, workers: int) -> Advice:
    """What `psq advise --one-machine` says of the case."""
    link = NO_LINK if math.isinf(bit_s) else Link(bit_s, bit_s, ROUND_TRIP_S)
    cluster = Cluster(workers, 1, link, one_machine=True, cores=cores(), copy_s=copy_s())
    specs = [(f"p{i}", shape) for i, shape in enumerate(shapes_of(size))]
    numel = sum(math.prod(shape) for _, shape in specs)
    lanes = min(cores(), workers + 1)
    rates = measure_rates(candidates(), workers=workers, numel=numel, lanes=lanes)
    return advise(Step(specs, cluster), rates, candidates())


def outcome(table: Candidates, advice: Advice) -> dict[str, Any]:
    predicted = {o.candidate.name: o.prediction for o in advice.options}
    rows = []
    for name, seat in table.seats.items():
        row: dict[str, Any] = {"name": name, "failure": seat.failure}
        if not seat.failure:
            row["median_s"] = statistics.median(step for steps in seat.rounds for step in steps)
            row["best_s"] = min(map(min, seat.rounds))
            row["cpu_s"] = statistics.median(seat.cpu_s)
        if name in predicted:
            row["predicted_s"] = predicted[name].step_s
            row["predicted_cpu_s"] = predicted[name].cpu_s
            row["bottleneck"] = predicted[name].bottleneck
        rows.append(row)
    return {"rows": rows, "predicted_choice": advice.chosen.candidate.name, **auto_of(table)}


def auto_of(table: Candidates) -> dict[str, Any]:
    """What auto chose, and how much slower that is than the best."""
    auto = table.seats[AUTO]
    fixed = {n: s for n, s in table.seats.items() if n != AUTO and not s.failure}
    if auto.failure or not fixed:
        return {}
    medians = {name: [statistics.median(r) for r in seat.rounds] for name, seat in fixed.items()}
    best = min(medians, key=lambda name: statistics.median(medians[name]))
    words = auto.versions.get("codec=auto", "")
    taken = next(
        (c.name for c in table.choices if c.name in medians and codecs(c.make()) in words), ""
    )
    own = [statistics.median(steps) for steps in auto.rounds]
    return {
        "best": best,
        "chosen": taken,
        "words": words,
        "auto_over_best": ratio(own, medians[best]),
        "chosen_over_best": ratio(medians[taken], medians[best]) if taken else None,
    }


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=False))


def codecs(recipe: Recipe) -> str:
    down = recipe.downlink
    return f"{recipe.uplink.codec} up, {down.kind} {down.codec} down"


def _system(name: str, psq: Psq, codec: str = "") -> System:
    def start(setup: Setup, running: Running) -> None:
        with environment({"PSQ_CODEC": codec} if codec else {}):
            psq.start(setup, running)

    return replace(System(name, name, psq.start, psq.transfers), start=start)


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """What processes that are started meanwhile inherit besides."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    title = "### {rate}, {size} values, {workers} workers, 1 server, {cores} cores".format(**result)
    if math.isfinite(result.get("stream_mbit_s", math.inf)):
        title += ", a stream gets {stream_mbit_s:,.0f} Mbit/s".format(**result)
    if "skipped" in result:
        return f"\n{title}\n\nskipped: {result['skipped']}"
    lines = [
        "| codecs | predicted ms | measured: median | best | model | CPU: predicted | seen | by |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
        *map(line, result["rows"]),
    ]
    words = ""
    if result.get("chosen"):
        words = (
            "\nauto chose {chosen}, the fastest was {best}: auto / best {auto_over_best:.3f}, "
            "chosen / best {chosen_over_best:.3f}; the model, told all: {predicted_choice}\n"
            "({words})"
        ).format(**result)
    return "\n".join([f"\n{title}\n", *lines, words])


def line(row: dict[str, Any]) -> str:
    if row["failure"]:
        return f"| {row['name']} | not measured: {row['failure'].replace('|', '/')} | | | | | | |"
    share = row["predicted_s"] / row["best_s"] if "predicted_s" in row else None
    cells = [
        ms(row, "predicted_s"),
        ms(row, "median_s"),
        ms(row, "best_s"),
        f"{share:.2f}" if share else "",
        ms(row, "predicted_cpu_s"),
        ms(row, "cpu_s"),
        row.get("bottleneck", ""),
    ]
    return f"| {row['name']} | {' | '.join(cells)} |"


def ms(row: dict[str, Any], key: str) -> str:
    return f"{1e3 * row[key]:.1f}" if key in row else ""


if __name__ == "__main__":
    main()

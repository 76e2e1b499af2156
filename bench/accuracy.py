"""Time to accuracy over a slow link: psq and what one could pick instead, real training.

    python bench/accuracy.py                                fashion-mnist, 100 Mbit/s, one seed
    python bench/accuracy.py --seeds 0 1 2 --rate 100mbit --target 0.88 --json runs/accuracy.json
    python bench/accuracy.py --read runs/accuracy.json --picture docs/accuracy.png

Every system trains the same model on the same batches from the same initial weights, with the same
learning rates (`peers/train.py`), a network namespace for each machine; psq's server has a machine
of its own. Systems take turns: a turn is `--turn` steps of each, then rank 0 scores the model on
all test images. Only steps are timed, rank 0's, and only while a system has its turn: what disturbs
the machine disturbs all. `seconds to target` is the time of all turns up to the first score at or
above the target. Bytes are what the busiest way of a link carried, frame headers included. A system
that has trained for longer than `--give-up-s` takes no more turns.

Wall times hold for the machine they were measured on: all processes share its cores, so forward and
backward take longer than on machines of their own, and the link matters less than it would there.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import netns
from peers.processes import Child, FailedError, Running, Site
from peers.systems import HERE, Psq, Setup, machines, workers

MB = 1e6
SCRIPT = str(HERE / "train.py")


@dataclass(frozen=True)
class System:
    """What takes gradients to new weights: psq with a recipe, or torch with a hook."""

    name: str
    text: str
    recipe: str = ""
    hook: str = ""
    settings: tuple[tuple[str, str], ...] = ()

    def start(self, setup: Setup, running: Running, options: argparse.Namespace, seed: int) -> None:
        job = ["--task", options.task, "--steps", str(options.steps), "--seed", str(seed)]
        if self.recipe:
            env = {"PSQ_RECIPE": self.recipe, **dict(self.settings)}
            argv = [sys.executable, SCRIPT, "--system", "psq", *job]
            connect = ",".join(Psq(self.recipe).servers(setup, running))
            running.ready(workers(setup, running, [*argv, "--connect", connect], env))
        else:
            running.ready(self._ddp(setup, running, job))

    def _ddp(self, setup: Setup, running: Running, job: Sequence[str]) -> list[Child]:
        argv = [sys.executable, SCRIPT, "--system", self.hook, *job]
        env = {"GLOO_SOCKET_IFNAME": setup.site.interface()}
        store = ["--store", f"{setup.site.address('worker0')}:0"]
        first = workers(setup, running, [*argv, *store], env, ranks=[0])
        store = ["--store", first[0].hear("at")["at"]]
        rest = workers(setup, running, [*argv, *store], env, ranks=range(1, setup.workers))
        return first + rest


def _local(steps: int) -> System:
    return System(
        f"psq-local-{steps}",
        f"psq, {steps} local steps a round, 1 bit each way",
        "local-adam",
        settings=(("PSQ_LOCAL_STEPS", str(steps)),),
    )


TOPK = (("PSQ_UPLINK", "topk:k=4"), ("PSQ_DOWNLINK", "delta:topk:k=4"))
SYSTEMS = {
    system.name: system
    for system in (
        System("psq-default", "psq, server-adam: 4 bits up, 3 down", "server-adam"),
        System("psq-1bit", "psq, qadam-1bit: 1 bit each way", "qadam-1bit"),
        _local(4),
        _local(8),
        _local(16),
        System("psq-topk", "psq, 4 of 1,024 values each way", "qadam-1bit", settings=TOPK),
        System("ddp-fp32", "torch DDP over gloo", hook="none"),
        System("ddp-bf16", "torch DDP, bf16 hook", hook="bf16"),
        System("powersgd-1", "torch DDP, PowerSGD rank 1", hook="powersgd:1"),
        System("powersgd-2", "torch DDP, PowerSGD rank 2", hook="powersgd:2"),
        System("powersgd-4", "torch DDP, PowerSGD rank 4", hook="powersgd:4"),
    )
}
DEFAULT = "psq-local-8,psq-local-16,psq-1bit,ddp-fp32,ddp-bf16,powersgd-1,powersgd-2,powersgd-4"


@dataclass
class Seat:
    """One system's training: a point is (steps, seconds, bytes, score), one for each turn."""

    system: System
    running: Running = field(default_factory=Running)
    failure: str = ""
    gave_up: bool = False
    points: list[tuple[int, float, float, float]] = field(default_factory=list)

    @property
    def done(self) -> int:
        return self.points[-1][0] if self.points else 0


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.read:
        runs = [run for path in options.read for run in json.loads(path.read_text())]
    elif reason := netns.unavailable():
        print(f"skipped: {reason}")
        return
    else:
        runs = []
        with tempfile.TemporaryDirectory(prefix="psq-bench-") as logs:
            for seed in options.seeds:
                runs.append(train(options, seed, Path(logs)))
                if options.json:
                    options.json.write_text(json.dumps(runs))
    print(table(runs, options.target))
    if options.picture:
        draw(runs, options.target, options.picture)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="systems: " + ", ".join(SYSTEMS),
    )
    parser.add_argument("--task", default="fashion-mnist")
    parser.add_argument("--rate", default="100mbit", help="of every link, each way")
    parser.add_argument("--systems", default=DEFAULT)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--turn", type=int, default=32, help="steps between two scores")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--target", type=float, default=0.88)
    parser.add_argument("--give-up-s", type=float, default=600.0)
    parser.add_argument("--json", type=Path, help="write all points here, after each seed")
    parser.add_argument(
        "--read", type=Path, nargs="+", help="train nothing, show what --json has written"
    )
    parser.add_argument("--picture", type=Path, help="a PNG")
    options = parser.parse_args()
    for name in options.systems.split(","):
        if name not in SYSTEMS:
            parser.error(f"--systems: {name!r} is none of {', '.join(SYSTEMS)}")
    if min(options.workers, options.steps, options.turn) < 1 or options.steps % options.turn:
        parser.error("--workers, --steps and --turn are positive, and turns fill the steps")
    return options


# ---- training


def train(options: argparse.Namespace, seed: int, logs: Path) -> dict[str, Any]:
    """All systems, in turns."""
    seats = [Seat(SYSTEMS[name]) for name in options.systems.split(",")]
    with netns.star(machines(options.workers), netns.rate_of(options.rate)) as net:
        setup = Setup(options.task, options.workers, Site(net, logs), logs)
        try:
            for seat in seats:
                attempt(seat, lambda seat=seat: begin(seat, setup, options, seed))
            while waiting := [seat for seat in seats if may_go_on(seat, options)]:
                for seat in waiting:
                    attempt(seat, lambda seat=seat: take_turn(seat, net, options))
        finally:
            for seat in seats:
                seat.running.end(at_once=sys.exc_info()[0] is not None or bool(seat.failure))
    rows = [
        {"system": s.system.name, "failure": s.failure, "gave_up": s.gave_up, "points": s.points}
        for s in seats
    ]
    told = ("task", "rate", "workers", "steps")
    versions = {k: v for seat in seats for k, v in seat.running.versions.items()}
    return {**{name: getattr(options, name) for name in told}, "seed": seed} | {
        "versions": versions,
        "rows": rows,
    }


def attempt(seat: Seat, act: Any) -> None:
    """A system that fails is out; the others go on."""
    try:
        act()
    except FailedError as error:
        seat.failure = str(error)
        seat.running.end(at_once=True)
        seat.running = Running()


def begin(seat: Seat, setup: Setup, options: argparse.Namespace, seed: int) -> None:
    seat.system.start(setup, seat.running, options, seed)


def may_go_on(seat: Seat, options: argparse.Namespace) -> bool:
    seat.gave_up = bool(seat.points) and seat.points[-1][1] > options.give_up_s
    return not seat.failure and not seat.gave_up and seat.done < options.steps


def take_turn(seat: Seat, net: netns.Star, options: argparse.Namespace) -> None:
    before = ways(net)
    said = seat.running.steps(options.turn)
    carried = max(after - was for after, was in zip(ways(net), before, strict=True))
    _, seconds, nbytes, _ = seat.points[-1] if seat.points else (0, 0.0, 0.0, 0.0)
    notes = said["notes"]
    point = (notes["step"], seconds + sum(said["steps"]), nbytes + carried, notes["score"])
    seat.points.append(point)
    print(f"{seat.system.name}: step {point[0]}, {point[1]:.1f} s, {point[3]:.4f}", file=sys.stderr)


def ways(net: netns.Star) -> list[int]:
    """Bytes that every way of every link has carried."""
    return [n for pair in net.sent_bytes().values() for n in pair]


# ---- what came out

HEAD = (
    "system",
    "steps to target",
    "seconds to target",
    "MB to target",
    "final score",
    "ms a step",
    "kB a step",
    "seeds",
)


def table(runs: Sequence[dict[str, Any]], target: float) -> str:
    """Markdown: medians over the seeds; a seed that did not reach the target makes it "never"."""
    first = runs[0]
    title = "{task}, {workers} workers, {rate}, {steps} steps".format(**first)
    lines = [f"\n### {title}, target {target:g}\n"]
    lines += [f"| {' | '.join(HEAD)} |", "|---" + "|--:" * (len(HEAD) - 1) + "|"]
    found: dict[str, dict[int, Any]] = {}
    for run in runs:
        for row in run["rows"]:
            found.setdefault(row["system"], {})[run["seed"]] = row
    for name, rows in found.items():
        words = [*cells(list(rows.values()), target), ", ".join(map(str, sorted(rows)))]
        lines.append(f"| {SYSTEMS[name].text} (`{name}`) | {' | '.join(words)} |")
    versions = [f"{name} {version}" for name, version in sorted(first["versions"].items())]
    return "\n".join([*lines, f"\n{', '.join(versions)}"])


def cells(rows: Sequence[dict[str, Any]], target: float) -> list[str]:
    failed = next((row["failure"] for row in rows if row["failure"]), "")
    if failed:
        return [f"not measured: {failed.replace('|', '/')}", *[""] * (len(HEAD) - 3)]
    hits = [next((p for p in row["points"] if p[3] >= target), None) for row in rows]
    reached = [hit for hit in hits if hit is not None]
    words = ["never"] * 3
    if len(reached) == len(hits):
        steps, seconds, nbytes, _ = (statistics.median(each) for each in zip(*reached, strict=True))
        words = [f"{steps:.0f}", f"{seconds:.1f}", f"{nbytes / MB:.2f}"]
    ends = [row["points"][-1] for row in rows]
    mark = f" (at step {ends[0][0]})" if rows[0]["gave_up"] else ""
    return [
        *words,
        f"{statistics.mean(end[3] for end in ends):.4f}{mark}",
        f"{1e3 * statistics.median(end[1] / end[0] for end in ends):.1f}",
        f"{statistics.median(end[2] / end[0] for end in ends) / 1e3:.1f}",
    ]


def draw(runs: Sequence[dict[str, Any]], target: float, path: Path) -> None:
    """Score against seconds and against bytes; the first seed's lines."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - a table needs no picture

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for row in runs[0]["rows"]:
        if not row["points"]:
            continue
        _, seconds, nbytes, scores = zip(*row["points"], strict=True)
        style = {"label": row["system"], "lw": 1.6}
        style |= {} if row["system"].startswith("psq") else {"ls": "--"}
        panels[0].plot(seconds, scores, **style)
        panels[1].plot([n / MB for n in nbytes], scores, **style)
    for panel, words in zip(panels, ("seconds", "MB on the busiest way of a link"), strict=True):
        panel.set(xlabel=words, xscale="log", ylim=(0.7, None))
        panel.axhline(target, color="#666666", lw=0.8, ls=":")
        panel.grid(visible=True, alpha=0.25)
    panels[0].set_ylabel("test accuracy")
    panels[1].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

"""Speed of the server's step as a share of what memory allows, and of the same passes one by one.

The limit is the in-place stream of the same pattern: `r3w3` flips the sign of three vectors (24
bytes a value), `r4w4` of four: x, m and v, and the residual of a delta. A round measures the
streams and every case in turn; a case's ratio of a round is stream time / case time, so that a slow
moment of the machine hits both. `best` compares the best times of all rounds, `median` is the
median of the rounds' ratios. 1.00 is the speed of memory. `passes` is the time of the same step as
separate passes over each shard (`psq.kernels.reference_server.compose` on the same level's
kernels) divided by the step's; a shard's vectors may stay in a large cache between those passes,
which --shard 25000000 prevents. One thread.

    python bench/server.py [--numel 25000000] [--rounds 15] [--levels v4,v3] [--workers 2,8]
                           [--uplinks sign log:k=2] [--shard 1048576] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from psq import kernels
from psq.codec import get_codec
from psq.kernels import ServerStep
from psq.kernels.reference_server import compose
from psq.layout import MAX_SHARD_NUMEL
from psq.optim import Adam
from psq.recipe import AdamConfig, preset

PIECE = 1 << 15
LR = 1e-3
VECTORS = ("x", "m", "v", "residual")
DEFAULT = preset("server-adam")
Vectors = dict[str, np.ndarray]
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One way to answer: its name, the stream it is compared with, its codec."""

    name: str
    stream: str
    downlink: str | None
    delta: bool = False


CASES = (
    Case("no answer", "r3w3", None),
    Case("weights 8 bits", "r3w3", "uniform:bits=8"),
    Case("delta sign", "r4w4", "sign", delta=True),
    Case(f"delta {DEFAULT.downlink.codec}", "r4w4", DEFAULT.downlink.codec, delta=True),
)


def main() -> None:
    options = parse()
    numel = options.numel // options.shard * options.shard
    rng = np.random.default_rng(1)
    vectors = {name: rng.random(numel, dtype=np.float32) for name in VECTORS}
    streams: dict[str, Call] = {
        f"r{n}w{n}": lambda n=n: flip([vectors[name] for name in VECTORS[:n]]) for n in (3, 4)
    }
    calls, compared = dict(streams), []
    for level in options.levels.split(","):
        for workers in map(int, options.workers.split(",")):
            for uplink in options.uplinks:
                for case in CASES:
                    steps = shard_steps(case, uplink, workers, vectors, options.shard)
                    name = f"{level} {uplink} W={workers} {case.name}"
                    calls[name], calls[f"{name} passes"] = runs(kernels.get(level), steps)
                    compared.append((name, case.stream))
    times = measure(calls, vectors["v"], options.rounds)
    report(compared, times, numel, as_json=options.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=25_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--levels", default=kernels.available()[0])
    parser.add_argument("--workers", default="2,8")
    parser.add_argument("--uplinks", nargs="+", default=["sign", DEFAULT.uplink.codec])
    parser.add_argument("--shard", type=int, default=MAX_SHARD_NUMEL)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def flip(vectors: list[np.ndarray]) -> None:
    for at in range(0, vectors[0].size, PIECE):
        for vector in vectors:
            piece = vector[at : at + PIECE]
            np.negative(piece, out=piece)


def shard_steps(
    case: Case, uplink: str, workers: int, vectors: Vectors, numel: int
) -> list[ServerStep]:
    """The steps of all shards of `numel` values, each with payloads of its own."""
    up, down = get_codec(uplink), get_codec(case.downlink or "fp32")
    adam = Adam(AdamConfig(), 0)
    adam.advance(LR)
    scratch = np.empty(numel, np.float32)
    rng = np.random.default_rng(2)
    steps = []
    for at in range(0, vectors["x"].size, numel):
        payload = np.empty(up.nbytes(numel), np.uint8)
        up.encode(rng.standard_normal(numel, dtype=np.float32), payload)
        names = VECTORS if case.delta else VECTORS[:3]
        state = {name: vectors[name][at : at + numel] for name in names}
        answer = None if case.downlink is None else np.zeros(down.nbytes(numel), np.uint8)
        steps.append(
            ServerStep(
                uplink=up.format,
                downlink=down.format,
                segments=[numel],
                payloads=[payload.copy() for _ in range(workers)],
                scratch=scratch,
                answer=answer,
                delta=case.delta,
                starts=[0],
                adam=adam.coefficients,
                **state,
            )
        )
    return steps


def runs(level: kernels.Kernels, steps: list[ServerStep]) -> tuple[Call, Call]:
    """The whole round in one pass, and pass by pass."""

    def one_pass() -> None:
        for step in steps:
            level.server_step(step)

    def passes() -> None:
        for step in steps:
            compose(level, step)

    return one_pass, passes


def measure(calls: dict[str, Call], v: np.ndarray, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        np.abs(v, out=v)  # the streams' flips leave a square below 0
    return times


def report(
    compared: list[tuple[str, str]], times: dict[str, list[float]], numel: int, *, as_json: bool
) -> None:
    rows = []
    for name, stream in compared:
        ratios = [s / c for s, c in zip(times[stream], times[name], strict=True)]
        rows.append(
            {
                "case": name,
                "stream": stream,
                "ms": min(times[name]) * 1e3,
                "best": min(times[stream]) / min(times[name]),
                "median": statistics.median(ratios),
                "passes": min(times[f"{name} passes"]) / min(times[name]),
            }
        )
    streams = {name: min(times[name]) * 1e3 for name in ("r3w3", "r4w4")}
    if as_json:
        print(json.dumps({"numel": numel, "streams_ms": streams, "cases": rows}))
        return
    print(
        f"{numel} values, one thread; " + ", ".join(f"{k} {v:.1f} ms" for k, v in streams.items())
    )
    print(f"{'':52}{'ms':>7}  best median   of    passes")
    for row in rows:
        print(
            f"{row['case']:52}{row['ms']:7.1f}  {row['best']:.2f}  {row['median']:.2f}   "
            f"{row['stream']}   {row['passes']:.2f}"
        )


if __name__ == "__main__":
    main()

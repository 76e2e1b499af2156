"""Speed of the server's step as a share of what memory allows, and of the same passes one by one.

The limit is the in-place stream of the same pattern: `r3w3` flips the sign of three vectors (24
bytes a value), `r4w4` of four: x, m and v, and the residual of a delta. A round measures the
streams and every case in turn; a case's ratio of a round is stream time / case time, so that a slow
moment of the machine hits both. `best` compares the best times of all rounds, `median` is the
median of the rounds' ratios. 1.00 is the speed of memory. `passes` is the time of the same step as
separate passes over each shard (`psq.kernels.reference_server.compose` on the same level's
kernels) divided by the step's; a shard's vectors may stay in a large cache between those passes,
which --shard 25000000 prevents.

The last line compares a whole step (2 workers, sign up, delta sign down) with torch's Adam alone,
fused, over as many values in the same rounds and on one thread: the bar is 1.5 times its time.

One thread; --threads 2 shares the shards out between two, for which the bar would be 1.3 times the
speed of one while the other core is idle. The server itself uses one: that core is its workers'.

    python bench/server.py [--numel 25000000] [--rounds 15] [--levels v4,v3] [--workers 2,8,32]
                           [--uplinks sign log:k=2] [--shard 1048576] [--threads 1] [--json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from psq import kernels
from psq.codec import get_codec
from psq.kernels import ServerStep
from psq.kernels.reference_server import compose
from psq.layout import MAX_SHARD_NUMEL
from psq.optim import Adam
from psq.presets import preset
from psq.recipe import AdamConfig

try:
    import torch
except ImportError:
    torch = None

PIECE = 1 << 15
LR = 1e-3
VECTORS = ("x", "m", "v", "residual")
DEFAULT = preset("server-adam")
Vectors = dict[str, np.ndarray]
Call = Callable[[], object]
TORCH = "torch's fused Adam"
WHOLE_STEP = "sign W=2 delta sign"  # what it is compared with


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
    if torch is not None:
        calls[TORCH] = torch_adam(numel)
    counts = list(map(int, options.workers.split(",")))
    payloads = {
        uplink: encoded(uplink, max(counts), options.shard, numel // options.shard)
        for uplink in options.uplinks
    }
    with ThreadPoolExecutor(options.threads) as pool:
        for level in options.levels.split(","):
            for workers, uplink, case in itertools.product(counts, options.uplinks, CASES):
                came = [each[:workers] for each in payloads[uplink]]
                steps = shard_steps(case, uplink, came, vectors, options)
                name = f"{level} {uplink} W={workers} {case.name}"
                calls[name], calls[f"{name} passes"] = runs(kernels.get(level), steps, pool)
                compared.append((name, case.stream))
        times = measure(calls, vectors["v"], options.rounds)
    report(compared, times, numel, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=25_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--levels", default=kernels.available()[0])
    parser.add_argument("--workers", default="2,8,32")
    parser.add_argument("--uplinks", nargs="+", default=["sign", DEFAULT.uplink.codec])
    parser.add_argument("--shard", type=int, default=MAX_SHARD_NUMEL)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def flip(vectors: list[np.ndarray]) -> None:
    for at in range(0, vectors[0].size, PIECE):
        for vector in vectors:
            piece = vector[at : at + PIECE]
            np.negative(piece, out=piece)


def torch_adam(numel: int) -> Call:
    torch.set_num_threads(1)
    weights = torch.nn.Parameter(torch.rand(numel))
    weights.grad = torch.randn(numel)
    return torch.optim.Adam([weights], lr=LR, fused=True).step


def encoded(uplink: str, workers: int, numel: int, shards: int) -> list[list[np.ndarray]]:
    """Of each shard the payloads of all workers, each in memory of its own."""
    codec, payload = get_codec(uplink), np.empty(get_codec(uplink).nbytes(numel), np.uint8)
    codec.encode(np.random.default_rng(2).standard_normal(numel, dtype=np.float32), payload)
    return [[payload.copy() for _ in range(workers)] for _ in range(shards)]


def shard_steps(
    case: Case,
    uplink: str,
    payloads: list[list[np.ndarray]],
    vectors: Vectors,
    options: argparse.Namespace,
) -> list[list[ServerStep]]:
    """Of each thread the steps of its shards."""
    down, numel = get_codec(case.downlink or "fp32"), options.shard
    adam = Adam(AdamConfig(), 0)
    adam.advance(LR)
    threads: list[list[ServerStep]] = [[] for _ in range(options.threads)]
    scratches = [np.empty(numel, np.float32) for _ in threads]
    names = VECTORS if case.delta else VECTORS[:3]
    for index, came in enumerate(payloads):
        thread = index * options.threads // len(payloads)
        part = slice(index * numel, (index + 1) * numel)
        answer = None if case.downlink is None else np.zeros(down.nbytes(numel), np.uint8)
        threads[thread].append(
            ServerStep(
                uplink=get_codec(uplink).format,
                downlink=down.format,
                segments=[numel],
                payloads=came,
                scratch=scratches[thread],
                answer=answer,
                delta=case.delta,
                starts=[0],
                adam=adam.coefficients,
                **{name: vectors[name][part] for name in names},
            )
        )
    return threads


def runs(
    level: kernels.Kernels, threads: list[list[ServerStep]], pool: ThreadPoolExecutor
) -> tuple[Call, Call]:
    """The whole round in one pass, and pass by pass."""

    def one_pass(steps: Sequence[ServerStep]) -> None:
        for step in steps:
            level.server_step(step)

    def passes(steps: Sequence[ServerStep]) -> None:
        for step in steps:
            compose(level, step)

    if len(threads) == 1:
        return (lambda: one_pass(threads[0])), (lambda: passes(threads[0]))
    return (lambda: list(pool.map(one_pass, threads))), (lambda: list(pool.map(passes, threads)))


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
    compared: list[tuple[str, str]],
    times: dict[str, list[float]],
    numel: int,
    options: argparse.Namespace,
) -> None:
    rows = [row(name, stream, times) for name, stream in compared]
    streams = {name: min(times[name]) * 1e3 for name in ("r3w3", "r4w4")}
    adam = against_torch(times, options.levels.split(",")[0])
    if options.json:
        body = {"numel": numel, "threads": options.threads, "streams_ms": streams, "cases": rows}
        print(json.dumps(body | {"torch": adam}))
        return
    measured = ", ".join(f"{name} {ms:.1f} ms" for name, ms in streams.items())
    print(f"{numel} values, {options.threads} thread(s); {measured}")
    print(f"{'':58}{'ms':>7}  best median   of    passes")
    for each in rows:
        print(
            f"{each['case']:58}{each['ms']:7.1f}  {each['best']:.2f}  {each['median']:.2f}   "
            f"{each['stream']}   {each['passes']:.2f}"
        )
    print(
        adam if isinstance(adam, str) else "{step}: {best:.2f} (median {median:.2f})".format(**adam)
    )


def row(name: str, stream: str, times: dict[str, list[float]]) -> dict[str, object]:
    return {
        "case": name,
        "stream": stream,
        "ms": min(times[name]) * 1e3,
        "best": min(times[stream]) / min(times[name]),
        "median": median_ratio(times[stream], times[name]),
        "passes": min(times[f"{name} passes"]) / min(times[name]),
    }


def against_torch(times: dict[str, list[float]], level: str) -> dict[str, object] | str:
    """The whole step's time by that of torch's optimizer alone, or why there is no such figure."""
    name = f"{level} {WHOLE_STEP}"
    if torch is None:
        return f"{TORCH}: skipped, torch is not installed here"
    if name not in times:
        return f"{TORCH}: skipped, {name!r} is not among the cases"
    return {
        "step": f"{name}, time by that of {TORCH} {torch.__version__} alone",
        "best": min(times[name]) / min(times[TORCH]),
        "median": median_ratio(times[name], times[TORCH]),
    }


def median_ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main()

"""Speed of the codecs as a share of what memory allows.

A kernel that reads two arrays and writes one in place cannot be faster than the plain stream that
does so and nothing else: `r2w1` is `e += x`, 12 bytes a value; `r1w1` is `x += 1`, 8 bytes; `w1` is
a fill, 4 bytes. Every round measures the streams and all kernels in turn, so that a slow moment of
the machine hits both, and the best of all rounds counts, shard by shard. Ratio = stream time /
kernel time: 1.00 is the speed of memory. encode only reads, and is shown without a ratio.
encode_bf16 is encode_ef with a residual in bf16: 8 bytes a value, so its stream is r2w1 in two
thirds of its time. What a payload adds to the bytes of a stream is not in it: a second figure,
`by bytes`, counts them. With --halves: how much faster two threads are, each on its half of the
shards, than one.

    python bench/codec.py [--numel 25000000] [--rounds 15] [--threads 1] [--json] [--halves]
                          [--levels v4,v3] [--codecs "sign log:k=2"] [--verbs encode_ef,decode]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from psq import kernels
from psq.codec import codec_specs, get_codec
from psq.kernels import Floats

SHARD = 1 << 20
STREAM_OF = {
    "encode_ef": "r2w1",
    "encode_bf16": "r2w1",
    "encode": "",
    "decode": "w1",
    "decode_add": "r1w1",
}
SHARE = {"encode_bf16": 8 / 12}  # of its stream's bytes
BYTES = {"encode_ef": 12, "encode_bf16": 8, "decode": 4, "decode_add": 8}  # payload not counted
STREAMS_EVERY = 4  # cases


PerShard = Callable[[int], object]  # one shard's work, by index


class Case(NamedTuple):
    level: str
    codec: str
    verb: str
    call: PerShard


def main() -> None:
    options = parse()
    shards = -(-options.numel // SHARD)
    x, e = aligned(shards * SHARD), aligned(shards * SHARD)
    x[:] = np.random.default_rng(1).standard_normal(x.size, dtype=np.float32)
    pairs = list(zip(x.reshape(shards, SHARD), e.reshape(shards, SHARD), strict=True))
    streams: dict[str, PerShard] = {
        "r2w1": lambda i: np.add(pairs[i][1], pairs[i][0], out=pairs[i][1]),
        "r1w1": lambda i: np.add(pairs[i][1], np.float32(1e-9), out=pairs[i][1]),
        "w1": lambda i: pairs[i][1].fill(0.01),
    }
    cases = [
        case
        for level in options.levels.split(",")
        for spec in options.codecs.split()
        for case in cases_of(level, spec, pairs)
        if case.verb in options.verbs.split(",")
    ]
    if options.halves:
        report_halves(cases, shards, options.rounds, as_json=options.json)
        return
    seconds = measure(streams, cases, shards, options)
    report(streams, cases, {key: x.size / s / 1e9 for key, s in seconds.items()}, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=25_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--levels", default=kernels.available()[0])
    parser.add_argument("--codecs", default=" ".join(codec_specs()))
    parser.add_argument("--verbs", default=",".join(STREAM_OF))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--halves", action="store_true")
    return parser.parse_args()


def aligned(numel: int) -> Floats:
    """Zeros that start a cache line, as torch's tensors do and NumPy's do not."""
    raw = np.zeros(numel + 16, np.float32)
    first = -raw.ctypes.data % 64 // 4
    return raw[first : first + numel]


def cases_of(level: str, spec: str, pairs: list[tuple[Floats, Floats]]) -> list[Case]:
    codec = get_codec(spec)
    payloads = np.zeros((len(pairs), codec.nbytes(SHARD)), np.uint8)
    halves = np.zeros((len(pairs), SHARD), np.uint16)
    calls: dict[str, PerShard] = {
        "encode_ef": lambda i: codec.encode_ef(*pairs[i], payloads[i], seed=i),
        "encode_bf16": lambda i: codec.encode_ef(pairs[i][0], halves[i], payloads[i], seed=i),
        "encode": lambda i: codec.encode(pairs[i][0], payloads[i], seed=i),
        "decode": lambda i: codec.decode(payloads[i], pairs[i][1]),
        "decode_add": lambda i: codec.decode_add(payloads[i], pairs[i][1]),
    }
    return [Case(level, codec.spec, verb, call) for verb, call in calls.items()]


def measure(
    streams: dict[str, PerShard], cases: list[Case], shards: int, options: argparse.Namespace
) -> dict[object, float]:
    """Seconds of one sweep over all shards: each part's best of all rounds."""
    best: dict[object, np.ndarray] = {}

    def sweep(key: object, call: PerShard) -> None:
        if options.threads == 1:  # by shard: what another process takes away costs one shard
            took = [clocked(call, i) for i in range(shards)]
        else:
            start = time.perf_counter()
            list(pool.map(call, range(shards)))
            took = [time.perf_counter() - start]
        best[key] = np.minimum(best.get(key, np.inf), took)

    with ThreadPoolExecutor(options.threads) as pool:
        for _ in range(options.rounds):
            for index, case in enumerate(cases):
                if index % STREAMS_EVERY == 0:
                    for name, call in streams.items():  # the last one leaves e small and finite
                        sweep(name, call)
                with kernels.use(case.level):
                    sweep(case[:3], case.call)
    return {key: float(parts.sum()) for key, parts in best.items()}


def report_halves(cases: list[Case], shards: int, rounds: int, *, as_json: bool) -> None:
    """Two threads against one, in turn; the best and the median of all rounds."""

    def sweep(call: PerShard, indices: range) -> None:
        for index in indices:
            call(index)

    rows = []
    with ThreadPoolExecutor(2) as pool:
        for case in cases:
            gains, best = [], [np.inf, np.inf]
            with kernels.use(case.level):
                for _ in range(rounds):
                    start = time.perf_counter()
                    sweep(case.call, range(shards))
                    half = time.perf_counter()
                    parts = (range(shards // 2), range(shards // 2, shards))
                    list(pool.map(sweep, [case.call] * 2, parts))
                    took = (half - start, time.perf_counter() - half)
                    gains.append(took[0] / took[1])
                    best = [min(pair) for pair in zip(best, took, strict=True)]
            gained = {"best": best[0] / best[1], "median": float(np.median(gains))}
            rows.append({**case._asdict(), **gained})
            del rows[-1]["call"]
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        gain = "{best:5.2f} times as fast (median {median:.2f})".format(**row)
        print("{level:3} {codec:32} {verb:11} two threads ".format(**row) + gain)


def clocked(call: PerShard, index: int) -> float:
    start = time.perf_counter()
    call(index)
    return time.perf_counter() - start


def ratio_of(case: Case, speed: dict[object, float]) -> float:
    stream = STREAM_OF[case.verb]
    return speed[case[:3]] * SHARE.get(case.verb, 1.0) / speed[stream] if stream else 0.0


def report(
    streams: dict[str, PerShard],
    cases: list[Case],
    speed: dict[object, float],
    options: argparse.Namespace,
) -> None:
    rows = [
        {
            "level": case.level,
            "codec": case.codec,
            "verb": case.verb,
            "gelements_s": speed[case[:3]],
            "stream": STREAM_OF[case.verb],
            "ratio": ratio_of(case, speed),
        }
        for case in cases
    ]
    if options.json:
        print(json.dumps({"streams": {name: speed[name] for name in streams}, "rows": rows}))
        return
    for name in streams:
        print(f"{name:47} {speed[name]:6.2f} G elements/s, {options.threads} thread(s)")
    for row in rows:
        payload = get_codec(row["codec"]).nbytes(SHARD) / SHARD
        moved = 1 + payload / BYTES.get(row["verb"], 4)
        by_bytes = f"{row['ratio'] * moved:5.2f} by bytes"
        ratio = f"{row['ratio']:5.2f} of {row['stream']} {by_bytes}" if row["ratio"] else ""
        left = f"{row['level']:3} {row['codec']:32} {row['verb']:11}"
        print(f"{left} {row['gelements_s']:6.2f} G/s {ratio}")


if __name__ == "__main__":
    main()

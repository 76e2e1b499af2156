"""Speed of the codecs as a share of what memory allows.

A kernel that reads two arrays and writes one in place cannot be faster than the plain stream that
does so and nothing else: `r2w1` is `e += x`, 12 bytes a value; `r1w1` is `x += 1`, 8 bytes; `w1` is
a fill, 4 bytes. Every round measures the streams and all kernels in turn, so that a slow moment of
the machine hits both, and the best of all rounds counts. Ratio = stream time / kernel time: 1.00 is
the speed of memory. encode only reads, and is shown without a ratio.

    python bench/codec.py [--numel 25000000] [--rounds 15] [--threads 1] [--json]
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
STREAM_OF = {"encode_ef": "r2w1", "encode": "", "decode": "w1", "decode_add": "r1w1"}
STREAMS_EVERY = 4  # cases


class Case(NamedTuple):
    level: str
    codec: str
    verb: str
    call: Callable[[], None]


def main() -> None:
    options = parse()
    numel = -(-options.numel // SHARD) * SHARD
    rng = np.random.default_rng(1)
    x, e = aligned(numel), aligned(numel)
    x[:] = rng.standard_normal(numel, dtype=np.float32)
    slices = [slice(at, at + SHARD) for at in range(0, numel, SHARD)]
    with ThreadPoolExecutor(options.threads) as pool:

        def each(call: Callable[[int, Floats, Floats], object]) -> Callable[[], None]:
            if options.threads == 1:
                return lambda: [call(i, x[at], e[at]) for i, at in enumerate(slices)] and None
            return lambda: (
                list(pool.map(lambda i: call(i, x[slices[i]], e[slices[i]]), range(len(slices))))
                and None
            )

        streams = {
            "r2w1": each(lambda _, a, b: np.add(b, a, out=b)),
            "r1w1": each(lambda _, __, b: np.add(b, np.float32(1e-9), out=b)),
            "w1": each(lambda _, __, b: b.fill(0.01)),
        }
        cases = [
            case
            for level in options.levels.split(",")
            for spec in options.codecs.split()
            for case in cases_of(level, spec, numel, each)
            if case.verb in options.verbs.split(",")
        ]
        best = measure(streams, cases, options.rounds)
    report(streams, cases, {key: numel / seconds / 1e9 for key, seconds in best.items()}, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=25_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--levels", default=kernels.available()[0])
    parser.add_argument("--codecs", default=" ".join(codec_specs()))
    parser.add_argument("--verbs", default=",".join(STREAM_OF))
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def aligned(numel: int) -> Floats:
    """Zeros that start a cache line, as torch's tensors do and NumPy's do not."""
    raw = np.zeros(numel + 16, np.float32)
    first = -raw.ctypes.data % 64 // 4
    return raw[first : first + numel]


def cases_of(
    level: str,
    spec: str,
    numel: int,
    each: Callable[[Callable[[int, Floats, Floats], object]], Callable[[], None]],
) -> list[Case]:
    codec = get_codec(spec)
    size = codec.nbytes(SHARD)
    payload = np.zeros(size * (numel // SHARD), np.uint8)
    parts = [payload[at : at + size] for at in range(0, payload.size, size)]

    def at_level(call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with kernels.use(level):
                call()

        return run

    calls = {
        "encode_ef": each(lambda i, a, b: codec.encode_ef(a, b, parts[i], seed=i)),
        "encode": each(lambda i, a, _: codec.encode(a, parts[i], seed=i)),
        "decode": each(lambda i, _, b: codec.decode(parts[i], b)),
        "decode_add": each(lambda i, _, b: codec.decode_add(parts[i], b)),
    }
    return [Case(level, codec.spec, verb, at_level(call)) for verb, call in calls.items()]


def measure(
    streams: dict[str, Callable[[], None]], cases: list[Case], rounds: int
) -> dict[object, float]:
    best: dict[object, float] = {}

    def timed(key: object, call: Callable[[], None]) -> None:
        start = time.perf_counter()
        call()
        best[key] = min(best.get(key, float("inf")), time.perf_counter() - start)

    for _ in range(rounds):
        for index, case in enumerate(cases):
            if index % STREAMS_EVERY == 0:
                for name, call in streams.items():  # the last one leaves e small and finite
                    timed(name, call)
            timed(case[:3], case.call)
    return best


def report(
    streams: dict[str, Callable[[], None]],
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
            "ratio": speed[case[:3]] / speed[STREAM_OF[case.verb]] if STREAM_OF[case.verb] else 0,
        }
        for case in cases
    ]
    if options.json:
        print(json.dumps({"streams": {name: speed[name] for name in streams}, "rows": rows}))
        return
    for name in streams:
        print(f"{name:47} {speed[name]:6.2f} G elements/s, {options.threads} thread(s)")
    for row in rows:
        ratio = f"{row['ratio']:5.2f} of {row['stream']}" if row["ratio"] else ""
        left = f"{row['level']:3} {row['codec']:32} {row['verb']:10}"
        print(f"{left} {row['gelements_s']:6.2f} G/s {ratio}")


if __name__ == "__main__":
    main()

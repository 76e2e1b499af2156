"""Speed of the codecs as a share of what memory allows.

A kernel that reads two arrays and writes one in place cannot be faster than the plain stream that does so and
nothing else: `r2w1` is `e += x`, 12 bytes a value; `r1w1` is `x += 1`, 8 bytes; `w1` is a fill, 4 bytes. Every
round measures the streams and all kernels in turn, so that a slow moment of the machine hits both; the best of all
rounds counts. Ratio = stream time / kernel time: 1.00 is the speed of memory.

    python bench/codec.py [--numel 25000000] [--rounds 15] [--levels v4,v3] [--codecs sign,log:k=2] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from psq import kernels
from psq.codec import codec_specs, get_codec

SHARD = 1 << 20
Floats = np.ndarray


class Case(NamedTuple):
    level: str
    codec: str
    verb: str
    stream: str
    call: Callable[[], None]


def main() -> None:
    """Measure and print."""
    options = parse()
    numel = -(-options.numel // SHARD) * SHARD
    rng = np.random.default_rng(1)
    x = rng.standard_normal(numel, dtype=np.float32)
    e = rng.standard_normal(numel, dtype=np.float32) * np.float32(0.1)
    streams: dict[str, Callable[[], None]] = {
        "r2w1": lambda: per_shard(lambda a, b: np.add(b, a, out=b), x, e),
        "r1w1": lambda: per_shard(lambda a, _: np.add(a, np.float32(1e-9), out=a), x, e),
        "w1": lambda: per_shard(lambda _, b: b.fill(0.5), x, e),
    }
    cases = [
        case
        for level in options.levels.split(",")
        for spec in options.codecs.split(",")
        for case in cases_of(level, spec, x, e)
    ]
    best = measure(streams, cases, e, options.rounds)
    report(streams, cases, best, numel, as_json=options.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=25_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--levels", default=kernels.available()[0])
    parser.add_argument("--codecs", default=",".join(codec_specs()).replace(",stochastic", ";stochastic"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    return options


def per_shard(call: Callable[[Floats, Floats], object], x: Floats, e: Floats) -> None:
    for at in range(0, x.size, SHARD):
        call(x[at : at + SHARD], e[at : at + SHARD])


def cases_of(level: str, spec: str, x: Floats, e: Floats) -> list[Case]:
    codec = get_codec(spec.replace(";", ","))
    size = codec.nbytes(SHARD)
    payload = np.zeros(size * (x.size // SHARD), np.uint8)
    parts = [payload[i * size : (i + 1) * size] for i in range(x.size // SHARD)]

    def each(call: Callable[[int, Floats, Floats, Floats], None]) -> Callable[[], None]:
        def run() -> None:
            with kernels.use(level):
                for i, part in enumerate(parts):
                    at = slice(i * SHARD, (i + 1) * SHARD)
                    call(i, x[at], e[at], part)

        return run

    return [
        Case(level, codec.spec, "encode_ef", "r2w1", each(lambda i, a, b, p: codec.encode_ef(a, b, p, seed=i))),
        Case(level, codec.spec, "encode", "r1", each(lambda i, a, _, p: codec.encode(a, p, seed=i))),
        Case(level, codec.spec, "decode", "w1", each(lambda _, __, b, p: codec.decode(p, b))),
        Case(level, codec.spec, "decode_add", "r1w1", each(lambda _, __, b, p: codec.decode_add(p, b))),
    ]


def measure(
    streams: dict[str, Callable[[], None]], cases: list[Case], e: Floats, rounds: int
) -> dict[object, float]:
    best: dict[object, float] = {}

    def timed(key: object, call: Callable[[], None]) -> None:
        start = time.perf_counter()
        call()
        best[key] = min(best.get(key, 1e9), time.perf_counter() - start)

    for _ in range(rounds):
        for index, case in enumerate(cases):
            if index % 4 == 0:
                for name, call in streams.items():
                    timed(name, call)
                e[:] *= np.float32(1e-3)
            timed(case[:3], case.call)
    return best


def report(
    streams: dict[str, Callable[[], None]],
    cases: list[Case],
    best: dict[object, float],
    numel: int,
    *,
    as_json: bool,
) -> None:
    rows = [
        {
            "level": case.level,
            "codec": case.codec,
            "verb": case.verb,
            "gelements_s": numel / best[case[:3]] / 1e9,
            "stream": case.stream,
            "ratio": best[case.stream] / best[case[:3]] if case.stream in best else None,
        }
        for case in cases
    ]
    if as_json:
        print(json.dumps({"streams": {name: numel / best[name] / 1e9 for name in streams}, "rows": rows}))
        return
    print(f"{numel} values, one thread, pid {os.getpid()}")
    for name in streams:
        print(f"{name:36} {numel / best[name] / 1e9:6.2f} G/s")
    for row in rows:
        ratio = f"{row['ratio']:5.2f} of {row['stream']}" if row["ratio"] else ""
        print(f"{row['level']:3} {row['codec']:21} {row['verb']:10} {row['gelements_s']:6.2f} G/s  {ratio}")


if __name__ == "__main__":
    main()

"""Speed of a worker's push with its own moments: one pass against passes, and against memory.

A push with Adam on the worker reads g, m, v and the residual and writes the last three: 28 bytes a
value, 24 with a residual in bf16. `r4w3` does so and nothing else: it flips the signs of m and v
and adds g to e. `passes` is what `worker_step` means (psq/kernels/reference_worker.py) by kernels
of the same level: the direction to a shard of scratch, then the codec. Every round measures the
stream and all kernels in turn, and the best of all rounds counts, shard by shard.

    python bench/worker.py [--numel 25000000] [--rounds 15] [--levels v4,v3] [--codecs "sign"]
                           [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from psq import kernels
from psq.codec import get_codec
from psq.kernels import WorkerStep
from psq.kernels.reference_worker import compose
from psq.optim import Adam
from psq.recipe import AdamConfig

SHARD = 1 << 20
PIECE = 1 << 15
LR = 1e-3
STREAM = "r4w3"
BYTES = {"f32": 28, "bf16": 24}


class Case(NamedTuple):
    level: str
    codec: str
    residual: str
    how: str  # "fused" or "passes"


def main() -> None:
    options = parse()
    shards = options.numel // SHARD
    vectors = [aligned(shards * SHARD).reshape(shards, SHARD) for _ in range(4)]
    rng = np.random.default_rng(1)
    for vector in vectors:
        for part in vector:
            part[:] = rng.random(SHARD, dtype=np.float32) - np.float32(0.5)
    calls = dict(cases(options, vectors))
    best = measure(calls, vectors, options.rounds)
    report(best, shards * SHARD, as_json=options.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=25_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--levels", default=kernels.available()[0])
    parser.add_argument("--codecs", default="sign lloyd-max:bits=4,block=256")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def aligned(numel: int) -> np.ndarray:
    raw = np.zeros(numel + 16, np.float32)
    first = -raw.ctypes.data % 64 // 4
    return raw[first : first + numel]


def cases(
    options: argparse.Namespace, vectors: list[np.ndarray]
) -> Iterator[tuple[Case, Callable[[int], object]]]:
    adam = Adam(AdamConfig(), 1)
    adam.advance(LR)
    shards = len(vectors[0])
    halves = np.zeros((shards, SHARD), np.uint16)
    scratch = np.zeros(SHARD, np.float32)
    for level in options.levels.split(","):
        native = kernels.get(level)
        for spec in options.codecs.split():
            codec = get_codec(spec)
            payload = np.zeros(codec.nbytes(SHARD), np.uint8)
            for residual in BYTES:
                steps = [
                    WorkerStep(
                        uplink=codec.format,
                        gradients=[vectors[0][i]],
                        starts=[i],
                        payload=payload,
                        residual=vectors[3][i] if residual == "f32" else halves[i],
                        adam=adam.coefficients,
                        m=vectors[1][i],
                        v=vectors[2][i],
                        scratch=scratch,
                    )
                    for i in range(shards)
                ]
                fused = Case(level, codec.spec, residual, "fused")
                yield fused, lambda i, native=native, steps=steps: native.worker_step(steps[i])
                passes = fused._replace(how="passes")
                yield passes, lambda i, native=native, steps=steps: compose(native, steps[i])


def stream(vectors: list[np.ndarray], shard: int) -> None:
    g, m, v, e = (vector[shard] for vector in vectors)
    for at in range(0, SHARD, PIECE):
        piece = slice(at, at + PIECE)
        np.negative(m[piece], out=m[piece])
        np.negative(v[piece], out=v[piece])
        np.add(e[piece], g[piece], out=e[piece])


def measure(
    calls: dict[Case, Callable[[int], object]], vectors: list[np.ndarray], rounds: int
) -> dict[object, float]:
    shards = len(vectors[0])
    best: dict[object, np.ndarray] = {}

    def sweep(key: object, call: Callable[[int], object]) -> None:
        took = np.empty(shards)
        for i in range(shards):
            start = time.perf_counter()
            call(i)
            took[i] = time.perf_counter() - start
        best[key] = np.minimum(best.get(key, np.inf), took)

    for _ in range(rounds):
        for case, call in calls.items():
            sweep(STREAM, lambda i: stream(vectors, i))
            for vector in vectors[1:]:  # what many rounds of the stream have made of them
                np.clip(vector, -1.0, 1.0, out=vector)
            np.abs(vectors[2], out=vectors[2])
            sweep(case, call)
    return {key: float(parts.sum()) for key, parts in best.items()}


def report(best: dict[object, float], numel: int, *, as_json: bool) -> None:
    rows = [
        row(case, best, numel) for case in best if isinstance(case, Case) and case.how == "fused"
    ]
    if as_json:
        print(json.dumps({"numel": numel, "rows": rows}))
        return
    print(f"{STREAM}: {numel / best[STREAM] / 1e9:.2f} G elements/s, one thread, {numel} values")
    for each in rows:
        left = "{level:3} {codec:28} {residual:5}".format(**each)
        rate = f"{each['gelements_s']:5.2f} G/s {each['ratio']:5.2f} of {STREAM}"
        print(f"{left} {rate}, {each['passes']:5.2f} times as fast as passes")


def row(case: Case, best: dict[object, float], numel: int) -> dict[str, object]:
    limit = best[STREAM] * BYTES[case.residual] / BYTES["f32"]
    return {
        "level": case.level,
        "codec": case.codec,
        "residual": case.residual,
        "gelements_s": numel / best[case] / 1e9,
        "ratio": limit / best[case],
        "passes": best[case._replace(how="passes")] / best[case],
    }


if __name__ == "__main__":
    main()

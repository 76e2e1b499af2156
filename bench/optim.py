"""Speed of Adam as a share of what memory allows (of the server's step: bench/server.py).

The limit is the in-place stream of the same pattern: `r3w3` flips the sign of three vectors (24
bytes a value), `r4w4` of four. Every round measures the streams, the kernels and torch's fused Adam
in turn, so that a slow moment of the machine hits all; the best of all rounds counts.
Ratio = stream time / kernel time: 1.00 is the speed of memory. One thread.

    python bench/optim.py [--numel 25000000] [--rounds 15] [--levels v4,v3] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch

from psq import kernels
from psq.optim import Adam
from psq.recipe import AdamConfig

SHARD = 1 << 20
LR = 1e-3
ADAMS = {
    "adam": ("r3w3", AdamConfig(), 1),
    "amsgrad": ("r4w4", AdamConfig(amsgrad=True), 1),
    "adam corrected": ("r4w4", AdamConfig(variance_correction=True), 4),
}
Case = tuple[str, str, Callable[[], object]]


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    numel = options.numel // SHARD * SHARD
    rng = np.random.default_rng(1)
    g = rng.standard_normal(numel, dtype=np.float32)
    vectors = [g, *(rng.random(numel, dtype=np.float32) for _ in range(3))]
    streams: dict[str, Callable[[], None]] = {
        f"r{n}w{n}": lambda n=n: flip(vectors[:n]) for n in (2, 3, 4)
    }
    cases = [case for level in options.levels.split(",") for case in adam_cases(level, vectors)]
    cases.append(("torch fused Adam", "r3w3", torch_step(g)))
    best = measure(streams, cases, options.rounds)
    report(streams, cases, best, numel, as_json=options.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=25_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--levels", default=kernels.available()[0])
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def flip(vectors: list[np.ndarray]) -> None:
    for at in range(0, vectors[0].size, SHARD // 32):
        for vector in vectors:
            piece = vector[at : at + SHARD // 32]
            np.negative(piece, out=piece)


def adam_cases(level: str, vectors: list[np.ndarray]) -> list[Case]:
    """The direction written over the gradient: reads and writes g, m, v (and the third vector)."""

    def steps(config: AdamConfig, workers: int) -> Callable[[], None]:
        adam = Adam(config, vectors[0].size, workers=workers)

        def run() -> None:
            with kernels.use(level):
                adam.direction(vectors[0], LR, vectors[0])

        return run

    return [
        (f"{level} {name}", stream, steps(config, workers))
        for name, (stream, config, workers) in ADAMS.items()
    ]


def torch_step(g: np.ndarray) -> Callable[[], object]:
    parameter = torch.nn.Parameter(torch.zeros(g.size))
    parameter.grad = torch.from_numpy(g)
    optimizer = torch.optim.Adam([parameter], lr=LR, fused=True)
    return optimizer.step


def measure(
    streams: dict[str, Callable[[], None]], cases: list[Case], rounds: int
) -> dict[str, float]:
    best: dict[str, float] = {}
    calls = [*streams.items(), *((name, call) for name, _, call in cases)]
    for _ in range(rounds):
        for name, call in calls:
            start = time.perf_counter()
            call()
            best[name] = min(best.get(name, 1e9), time.perf_counter() - start)
    return best


def report(
    streams: dict[str, Callable[[], None]],
    cases: list[Case],
    best: dict[str, float],
    numel: int,
    *,
    as_json: bool,
) -> None:
    rates = {name: numel / seconds / 1e9 for name, seconds in best.items()}
    ratios = {name: (stream, best[stream] / best[name]) for name, stream, _ in cases}
    if as_json:
        print(json.dumps({"numel": numel, "gelements_s": rates, "ratios": ratios}))
        return
    print(f"{numel} values, one thread")
    for name in streams:
        print(f"{name:32} {rates[name]:6.2f} G/s")
    for name, (stream, ratio) in ratios.items():
        print(f"{name:32} {rates[name]:6.2f} G/s  {ratio:5.2f} of {stream}")


if __name__ == "__main__":
    main()

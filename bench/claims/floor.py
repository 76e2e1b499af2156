"""The floor that quantized weights leave: Adam whose workers see C_x(x) and not x.

Recipe qadam: Adam on the workers, updates in three bits with error feedback, weights down through a
uniform grid. k_x stands for 2^k_x steps of the grid on each side of 0:

    fixed range     levels j 2^-(k_x + 1), |j| <= 2^k_x: [-0.5, 0.5], as recalled from 2004.14180
    per block       levels j s 2^-k_x, s the largest weight of a block of BLOCK

Psq's codec `uniform:bits=b` is the second with 2^(b-1) - 1 steps: bits 5 to 8 lie just below k_x of
4 to 7. For larger k_x psq has no codec, and the grid is made in NumPy by the same arithmetic; where
both exist, both are measured. The problem is f(x) = 1/2 sum_j h_j (x_j - c_j)^2 with c_j within
+-0.45, where clipping does no harm; alpha_t = alpha / sqrt(t), so what remains at the end is not
step size but grid. The floor is measured at the weights that workers have, C_x(x), over the last
tenth of the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psq.codec import ShardCodec, get_codec
from psq.feedback import Compressor
from psq.plan import Plan
from psq.presets import preset
from psq.recipe import Power, schedule_value
from psq_server.reduce import Reducer

NUMEL = 2048
BLOCK = 256
WORKERS = 2
STEPS = 4000
ALPHA = Power(0.02, 0.5)
CODEC_BITS = (5, 6, 7, 8)
TAIL = 0.1

Floats = NDArray[np.float32]
Grid = Callable[[Floats], Floats]


@dataclass(frozen=True)
class Floor:
    """What is left in the end, means over the last steps.

    Attributes:
        gradient: root mean square of the true gradient.
        excess: f - min f, per value.
    """

    gradient: float
    excess: float


def fixed_range(k: int) -> Grid:
    step = np.float32(2.0 ** -(k + 1))
    return lambda x: np.clip(np.rint(x / step), -(2.0**k), 2.0**k).astype(np.float32) * step


def per_block(steps: int) -> Grid:
    """With so many steps each side of 0."""

    def image(x: Floats) -> Floats:
        blocks = x.reshape(-1, BLOCK)
        scale = np.abs(blocks).max(axis=1, keepdims=True)
        unit = np.where(scale > 0, scale, np.float32(1.0)) / np.float32(steps)
        return np.asarray(np.rint(blocks / unit) * unit, np.float32).ravel()

    return image


def exact(x: Floats) -> Floats:
    """No grid at all."""
    return x


def codec_steps(bits: int) -> int:
    """Steps each side of 0 that psq's uniform codec has."""
    return 2 ** (bits - 1) - 1


def floor_of(grid: Grid, *, steps: int = STEPS, noise: float = 0.0) -> Floor:
    """The floor under a grid made in NumPy: the server's two lines stand here, all else is psq."""
    plan = _plan("uniform:bits=8")
    uplink = ShardCodec(get_codec(plan.recipe.uplink.codec), plan.layout.shards[0])
    x, mean, part = (np.zeros(NUMEL, np.float32) for _ in range(3))

    def answer(payloads: list[NDArray[np.uint8]], alpha: float) -> Floats:
        del alpha  # it is inside what workers say
        mean.fill(0.0)
        for payload in payloads:
            uplink.decode(payload, part)
            mean[:] += part
        x[:] -= mean / np.float32(len(payloads))
        return grid(x)

    return _descend(plan, grid(x), answer, steps, noise)


def floor_of_codec(bits: int, *, steps: int = STEPS, noise: float = 0.0) -> Floor:
    """The floor under psq's own codec and server."""
    plan = _plan(f"uniform:bits={bits},block={BLOCK}")
    server = Reducer(plan)
    server.init(0, 0, np.zeros(NUMEL, np.float32))
    downlink = ShardCodec(get_codec(plan.recipe.downlink.codec), plan.layout.shards[0])
    seen = np.zeros(NUMEL, np.float32)

    def answer(payloads: list[NDArray[np.uint8]], alpha: float) -> Floats:
        downlink.decode(server.reduce(0, payloads, alpha), seen)
        return seen

    return _descend(plan, seen, answer, steps, noise)


def slope(levels: list[float], floors: list[float]) -> float:
    """By what power of the number of levels the floor falls: least squares of logarithms."""
    return float(np.polyfit(np.log(levels), np.log(floors), 1)[0])


def _plan(downlink: str) -> Plan:
    recipe = preset("qadam").with_codecs(downlink=f"weights:{downlink}")
    return Plan.of([("x", (NUMEL,))], recipe, WORKERS)


def _descend(
    plan: Plan,
    seen: Floats,
    answer: Callable[[list[NDArray[np.uint8]], float], Floats],
    steps: int,
    noise: float,
) -> Floor:
    rng = np.random.default_rng(0)
    h = np.exp(rng.uniform(np.log(0.5), np.log(2.0), NUMEL)).astype(np.float32)
    c = rng.uniform(-0.45, 0.45, NUMEL).astype(np.float32)
    workers = [Compressor(plan, rank) for rank in range(WORKERS)]
    payloads = [np.empty(workers[0].nbytes(0), np.uint8) for _ in workers]
    squares, excess = [], []
    for t in range(1, steps + 1):
        gap = seen - c
        if t > (1.0 - TAIL) * steps:
            squares.append(np.mean(np.square(h * gap, dtype=np.float64)))
            excess.append(np.mean(0.5 * h * np.square(gap, dtype=np.float64)))
        alpha = schedule_value(ALPHA, t)
        for worker, payload in zip(workers, payloads, strict=True):
            drawn = noise * rng.standard_normal(NUMEL, dtype=np.float32) if noise else 0.0
            worker.compress(0, [(h * gap + drawn).astype(np.float32)], alpha, payload)
        seen = answer(payloads, alpha)
    return Floor(float(np.mean(squares)) ** 0.5, float(np.mean(excess)))

"""The wire's floor: how long a step's bytes take on the busiest link, if nothing else took time.

Links are full-duplex: each machine has a way up and a way down of the rate each, and the floor of a
step is the busiest of all ways. Counted are the messages' own bytes; frame headers add 4.6 % that
no one can avoid, so a step over 1.046 of its floor is all there is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peers.shapes import Shape, numel

POWER_SGD_MIN_RATE = 2  # torch's default: a tensor goes low-rank when that halves it at least


@dataclass(frozen=True)
class Transfer:
    """So many bytes of one step from one machine to another."""

    source: str
    target: str
    nbytes: float


def busiest(transfers: Iterable[Transfer]) -> float:
    """Bytes on the busiest way, up or down; what a machine says to itself takes no link."""
    ways: dict[tuple[str, str], float] = defaultdict(float)
    for t in transfers:
        if t.source != t.target:
            ways[t.source, "up"] += t.nbytes
            ways[t.target, "down"] += t.nbytes
    return max(ways.values(), default=0.0)


def floor_s(transfers: Iterable[Transfer], rate_bit_s: float) -> float:
    return busiest(transfers) * 8 / rate_bit_s


def through_servers(
    up: Sequence[float], down: Sequence[float], servers: Sequence[str], workers: Sequence[str]
) -> list[Transfer]:
    """Each worker sends `up[i]` bytes to server i and gets `down[i]` back."""
    return [
        transfer
        for server, up_bytes, down_bytes in zip(servers, up, down, strict=True)
        for worker in workers
        for transfer in (
            Transfer(worker, server, up_bytes),
            Transfer(server, worker, down_bytes),
        )
    ]


def ring(nbytes: float, workers: Sequence[str]) -> list[Transfer]:
    """All-reduce of so many bytes: each rank hands 2 (W - 1) / W of them to the next."""
    share = 2 * (len(workers) - 1) / len(workers) * nbytes
    return [Transfer(a, b, share) for a, b in zip(workers, [*workers[1:], workers[0]], strict=True)]


def power_sgd_bytes(shapes: Iterable[Shape], rank: int) -> int:
    """What PowerSGD all-reduces: P and Q of each matrix it is worth for, the rest dense, in f32."""
    total = 0
    for shape in shapes:
        values, rows = numel(shape), shape[0]
        columns = values // rows
        if len(shape) == 1:
            total += values
            continue
        low = min(rows, columns, rank) * (rows + columns)
        total += low if low * POWER_SGD_MIN_RATE < values else values
    return 4 * total

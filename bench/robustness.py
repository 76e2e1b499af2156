"""What aggregates withstand, and what they cost on packed payloads: docs/robustness.md.

    python bench/robustness.py                  prints both tables: some minutes
    python bench/robustness.py --write          and puts them into docs/robustness.md
    python bench/robustness.py --quick          one seed, few rounds: to see that it runs

Accuracy: `attacked.py`, the mean over seeds. Rates: the packed operation and the same result from
decoded vectors in plain NumPy, in turn, in this process; best and median ratio over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from attacked import Case, train
from reporting.tables import markdown

from psq import kernels
from psq.codec import ShardCodec, get_codec
from psq.layout import cut
from psq.rules.base import Said
from psq.rules.packed import distances
from psq.rules.robust import Median, TrimmedMean
from psq.rules.votes import Majority

PAGE = Path(__file__).resolve().parents[1] / "docs" / "robustness.md"
BEGIN, END = "<!-- measured by bench/robustness.py -->", "<!-- end of what was measured -->"
NO_FEEDBACK = "uplink.error_feedback=false"


@dataclass(frozen=True)
class Row:
    """One aggregate under all attacks."""

    name: str
    case: Case


def _row(name: str, hostile: int, *given: str, base: Case | None = None) -> Row:
    case = replace(base or Case(), hostile=hostile, given=given)
    return Row(name, case)


SIGN = Case(codec="sign")
VOTE = Case(codec="sign", lr=0.003)
SLOW = Case(asynchronous=True, lr=0.02, steps=150)
TRIM, KRUM = "aggregate=trimmed-mean", "aggregate=krum"
KARDAM = ("aggregate=kardam", "aggregate.f=3", "aggregate.dampening=none")
ROWS = (
    _row("mean, f = 1", 1),
    _row("mean, f = 3", 3),
    _row("mean, f = 5", 5),
    _row("mean, sign, f = 3", 3, base=SIGN),
    _row("clip to 1, f = 3", 3, "aggregate=clip", "aggregate.norm=1"),
    _row("median, f = 3", 3, "aggregate=median"),
    _row("median, f = 5", 5, "aggregate=median"),
    _row("trimmed mean, f = 3", 3, TRIM, "aggregate.f=3"),
    _row("trimmed mean, f = 5", 5, TRIM, "aggregate.f=5"),
    _row("Krum, m = 1, f = 4, no feedback", 4, KRUM, "aggregate.f=4", NO_FEEDBACK),
    _row("Krum, m = 5, f = 4, no feedback", 4, KRUM, "aggregate.f=4", "aggregate.m=5", NO_FEEDBACK),
    _row("Krum, m = 5, f = 4, with feedback", 4, KRUM, "aggregate.f=4", "aggregate.m=5"),
    _row(
        "Krum, m = 5, sign, f = 4, no feedback",
        4,
        *(KRUM, "aggregate.f=4", "aggregate.m=5", NO_FEEDBACK),
        base=SIGN,
    ),
    _row("majority, f = 3", 3, "aggregate=majority", NO_FEEDBACK, base=VOTE),
    _row("majority, f = 5", 5, "aggregate=majority", NO_FEEDBACK, base=VOTE),
    _row("mean, asynchronous, f = 3", 3, base=SLOW),
    _row(
        "Kardam as published, asynchronous, f = 3", 3, *KARDAM, "aggregate.noise=false", base=SLOW
    ),
    _row("Kardam, asynchronous, f = 3, no feedback", 3, *KARDAM, NO_FEEDBACK, base=SLOW),
)
ATTACKS: tuple[tuple[str, str, float | None], ...] = (
    ("none", "", None),
    ("sign flip", "sign-flip", None),
    ("sign flip x 3", "sign-flip", 3.0),
    ("scaled x -100", "scaled", None),
    ("random x 10", "random", None),
    ("NaN", "nan", None),
    ("silent", "silent", None),
    ("little, z", "little", None),
    ("little, 1.5", "little", 1.5),
)


def main() -> None:
    options = _parse()
    accuracy = _accuracy_table(options.seeds, options.jobs)
    rates = _rate_table(options.rounds)
    text = f"{accuracy}\n\n{rates}\n"
    print(text)
    if options.write:
        _write(text)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--jobs", type=int, default=1, help="processes for the training runs")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.rounds = 1, 3
    return options


def _write(text: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


# ---- accuracy ------------------------------------------------------------------------------------


def _accuracy_table(seeds: int, jobs: int) -> str:
    cases = [
        replace(row.case, attack=attack, strength=strength, seed=seed)
        for row in ROWS
        for _, attack, strength in ATTACKS
        for seed in range(seeds)
    ]
    with ProcessPoolExecutor(jobs) as pool:
        results = iter([result.accuracy for result in pool.map(train, cases)])
    rows = []
    for row in ROWS:
        means = [statistics.mean(next(results) for _ in range(seeds)) for _ in ATTACKS]
        rows.append([row.name, *(f"{100 * mean:.0f}" for mean in means)])
    head = ["11 workers, f of them hostile", *(name for name, _, _ in ATTACKS)]
    note = (
        f"Test accuracy in %, mean of {seeds} seeds, after {Case().steps} rounds "
        f"({SLOW.steps} pushes of each worker where asynchronous); guessing gives 17. Codec "
        f"{Case().codec} and error feedback where nothing else is said; majority: sign."
    )
    return f"{markdown(head, rows)}\n\n{note}"


# ---- rates ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contest:
    """An operation on payloads, and the same on decoded vectors."""

    name: str
    codec: str
    packed: Callable[[], object]
    dense: Callable[[], object]


def _rate_table(rounds: int, workers: int = 8, numel: int = 1_000_000) -> str:
    contests = [
        *_contests("sign", workers, numel),
        *_contests("lloyd-max:bits=4", workers, numel),
    ]
    times = {contest: ([], []) for contest in contests}
    for _ in range(rounds):
        for contest, (packed, dense) in times.items():
            packed.append(_seconds(contest.packed))
            dense.append(_seconds(contest.dense))
    rows = []
    for contest, (packed, dense) in times.items():
        ratios = [slow / fast for fast, slow in zip(packed, dense, strict=True)]
        best = min(dense) / min(packed)
        rows.append(
            [contest.name, contest.codec, f"{best:.1f}", f"{statistics.median(ratios):.1f}"]
        )
    head = ["operation", "codec", "times as fast, best", "median"]
    note = (
        f"{workers} workers, one tensor of {numel:,} values, {rounds} rounds, "
        f"{kernels.level()} kernels, NumPy {np.__version__}. Against: every payload decoded by "
        "the same kernels, then NumPy on the dense vectors (sum of signs; differences and dot "
        "products; `np.median`; `np.sort` and a mean). Scratch: of the packed operations the bits "
        "of the payloads, or 128 KiB for each worker; of the dense ones 4 bytes for each value and "
        "worker."
    )
    return f"{markdown(head, rows)}\n\n{note}"


def _seconds(operation: Callable[[], object]) -> float:
    start = time.perf_counter()
    operation()
    return time.perf_counter() - start


def _contests(spec: str, workers: int, numel: int) -> list[Contest]:
    layout = cut([("weights", (numel,))], [get_codec(spec).nbytes])
    (shard,) = layout.shards
    codec, rng = ShardCodec(get_codec(spec), shard), np.random.default_rng(0)
    said = []
    for rank in range(workers):
        payload = np.empty(codec.nbytes, np.uint8)
        codec.encode(rng.standard_normal(numel, dtype=np.float32), payload)
        said.append(Said(rank, codec, payload))
    out = np.empty(numel, np.float32)

    def dense() -> np.ndarray:
        table = np.empty((workers, numel), np.float32)
        for one, row in zip(said, table, strict=True):
            codec.decode(one.payload, row)
        return table

    def apart() -> list[float]:
        table = dense()
        pairs = [(i, j) for i in range(workers) for j in range(i)]
        return [_squared(table[i] - table[j]) for i, j in pairs]

    median = Median({}, layout=layout, world_size=workers)
    trimmed = TrimmedMean({"f": 2}, layout=layout, world_size=workers)
    majority = Majority({}, layout=layout, world_size=workers)
    messages = [(one.codec, one.payload) for one in said]
    votes = Contest(
        "majority vote",
        spec,
        lambda: majority.combine(0, said, out),
        lambda: np.where(np.sign(dense()).sum(axis=0) >= 0, 1.0, -1.0),
    )
    return [
        *([votes] if spec == "sign" else []),
        Contest("distances of all pairs", spec, lambda: distances(shard, messages), apart),
        Contest(
            "median",
            spec,
            lambda: median.combine(0, said, out),
            lambda: np.median(dense(), axis=0, overwrite_input=True),
        ),
        Contest(
            "trimmed mean, f = 2",
            spec,
            lambda: trimmed.combine(0, said, out),
            lambda: _trimmed(dense()),
        ),
    ]


def _squared(difference: np.ndarray) -> float:
    return float(difference @ difference)


def _trimmed(table: np.ndarray) -> Sequence[float]:
    table.sort(axis=0)
    return table[2:-2].mean(axis=0)


if __name__ == "__main__":
    main()

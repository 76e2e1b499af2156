"""What must hold, with the figures that say whether it does.

A point is 1 % of accuracy, or 0.01 nats a character (1 % of the perplexity). A difference is within
the noise if its 95 % interval includes 0 or its mean is less than 0.3 points worse; the preset of
few bits has 0.4 points. A line holds if every part of it does, and is "not run" if none fails and
one is not run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

from evidence import order, tables
from evidence.cells import Cell, Store
from evidence.methods import ADAM, Method, method_of
from evidence.scores import Interval
from evidence.subjects import SUBJECTS, Subject
from reporting.tables import markdown

from psq.config import WorkerConfig

NOISE: Final = 0.3
NEAR: Final = 0.4
DEFAULT_BITS: Final = (4.2, 1.1)
FEW_BITS: Final = (1.4, 1.7)
FEW: Final = "shared-direction"


@dataclass(frozen=True)
class Part:
    """One figure of a line: in words, and whether it holds; None: not run."""

    words: str
    holds: bool | None


def bars_table(store: Store) -> str:
    """A row for each line."""
    rows = []
    for name, parts in _lines(store):
        shown = "; ".join(part.words for part in parts if part.holds is not None)
        left = sum(part.holds is None for part in parts)
        shown += f"; {left} of {len(parts)} not run" if left and shown else ""
        rows.append([name, shown, verdict(parts)])
    return f"{_words()}\n\n{markdown(('', 'measured', ''), rows, words=3)}"


def _words() -> str:
    return " ".join((__doc__ or "").split("\n\n", 1)[1].split())


def verdict(parts: Sequence[Part]) -> str:
    """Of a line."""
    if any(part.holds is False for part in parts):
        return "does not hold"
    return "holds" if parts and all(part.holds for part in parts) else tables.NOT_RUN


def _lines(store: Store) -> Iterator[tuple[str, list[Part]]]:
    default = method_of(WorkerConfig().recipe)
    few = method_of(FEW)
    yield (
        f"default (`{default.name}`): within the noise of plain Adam, 4 workers, three models",
        [_near_adam(store, default, subject, order.MIDDLE, NOISE) for subject in SUBJECTS],
    )
    yield (
        f"default: at most {DEFAULT_BITS[0]} bits up and {DEFAULT_BITS[1]} down",
        [_bits(store, default, subject, DEFAULT_BITS) for subject in SUBJECTS],
    )
    yield (
        f"`{few.name}`: at most {FEW_BITS[0]} bits up and {FEW_BITS[1]} down",
        [_bits(store, few, subject, FEW_BITS) for subject in SUBJECTS],
    )
    for method in (few, method_of("qadam-1bit")):
        yield (
            f"`{method.name}`: within {NEAR} points of plain Adam at its rate, 1, 4 and 8 workers",
            [
                _near_adam(store, method, subject, workers, NEAR)
                for subject, workers in product(SUBJECTS, sorted(order.WORKERS))
            ],
        )
        yield (
            f"`{method.name}`: within {NEAR} points of fp32, non-iid data or half of the workers",
            list(_hard(store, method)),
        )


def _near_adam(store: Store, method: Method, subject: Subject, workers: int, limit: float) -> Part:
    cells = order.cells_of(method, subject, workers, store)
    return _near(store, cells, order.cells_of(ADAM, subject, 1, store), f"W = {workers}", limit)


def _hard(store: Store, method: Method) -> Iterable[Part]:
    for subject, workers in product(SUBJECTS, order.HARD_WORKERS):
        for condition in order.conditions(subject):
            cells = tables.hard_cells(method, subject, workers, store, condition)
            base = tables.hard_cells(method_of("fp32"), subject, workers, store, condition)
            words = "half" if condition[0] is None else "non-iid"
            yield _near(store, cells, base, f"W = {workers}, {words}", NEAR)


def _near(
    store: Store, cells: Sequence[Cell], base: Sequence[Cell], words: str, limit: float
) -> Part:
    found = tables.against(cells, base, store)
    if found is None:
        why = tables.why_not(cells, store) if cells else tables.NOT_RUN
        return Part(f"{words}: {why}", None if why == tables.NOT_RUN else False)
    subject = cells[0].subject
    points = Interval(subject.points * found.mean, abs(subject.points) * found.half)
    shown = f"{cells[0].task}, {words}: {points.mean:+.2f} ± {points.half:.2f} points"
    return Part(shown, points.holds(limit))


def _bits(store: Store, method: Method, subject: Subject, limits: tuple[float, float]) -> Part:
    cells = order.cells_of(method, subject, order.MIDDLE, store)
    found = tables.bits_of(cells, store)
    if found is None:
        return Part(f"{subject.task}: {tables.NOT_RUN}", None)
    up, down = found[0]
    holds = up <= limits[0] and down <= limits[1]
    return Part(f"{subject.task}: {up:.2f} up, {down:.2f} down", holds)

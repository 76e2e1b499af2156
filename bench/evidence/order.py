"""Which cells there are, in the order in which they matter.

Later stages need what earlier ones found: no SGD before its rate is known. So a stage is made of
what is kept when its turn comes, and cells that cannot be told yet are left out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Final

from evidence.cells import RATE_SEED, SEEDS, Cell, Store
from evidence.methods import ADAM, MAIN, METHODS, POWER, RECIPES, Method, method_of
from evidence.scores import score_of
from evidence.subjects import SUBJECTS, Subject

WORKERS: Final = (4, 1, 8)
MIDDLE: Final = 4
HARD_WORKERS: Final = (4, 8)
FACTORS: Final = (0.25, 0.5, 1.0, 2.0, 4.0)
ALPHA: Final = 0.3
HALF: Final = 0.5
IMAGE, *_ = SUBJECTS
CHECKED: Final = ("server-adam", "qadam-1bit", "shared-direction", "ef-sgd")
"""Recipes of which a cell is run by processes too."""


@dataclass(frozen=True)
class Wanted:
    """What was asked for; everything by default."""

    tasks: tuple[str, ...] = tuple(subject.task for subject in SUBJECTS)
    methods: tuple[str, ...] = tuple(method.name for method in METHODS)
    seeds: tuple[int, ...] = SEEDS

    def takes(self, cell: Cell) -> bool:
        seeds = (*self.seeds, RATE_SEED)
        return cell.task in self.tasks and cell.method in self.methods and cell.seed in seeds


# ---- rates


def rate_cells(subject: Subject) -> list[Cell]:
    """Plain SGD at each rate tried."""
    return [Cell(subject.task, "fp32-sgd", 1, RATE_SEED, lr) for lr in subject.sgd]


def sgd_rate(subject: Subject, store: Store) -> float | None:
    """SGD's own rate: the best one tried; None before all are."""
    return _best(rate_cells(subject), store)


def rate_of(method: Method, subject: Subject, store: Store) -> float | None:
    """The rate a method is run at; None where it is not known yet."""
    base = subject.adam if method.base == "adam" else sgd_rate(subject, store)
    return None if base is None else method.factor * base


def grid(method: Method, subject: Subject, store: Store) -> list[Cell]:
    """A method at each rate around its own; empty where that is not known yet."""
    lr = rate_of(method, subject, store)
    if lr is None:
        return []
    return [_cell(subject, method, MIDDLE, RATE_SEED, lr * factor) for factor in FACTORS]


def best_rate(method: Method, subject: Subject, store: Store) -> float | None:
    """The best of the grid; None before all of it is run."""
    cells = grid(method, subject, store)
    return _best(cells, store) if cells else None


def _best(cells: Sequence[Cell], store: Store) -> float | None:
    found = [store.get(cell) for cell in cells]
    if any(result is None for result in found):
        return None
    scored = [
        (score * cell.subject.points, cell.lr)
        for cell, result in zip(cells, found, strict=True)
        if result is not None and (score := score_of(result)) is not None
    ]
    return max(scored)[1] if scored else None


# ---- cells


def _cell(subject: Subject, method: Method, workers: int, seed: int, lr: float) -> Cell:
    if method is ADAM:
        return Cell(subject.task, method.name, 1, seed, lr, way="plain")
    way = "ddp" if method.rank else "simulated"
    # Without compression the workers' mean is that of the batch, whoever has which part of it.
    many = 1 if method.name == "fp32-sgd" else workers
    return Cell(subject.task, method.name, many, seed, lr, way=way)


def cells_of(
    method: Method, subject: Subject, workers: int, store: Store, *, best: bool = False
) -> list[Cell]:
    """A row of the tables: a cell for each seed; empty where its rate is not known yet."""
    find = best_rate if best else rate_of
    lr = find(method, subject, store)
    return [] if lr is None else [_cell(subject, method, workers, seed, lr) for seed in SEEDS]


def without_feedback(cells: Iterable[Cell]) -> list[Cell]:
    """The same without residuals."""
    return [replace(cell, feedback=False) for cell in cells]


def conditions(subject: Subject) -> list[tuple[float | None, float]]:
    """Hard ones: (alpha, participation). Text has no classes that could be dealt out."""
    split: list[tuple[float | None, float]] = [] if subject.points < 0 else [(ALPHA, 1.0)]
    return [*split, (None, HALF)]


def under(cells: Iterable[Cell], condition: tuple[float | None, float]) -> list[Cell]:
    """The same under a hard condition."""
    alpha, share = condition
    return [replace(cell, non_iid=alpha, participation=share) for cell in cells]


# ---- stages

Stage = Callable[[Store], Iterator[Cell]]
MAINS: Final = tuple(method_of(name) for name in MAIN)
OTHERS: Final = tuple(method for method in RECIPES if method.name not in (*MAIN, "fp32-sgd"))
COMPARED: Final = (*MAINS, *OTHERS, *POWER)


def _rates(_: Store) -> Iterator[Cell]:
    for subject in SUBJECTS:
        yield from rate_cells(subject)


def _main(store: Store) -> Iterator[Cell]:
    for workers, subject in product(WORKERS, SUBJECTS):
        for method in (ADAM, *MAINS, method_of("fp32-sgd")):
            yield from cells_of(method, subject, workers, store)


def _checks(_: Store) -> Iterator[Cell]:
    yield from checks()


def checks() -> list[Cell]:
    """Cells that are run by processes as well, to see that they are the same."""
    found = []
    for name in CHECKED:
        method = method_of(name)
        lr = method.factor * IMAGE.adam
        found.append(Cell(IMAGE.task, name, 2, SEEDS[0], lr))
        found.append(replace(found[-1], way="processes"))
    return found


def _others(store: Store) -> Iterator[Cell]:
    for method in (*OTHERS, *POWER):
        yield from cells_of(method, IMAGE, MIDDLE, store)


def _power(store: Store) -> Iterator[Cell]:
    for subject, method in product(SUBJECTS, POWER):
        yield from cells_of(method, subject, MIDDLE, store)


def _no_feedback(store: Store) -> Iterator[Cell]:
    for method in (*MAINS, *OTHERS):
        if method.has_feedback:
            yield from without_feedback(cells_of(method, IMAGE, MIDDLE, store))


def _hard(workers: int) -> Stage:
    def hard(store: Store) -> Iterator[Cell]:
        for subject in SUBJECTS:
            for condition in conditions(subject):
                for method in (method_of("fp32"), *MAINS):
                    yield from under(cells_of(method, subject, workers, store), condition)

    return hard


def _others_elsewhere(store: Store) -> Iterator[Cell]:
    for subject, method in product(SUBJECTS[1:], OTHERS):
        yield from cells_of(method, subject, MIDDLE, store)


def _no_feedback_elsewhere(store: Store) -> Iterator[Cell]:
    for subject, method in product(SUBJECTS[1:], (*MAINS, *OTHERS)):
        if method.has_feedback:
            yield from without_feedback(cells_of(method, subject, MIDDLE, store))


def _grids(subjects: Sequence[Subject]) -> Stage:
    def grids(store: Store) -> Iterator[Cell]:
        for subject, method in product(subjects, (ADAM, *COMPARED)):
            yield from grid(method, subject, store)

    return grids


def _at_best(subjects: Sequence[Subject]) -> Stage:
    def at_best(store: Store) -> Iterator[Cell]:
        for subject, method in product(subjects, (ADAM, *COMPARED)):
            yield from cells_of(method, subject, MIDDLE, store, best=True)

    return at_best


def _other_workers(store: Store) -> Iterator[Cell]:
    for workers, subject, method in product((1, 8), SUBJECTS, OTHERS):
        if workers >= (4 if method.name == "kardam" else method.repeats):
            yield from cells_of(method, subject, workers, store)


STAGES: Final[tuple[tuple[str, Stage], ...]] = (
    ("main recipes", _main),
    ("SGD's own rate", _rates),
    ("the same by processes", _checks),
    ("PowerSGD", _power),
    ("other recipes, first task", _others),
    ("hard conditions, 4 workers", _hard(HARD_WORKERS[0])),
    ("without error feedback, first task", _no_feedback),
    ("grids, first task", _grids(SUBJECTS[:1])),
    ("at the best rate, first task", _at_best(SUBJECTS[:1])),
    ("other recipes, other tasks", _others_elsewhere),
    ("hard conditions, 8 workers", _hard(HARD_WORKERS[1])),
    ("without error feedback, other tasks", _no_feedback_elsewhere),
    ("grids, other tasks", _grids(SUBJECTS[1:])),
    ("at the best rate, other tasks", _at_best(SUBJECTS[1:])),
    ("other numbers of workers", _other_workers),
)


def next_cell(store: Store, wanted: Wanted, taken: frozenset[Cell]) -> Cell | None:
    """The most important cell that is neither finished nor taken; None: nothing to do for now."""
    for _, stage in STAGES:
        for cell in stage(store):
            if cell not in taken and wanted.takes(cell) and not store.has(cell):
                return cell
    return None

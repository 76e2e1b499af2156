"""The tables of the page, from what is kept; "not run" where nothing is."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from evidence import order
from evidence.cells import Cell, Store
from evidence.methods import ADAM, METHODS, RECIPES, Method, method_of
from evidence.scores import Interval, interval, score_of
from evidence.subjects import Subject
from reporting.tables import markdown

from psq.presets import find_preset

NOT_RUN = "not run"
PAIR = 2


# ---- figures of a row


def scores_of(cells: Sequence[Cell], store: Store) -> list[float] | None:
    """The final score of each cell; None unless all have one."""
    scores = [score_of(store.get(cell)) for cell in cells]
    known = [score for score in scores if score is not None]
    return known if scores and len(known) == len(scores) else None


def why_not(cells: Sequence[Cell], store: Store) -> str:
    """Why there is no figure."""
    results = [store.get(cell) for cell in cells]
    if not results or any(result is None for result in results):
        return NOT_RUN
    return "failed" if any("failure" in result for result in results if result) else "diverged"


def against(cells: Sequence[Cell], base: Sequence[Cell], store: Store) -> Interval | None:
    """How far these are from those, paired by seed."""
    ours, theirs = scores_of(cells, store), scores_of(base, store)
    if ours is None or theirs is None or len(ours) != len(theirs):
        return None
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])


def _mean(subject: Subject, cells: Sequence[Cell], store: Store) -> str:
    scores = scores_of(cells, store)
    return why_not(cells, store) if scores is None else subject.show(statistics.mean(scores))


def _difference(subject: Subject, cells: Sequence[Cell], base: Sequence[Cell], store: Store) -> str:
    found = against(cells, base, store)
    if found is None:
        return why_not(cells, store) if scores_of(cells, store) is None else NOT_RUN
    return f"{subject.show(found.mean, sign=True)} ± {subject.show(found.half)}"


def _adam(subject: Subject, store: Store) -> list[Cell]:
    return order.cells_of(ADAM, subject, 1, store)


def bits_of(cells: Sequence[Cell], store: Store) -> tuple[tuple[float, float], ...] | None:
    """Bits up and down, of payload and on the wire where it was counted; those of the first."""
    result = store.get(cells[0]) if cells else None
    if result is None or "failure" in result:
        return None
    found = tuple(result["bits"])
    wire = tuple(result["wire_bits"])
    return (found,) if None in wire else (found, wire)


def _bits(cells: Sequence[Cell], store: Store) -> tuple[str, str]:
    found = bits_of(cells, store)
    if found is None:
        return "", ""
    shown = [f"{pair:.2f}" for pair in found[0]]
    if len(found) == PAIR:
        shown = [f"{one} ({other:.2f})" for one, other in zip(shown, found[1], strict=True)]
    return shown[0], shown[1]


def _lr(cells: Sequence[Cell]) -> str:
    return f"{cells[0].lr:g}" if cells else ""


# ---- tables of a task


def opening(store: Store, subject: Subject) -> str:
    """What is trained, and what plain Adam makes of it."""
    adam = _adam(subject, store)
    words = (
        f"`{subject.task}`: {subject.steps} steps of {subject.batch} samples over all workers; "
        f"score: {subject.score}."
    )
    result = store.get(adam[0])
    if result is not None and "failure" not in result:
        words = f"{result['numel']:,} parameters. {words}"
    scores = scores_of(adam, store)
    if scores is not None:
        mean, spread = subject.show(statistics.mean(scores)), subject.show(statistics.stdev(scores))
        words += (
            f" Plain Adam ends at {mean}; from seed to seed the standard deviation is {spread}."
        )
    rate = order.sgd_rate(subject, store)
    tried = ", ".join(f"{lr:g}" for lr in subject.sgd)
    found = NOT_RUN if rate is None else f"{rate:g}"
    return f"{words} SGD's own rate: {found} (of {tried})."


def recipes_table(store: Store, subject: Subject) -> str:
    """A row for each method."""
    head = ("", subject.score, "minus Adam", "without feedback, minus Adam", "bits up", "bits down")
    head = (*head, "lr", "best lr", "at it, minus Adam at its best")
    rows = [_recipe_row(store, subject, method) for method in METHODS]
    return markdown(head, rows)


def _recipe_row(store: Store, subject: Subject, method: Method) -> list[str]:
    cells, adam = order.cells_of(method, subject, order.MIDDLE, store), _adam(subject, store)
    best = order.cells_of(method, subject, order.MIDDLE, store, best=True)
    best_adam = order.cells_of(ADAM, subject, 1, store, best=True)
    bare = "-"
    if method.has_feedback:
        bare = _difference(subject, order.without_feedback(cells), adam, store)
    base = "" if method is ADAM else _difference(subject, cells, adam, store)
    at_best = "" if method is ADAM else _difference(subject, best, best_adam, store)
    return [
        label(method),
        _mean(subject, cells, store),
        base,
        bare,
        *_bits(cells, store),
        _lr(cells),
        _lr(best) or NOT_RUN,
        at_best,
    ]


def label(method: Method) -> str:
    """Its name with what is unlike the others."""
    if method is ADAM:
        return "plain Adam"
    name = f"`{method.name}`" if method.recipe else method.name
    return f"{name} ({method.note})" if method.note else name


def workers_table(store: Store, subject: Subject) -> str:
    """The main recipes at 1, 4 and 8 workers: the score, minus Adam, and bits."""
    head = ("", "W", subject.score, "minus Adam", "bits up", "bits down")
    rows = []
    for method, workers in product(order.MAINS, sorted(order.WORKERS)):
        cells = order.cells_of(method, subject, workers, store)
        figures = [_mean(subject, cells, store)]
        figures += [_difference(subject, cells, _adam(subject, store), store)]
        rows.append([f"`{method.name}`", str(workers), *figures, *_bits(cells, store)])
    return markdown(head, rows)


def hard_table(store: Store, subject: Subject) -> str:
    """Non-iid data and half of the workers, beside fp32 under the same condition."""
    head = ("", "W", "condition", subject.score, "minus fp32", "bits up", "bits down")
    rows = []
    for condition, workers in product(order.conditions(subject), order.HARD_WORKERS):
        base = hard_cells(method_of("fp32"), subject, workers, store, condition)
        for method in (method_of("fp32"), *order.MAINS):
            cells = hard_cells(method, subject, workers, store, condition)
            words = "half of the workers" if condition[0] is None else f"alpha {condition[0]:g}"
            row = [f"`{method.name}`", str(workers), words, _mean(subject, cells, store)]
            row += [_difference(subject, cells, base, store) if cells != base else ""]
            rows.append([*row, *_bits(cells, store)])
    return markdown(head, rows)


def hard_cells(
    method: Method,
    subject: Subject,
    workers: int,
    store: Store,
    condition: tuple[float | None, float],
) -> list[Cell]:
    """A row of it."""
    return order.under(order.cells_of(method, subject, workers, store), condition)


def grid_table(store: Store, subject: Subject) -> str:
    """The scores that the best rates were picked by."""
    head = ("", *(f"x {factor:g}" for factor in order.FACTORS))
    rows = []
    for method in (ADAM, *order.COMPARED):
        cells = order.grid(method, subject, store)
        shown = [_mean(subject, [cell], store) for cell in cells]
        if any(one != NOT_RUN for one in shown):
            rows.append([label(method), *shown])
    return markdown(head, rows) if rows else NOT_RUN


# ---- tables of all


def checks_table(store: Store) -> str:
    """Simulations beside the same jobs run by psq-server and psq-worker processes."""
    head = ("", "score, simulated", "by processes", "all weights equal to the bit")
    rows = []
    checks = order.checks()
    for simulated, real in zip(checks[::2], checks[1::2], strict=True):
        ours, theirs = store.get(simulated), store.get(real)
        words = [_mean(simulated.subject, [cell], store) for cell in (simulated, real)]
        rows.append([f"`{simulated.method}`, {simulated.task}, W = 2", *words, _same(ours, theirs)])
    return markdown(head, rows, words=1)


def _same(one: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    if one is None or other is None:
        return NOT_RUN
    digests = [each.get("digest") for each in (one, other)]
    if None in digests:
        return "not known"
    return "yes" if digests[0] == digests[1] else "NO"


def traps_table() -> str:
    """When each recipe fails, and where to begin, as `psq recipes` says."""
    rows = []
    for method in RECIPES:
        preset = find_preset(method.recipe)
        rows.append([f"`{method.name}`", preset.trap, preset.suggested])
    return markdown(("", "trap", "begin with"), rows, words=3)


def failures(store: Store) -> str:
    """Each kind of failure once, with the method it befell."""
    found = {}
    for cell in _all_cells(store):
        result = store.get(cell)
        if result is not None and "failure" in result:
            found.setdefault((cell.method, result["failure"]), cell.name)
    return "\n".join(f"- {name}: {why}" for (_, why), name in found.items())


def _all_cells(store: Store) -> Iterable[Cell]:
    for _, stage in order.STAGES:
        yield from stage(store)

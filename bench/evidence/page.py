"""docs/results.md: tables of what is kept, from the store to the file."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

from evidence import tables
from evidence.bars import bars_table
from evidence.cells import RATE_SEED, SEEDS, Store
from evidence.order import ALPHA, MIDDLE, conditions
from evidence.subjects import SUBJECTS, Subject

ABOUT = f"""Made by `make results` ([`bench/results.py`](../bench/results.py)); do not edit.
"not run" is not measured yet: a run goes on where the last one stopped, the most important first.

All cells of a task and seed start from the same weights and see the same samples in the same steps,
shared among the workers: one run of `torch.optim.Adam` on the whole batch is what all are compared
with. Seeds {", ".join(map(str, SEEDS))}; the learning rate falls linearly to 0. Differences are
paired by seed; ± is half the width of the 95 % interval (Student's t: with three seeds 2.5 standard
deviations, so it is wide). A difference below 0 is worse than Adam in accuracy, better in loss.

Bits are per parameter and step: of payload, and in brackets on the wire with all headers, counted
by the simulated link. psq's cells are simulations (`psq_worker.simulate`): real workers, servers
and messages in one process, in bsp the same bits as processes give, as
[checked below](#by-processes). PowerSGD is torch's own, by real processes; its bits are the values
that it all-reduces, which each rank hands on and receives.

Rates: recipes with Adam and PowerSGD are run at Adam's own rate, votes at a tenth of it, the others
at the factor of plain SGD's that their preset suggests. SGD's own rate, and the best rate of each
method (a grid of 1/4 to 4 times), were picked on seed {RATE_SEED}, which is in no other figure."""


def write_page(store: Store, path: Path, pictures: Mapping[str, str]) -> None:
    """Everything there is, with the names of the pictures by task."""
    parts = ["# Results", ABOUT, "## What must hold", bars_table(store)]
    for subject in SUBJECTS:
        parts += _section(store, subject, pictures.get(subject.task))
    parts += ["## By processes", tables.checks_table(store)]
    parts += ["## Traps", tables.traps_table()]
    failures = tables.failures(store)
    parts += ["## What could not be run", failures] if failures else []
    parts += [_machine()]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _section(store: Store, subject: Subject, picture: str | None) -> list[str]:
    shown = [f"![training loss by step and by bytes]({picture})"] if picture else []
    return [
        f"## {subject.title}",
        tables.opening(store, subject),
        *shown,
        f"Every recipe, {MIDDLE} workers:",
        tables.recipes_table(store, subject),
        "The main recipes by the number of workers:",
        tables.workers_table(store, subject),
        *_hard(store, subject),
        "Each at its best rate; the grid's scores on its own seed, by factor of the rate above:",
        tables.grid_table(store, subject),
    ]


def _hard(store: Store, subject: Subject) -> list[str]:
    split = any(alpha is not None for alpha, _ in conditions(subject))
    words = (
        f"classes dealt to the workers by a Dirichlet distribution with alpha {ALPHA}, and half of "
        "the workers in each round"
        if split
        else "half of the workers in each round (text has no classes that could be dealt out)"
    )
    words = f"Hard conditions, beside dense fp32 (`fp32`) under the same: {words}."
    return [words, tables.hard_table(store, subject)]


def _machine() -> str:
    import torch  # noqa: PLC0415 - half a second that only the page needs

    from psq import __version__, kernels  # noqa: PLC0415

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"psq {__version__}, {kernels.level()} kernels, torch {torch.__version__.split('+')[0]}, "
        f"Python {platform.python_version()}, {platform.machine()}, {cores} cores, one thread per "
        "process."
    )

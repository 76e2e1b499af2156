"""Trains every recipe on three tasks with several seeds and writes docs/results.md.

    python bench/results.py                             everything: many hours; `make results`
    python bench/results.py --budget 30m --page         the most important that fits, then the page
    python bench/results.py --tasks char-lm --recipes server-adam adam
    python bench/results.py --only-page                 the page of what is there
    python bench/results.py --list                      how much of each stage is done

Each run is a process of its own; its numbers are kept as JSON under runs/results/, and what is
there is not run again. `evidence/order.py` says what there is to run and in which order it matters;
the page says "not run" where nothing is. psq's cells are simulations: one process, the same bits as
real workers and servers in bsp, and some cells are run by processes too, to see that they are.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from pathlib import Path
from typing import Final

from evidence.cells import SEEDS, Store
from evidence.methods import METHODS
from evidence.order import STAGES, Wanted, next_cell
from evidence.page import write_page
from evidence.pictures import draw_all
from evidence.pool import Pool
from evidence.subjects import SUBJECTS

ROOT: Final = Path(__file__).resolve().parent.parent
CELLS: Final = ROOT / "runs" / "results"
DOCS: Final = ROOT / "docs"
UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_budget(text: str) -> float:
    """Seconds in a text such as 90s, 30m or 2h."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None:
        msg = f"expected a time such as 90s, 30m or 2h, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return float(match[1]) * UNITS[match[2]]


def list_cells(store: Store, wanted: Wanted) -> None:
    """Each stage with how much of it is done, as far as it can be told now."""
    for name, stage in STAGES:
        cells = {cell for cell in stage(store) if wanted.takes(cell)}
        print(f"{name}: {sum(map(store.has, cells))} of {len(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = [subject.task for subject in SUBJECTS]
    names = [method.name for method in METHODS]
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks, metavar="TASK")
    parser.add_argument("--recipes", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--budget", type=parse_budget, default=math.inf, help="90s, 30m, 2h")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="try failed cells again")
    parser.add_argument("--page", action="store_true", help="write the page although cells lack")
    parser.add_argument("--only-page", action="store_true", help="run nothing")
    parser.add_argument("--list", action="store_true", help="how much is done, and nothing else")
    options = parser.parse_args()
    store = Store(CELLS)
    wanted = Wanted(tuple(options.tasks), tuple(options.recipes), tuple(options.seeds))
    if options.list:
        list_cells(store, wanted)
        return
    if options.again:
        store.forget_failures()
    if not options.only_page:
        pool = Pool(store, options.processes, time.monotonic() + options.budget)
        pool.run(lambda taken: next_cell(store, wanted, taken))
    if options.page or options.only_page or next_cell(store, wanted, frozenset()) is None:
        write_page(store, DOCS / "results.md", draw_all(store, DOCS))
    else:
        print("no page: cells are missing; --page writes one all the same")


if __name__ == "__main__":
    main()

"""Runs every bench with stated arguments and writes docs/performance.md with its pictures.

    python bench/report.py                         `make bench`: half an hour on two quiet cores
    python bench/report.py --only step,memory      these sections; the page is written with all kept
    python bench/report.py --only step --again     measured anew
    python bench/report.py --page                  nothing is run, the page is written

Raw JSON is kept under bench/out, a file for each command. What is kept is not run again, unless its
command has changed, or it had failed, or --again. A command that fails or takes too long says so on
the page, and the others go on. --quick tries everything at small sizes, in folders of its own.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from peers.venvs import default_cache
from reporting.page import write_page
from reporting.runs import Kept, Settings, perform, read
from reporting.sections import SECTIONS

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "out"
DOCS = ROOT / "docs"


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what runs, and tidies up
    folder = OUT / "quick" if options.quick else OUT
    settings = Settings(folder, options.cache, options.quick, options.again)
    results: dict[str, Kept] = {}
    for section in SECTIONS:
        for run in section.runs:
            if not options.page and (not options.only or section.name in options.only):
                results[run.name] = perform(run, settings)
            elif found := read(folder / f"{run.name}.json"):
                results[run.name] = found
    page = write_page(results, folder if options.quick else DOCS, quick=options.quick)
    print(f"{page} written", file=sys.stderr)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [section.name for section in SECTIONS]
    parser.add_argument("--only", default="", help=", ".join(names))
    parser.add_argument("--again", action="store_true", help="whatever is kept")
    parser.add_argument("--page", action="store_true", help="run nothing")
    parser.add_argument("--quick", action="store_true", help="small sizes, other folders")
    parser.add_argument("--cache", type=Path, default=default_cache())
    options = parser.parse_args()
    options.only = [name for name in options.only.split(",") if name]
    if unknown := set(options.only) - set(names):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(names)}")
    return options


if __name__ == "__main__":
    main()

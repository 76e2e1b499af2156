"""Trains the two games of examples/gan through real processes and writes docs/gan.md.

    python bench/gan.py                 half an hour on two cores; `make gan`
    python bench/gan.py --only ring     the ring alone: the other game's table and picture stay

Each cell (game, method, rate, seed) is one server with its workers, started by `psq launch`. What
its rank 0 measured is kept as JSON under runs/gan/, and cells already there are not trained again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib import pyplot as plt

from psq_worker.tasks.idx import find_folder, load

ROOT: Final = Path(__file__).resolve().parent.parent
CELLS: Final = ROOT / "runs" / "gan"
PAGE: Final = ROOT / "docs" / "gan.md"
LIMIT_S: Final = 3600.0

OMD: Final = ("--recipe", "dqgan")
GDA: Final = ("--recipe", "ef-sgd")


@dataclass(frozen=True)
class Method:
    """A way to play: what tables call it, and the flags that choose it."""

    name: str
    words: tuple[str, ...]

    @classmethod
    def of(cls, name: str, recipe: Sequence[str], codec: str) -> Method:
        return cls(name, (*recipe, "--uplink", codec, "--downlink", f"delta:{codec}"))


DQGAN: Final = Method.of("dqgan", OMD, "log:k=2")
DESCENT: Final = Method.of("descent-ascent, same codecs", GDA, "log:k=2")
DQGAN_1: Final = Method.of("dqgan, 1 bit each way", OMD, "sign")
DQGAN_32: Final = Method.of("dqgan, 32 bits", OMD, "fp32")
DESCENT_32: Final = Method.of("descent-ascent, 32 bits", GDA, "fp32")


@dataclass(frozen=True)
class Cell:
    """One run."""

    game: str
    method: Method
    lr: float
    seed: int = 0
    workers: int = 2
    steps: int = 0

    @property
    def path(self) -> Path:
        name = f"{self.method.name}-{self.workers}w-{self.lr:g}-{self.seed}"
        name += f"-{self.steps}" if self.steps else ""
        return CELLS / self.game / f"{re.sub(r'[^a-z0-9.]+', '-', name)}.json"

    @property
    def command(self) -> list[str]:
        script = f"examples/gan/{self.game}.py"
        flags = ["-n", str(self.workers), *self.method.words, "--lr", f"{self.lr:g}"]
        steps = ["--steps", str(self.steps)] if self.steps else []
        return ["psq", "launch", *flags, script, "--", "--seed", str(self.seed), *steps]


RING_LR: Final = 0.1
IMAGES_LR: Final = 0.02
RING: Final = (
    *(Cell("ring", m, RING_LR, s) for s in (0, 1, 2) for m in (DQGAN, DESCENT)),
    *(Cell("ring", DQGAN_1, RING_LR, s) for s in (0, 1, 2)),
    *(Cell("ring", m, RING_LR) for m in (DQGAN_32, DESCENT_32)),
    *(Cell("ring", m, lr) for lr in (0.03, 0.05) for m in (DQGAN, DESCENT)),
    Cell("ring", DQGAN, RING_LR, workers=4),
)
LONG: Final = 6_000
IMAGES: Final = (
    *(Cell("images", m, IMAGES_LR) for m in (DQGAN, DQGAN_1, DESCENT, DQGAN_32)),
    Cell("images", DQGAN_1, IMAGES_LR, steps=LONG),
)


def result_of(cell: Cell) -> dict[str, Any] | None:
    """What was measured; None where it has not been."""
    if not cell.path.exists():
        return None
    read: dict[str, Any] = json.loads(cell.path.read_text(encoding="utf-8"))
    return read


def train(cell: Cell) -> None:
    """Run a cell, unless it is there."""
    if cell.path.exists():
        return
    print(" ".join(cell.command), flush=True)
    program, *words = cell.command
    where = Path(sys.executable).parent / program
    argv = [str(where), *words, "--out", str(cell.path)]
    subprocess.run(argv, check=True, cwd=ROOT, timeout=LIMIT_S, stdout=subprocess.DEVNULL)


def mean(values: Sequence[float]) -> str:
    """The mean, and the ends where there are several."""
    if len(values) == 1:
        return f"{values[0]:.{0 if float(values[0]).is_integer() else 2}f}"
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def last(found: dict[str, Any], name: str, count: int = 3) -> float:
    """A measure's mean over the last evaluations: one alone is luck where players circle."""
    return statistics.fmean(at[name] for at in found["curve"][-count:])


def groups_of(cells: Sequence[Cell]) -> Iterator[tuple[Cell, list[dict[str, Any]]]]:
    """Runs that differ in the seed alone, those that are there."""
    of: dict[tuple[str, float, int, int], list[tuple[Cell, dict[str, Any]]]] = {}
    for cell in cells:
        found = result_of(cell)
        if found is not None:
            key = (cell.method.name, cell.lr, cell.workers, cell.steps)
            of.setdefault(key, []).append((cell, found))
    for runs in of.values():
        yield runs[0][0], [found for _, found in runs]


def row_head(cell: Cell, runs: Sequence[dict[str, Any]]) -> str:
    bits = [statistics.fmean(found["bits"][way] for found in runs) for way in ("up", "down")]
    return (
        f"| {cell.method.name} | {cell.lr:g} | {cell.workers} | {len(runs)} "
        f"| {bits[0]:.2f} + {bits[1]:.2f} "
    )


def ring_table() -> str:
    lines = [
        "| method | lr | workers | seeds | bits up + down | modes of 8 | share close to a mode |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for cell, runs in groups_of(RING):
        modes, close = ([last(found, name) for found in runs] for name in ("modes", "close"))
        lines.append(f"{row_head(cell, runs)}| {mean(modes)} | {mean(close)} |")
    return "\n".join(lines)


def images_table() -> str:
    names = ("distance", "classes", "spread", "doubt")
    heads = ("method", "lr", "workers", "seeds", "bits up + down", "steps", *names)
    lines = [f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}"]
    for cell, runs in groups_of(IMAGES):
        ends = [found["curve"][-1] for found in runs]
        rest = " | ".join(mean([end[name] for end in ends]) for name in names)
        lines.append(f"{row_head(cell, runs)}| {ends[0]['step']:,} | {rest} |")
    real = real_score()
    rest = " | ".join(mean([real[name]]) for name in names)
    lines.append(f"| real training pictures | | | | | | {rest} |")
    return "\n".join(lines)


def real_score() -> dict[str, Any]:
    """What the measure says of pictures that are real: what could be reached at best."""
    path = CELLS / "images" / "real.json"
    if not path.exists():
        sys.path.insert(0, str(ROOT / "examples" / "gan"))
        scorer = importlib.import_module("images")
        both = load(find_folder(None, subset=True))
        judge = scorer.Judge()
        train, test = (scorer.pictures_of(x[:2000]) for x in (both.train_images, both.test_images))
        scores = scorer.score(judge, judge.look(test)[0], train)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**scores, "accuracy": judge.accuracy}))
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


def filled(page: str, mark: str, text: str) -> str:
    begin, end = f"<!-- {mark}: made by bench/gan.py -->", "<!-- end -->"
    before, found, rest = page.partition(begin)
    if not found:
        msg = f"docs/gan.md has no {begin}"
        raise ValueError(msg)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"


def draw_ring(path: Path) -> None:
    """Samples over time, a row for each method; grey is what is to be learnt."""
    picked = [Cell("ring", m, RING_LR) for m in (DQGAN, DQGAN_1, DESCENT)]
    shown = [(cell, found) for cell in picked if (found := result_of(cell)) is not None]
    columns = (0, 2, 4, 7)
    real = real_points()
    figure, axes = plt.subplots(len(shown), 4, figsize=(9.6, 2.5 * len(shown)), squeeze=False)
    for row, (cell, found) in zip(axes, shown, strict=True):
        for place, column in zip(row, columns, strict=True):
            at = found["curve"][column]
            place.scatter(real[:, 0], real[:, 1], s=3, c="#cccccc", linewidths=0)
            made = np.array(at["points"])
            place.scatter(made[:, 0], made[:, 1], s=3, c="#D55E00", linewidths=0)
            place.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), xticks=[], yticks=[], aspect="equal")
            words = f"step {at['step']:,}: {at['modes']} modes, {100 * at['close']:.0f} %"
            place.set_title(words, fontsize=8)
        row[0].set_ylabel(cell.method.name, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def real_points(count: int = 800) -> np.ndarray[Any, Any]:
    """Samples as examples/gan/ring.py draws them."""
    rng = np.random.default_rng(0)
    angles = rng.integers(0, 8, count) * (np.pi / 4)
    centres = 2.0 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.asarray(centres + 0.1 * rng.standard_normal((count, 2)))


def draw_images(path: Path) -> None:
    """Grids of made pictures, and one of real ones."""
    images = load(find_folder(None, subset=True))
    grids = [("real", images.test_images[:64])]
    for cell in IMAGES:
        found = result_of(cell)
        if found is not None:
            at = found["curve"][-1]
            pictures = np.array(at["pictures"], np.uint8).reshape(-1, 28, 28)
            words = f"{cell.method.name}\nstep {at['step']:,}, distance {at['distance']:.0f}"
            grids.append((words, pictures))
    rows = -(-len(grids) // 3)
    figure, axes = plt.subplots(
        rows, 3, figsize=(9.0, 3.5 * rows), squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.06)  # inches: titles have two lines
    for place in axes.flat:
        place.axis("off")
    for place, (words, pictures) in zip(axes.flat, grids, strict=False):
        tiles = pictures.reshape(8, 8, 28, 28).transpose(0, 2, 1, 3).reshape(224, 224)
        place.imshow(tiles, cmap="gray", vmin=0, vmax=255)
        place.set_title(words, fontsize=9, loc="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_page(only: str | None) -> None:
    """The tables and pictures of one game, or of both."""
    page = PAGE.read_text(encoding="utf-8")
    if only in (None, "ring"):
        page = filled(page, "ring", ring_table())
        draw_ring(PAGE.with_name("gan-ring.png"))
    if only in (None, "images"):
        page = filled(page, "images", images_table())
        draw_images(PAGE.with_name("gan-images.png"))
    PAGE.write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("ring", "images"))
    parser.add_argument("--page", action="store_true", help="train nothing, write the page")
    given = parser.parse_args()
    for cell in (*RING, *IMAGES):
        if given.only in (None, cell.game) and not given.page:
            train(cell)
    write_page(given.only)


if __name__ == "__main__":
    main()

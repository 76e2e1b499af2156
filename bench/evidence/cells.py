"""A cell of the results: one training run as a value, and the folder where finished ones are kept.

A cell's file is found by a digest of everything that its numbers follow from: the task and its job,
the recipe with all its parts and options, workers, seed, conditions, the versions of psq and torch,
and `REVISION`. Change a recipe, and its cells are run again; the old files are in nobody's way. Its
name does not matter: two names for the same parts are one cell.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from evidence.methods import Method, Way, method_of
from evidence.subjects import Subject, subject_of

SEEDS: Final = (0, 1, 2)
RATE_SEED: Final = 100
"""Rates are chosen on it, and nothing else is said of it."""
REVISION: Final = 1
"""Counts changes of what is computed that no value of a cell shows."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        task, method: by name.
        workers: among whom the batch is shared.
        seed: of weights, samples and codecs.
        lr: at the start.
        feedback: False: the recipe without its residuals.
        non_iid: alpha of a Dirichlet split of the classes.
        participation: share of the workers in each round.
        way: how it is run.
    """

    task: str
    method: str
    workers: int
    seed: int
    lr: float
    feedback: bool = True
    non_iid: float | None = None
    participation: float = 1.0
    way: Way = "simulated"

    @property
    def subject(self) -> Subject:
        return subject_of(self.task)

    @property
    def how(self) -> Method:
        return method_of(self.method)

    @property
    def name(self) -> str:
        """For people; not everything is in it."""
        words = [self.task, self.method, f"W{self.workers}", f"lr{self.lr:g}", f"s{self.seed}"]
        words += [] if self.feedback else ["no-feedback"]
        words += [] if self.non_iid is None else [f"dirichlet{self.non_iid:g}"]
        words += [] if self.participation == 1.0 else [f"half{self.participation:g}"]
        words += ["processes"] if self.way == "processes" else []
        return " ".join(words)

    def key(self) -> dict[str, Any]:
        """Everything that its numbers follow from, as plain data."""
        subject, method = self.subject, self.how
        cell = {name: value for name, value in dataclasses.asdict(self).items() if name != "method"}
        job = (subject.steps, subject.batch, subject.schedule, subject.every, method.repeats)
        recipe = None
        if method.recipe:
            recipe = _recipe_plain(self.method, feedback=self.feedback)
        return {
            "cell": cell,
            "job": job,
            "recipe": recipe,
            "consistency": method.consistency,
            "rank": method.rank,
            "versions": _versions(),
            "revision": REVISION,
        }


@cache
def _recipe_plain(name: str, *, feedback: bool) -> dict[str, Any]:
    plain = method_of(name).make(feedback=feedback).to_plain()
    return {key: value for key, value in plain.items() if key != "name"}


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("psq-train", "torch")}


class Store:
    """Finished cells, a JSON file each.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[Path, Result] = {}

    def path(self, cell: Cell) -> Path:
        """The cell's file, whether it is there or not."""
        text = json.dumps(cell.key(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self.folder / f"{cell.task}-{digest}.json"

    def has(self, cell: Cell) -> bool:
        """Whether it is finished, or has failed."""
        return self.path(cell).exists()

    def get(self, cell: Cell) -> Result | None:
        """What came of it; None where it was not run. One that failed has a "failure"."""
        path = self.path(cell)
        if path not in self._read:
            if not path.exists():
                return None
            self._read[path] = json.loads(path.read_text(encoding="utf-8"))
        return self._read[path]

    def put(self, cell: Cell, result: Result) -> None:
        """Keep it, all or nothing."""
        path = self.path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        text = json.dumps({"name": cell.name, "key": cell.key(), **result}, allow_nan=False)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)

    def forget_failures(self) -> None:
        """Have those tried again that could not be run."""
        for path in self.folder.glob("*.json"):
            if "failure" in json.loads(path.read_text(encoding="utf-8")):
                path.unlink()

"""The tasks of the results, how long each is trained, and how its score is told.

A global batch has the same samples whatever the number of workers, who share it: so one run of
plain Adam is what all cells of a task and seed are compared with. The learning rate falls linearly
to 0. A point, in the bars, is 1 % of accuracy, or 0.01 nats: 1 % of the perplexity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

from psq_worker.tasks import Task, get_task

IMAGES: Final = ("fashion-mnist", "fashion-resnet")


@dataclass(frozen=True)
class Subject:
    """A task and its job.

    Attributes:
        task: its name.
        title: as a heading.
        score: what its score is called, with the unit.
        points: points in one unit of the metric; below 0 where less is better.
        scale, digits: from the metric to what is shown.
        batch: samples of a step, over all workers.
        steps: a multiple of 16, so that local steps end with a round.
        adam: Adam's own learning rate, torch's default.
        sgd: rates tried for plain SGD.
    """

    task: str
    title: str
    score: str
    points: float
    scale: float
    digits: int
    batch: int
    steps: int
    adam: float
    sgd: tuple[float, ...]
    every: int = 80
    schedule: str = "linear"

    def show(self, value: float, *, sign: bool = False) -> str:
        """A score or a difference of scores in the table's unit."""
        shown = round(self.scale * value, self.digits) or 0.0  # no negative zero
        return f"{shown:{'+' if sign else ''}.{self.digits}f}"


SUBJECTS: Final = (
    Subject(
        task="fashion-mnist",
        title="Convolutional network, Fashion-MNIST",
        score="test accuracy, %",
        points=100,
        scale=100,
        digits=2,
        batch=64,
        steps=480,
        adam=1e-3,
        sgd=(0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
    ),
    Subject(
        task="fashion-resnet",
        title="Residual network, Fashion-MNIST",
        score="test accuracy, %",
        points=100,
        scale=100,
        digits=2,
        batch=64,
        steps=480,
        adam=1e-3,
        sgd=(0.0125, 0.025, 0.05, 0.1, 0.2, 0.4),
    ),
    Subject(
        task="char-lm",
        title="Transformer, characters of Shakespeare",
        score="validation loss, nats",
        points=-100,
        scale=1,
        digits=4,
        batch=16,
        steps=480,
        adam=1e-3,
        sgd=(0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
    ),
)


def subject_of(task: str) -> Subject:
    """By the task's name."""
    return next(subject for subject in SUBJECTS if subject.task == task)


@cache
def task_of(name: str) -> Task:
    """The task itself, on the images that psq ships."""
    return get_task(name, subset=name in IMAGES)

"""Each recipe learns at the rate its preset suggests, and what makes it itself is needed for that.

100 steps of four workers with different data. A loss is stated for each recipe, with some room over
what was seen; and for the same recipe without its essential part a factor by which it ends higher,
or why no such thing shows here. Direction, not proof: one small problem, one seed.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from battery.cluster import Cluster
from battery.tasks import Game, Rings
from psq.plan import Plan
from psq.presets import PRESETS, preset
from psq.recipe import Recipe, Uplink

WORKERS, STEPS = 4, 100
ADAM, SGD = 0.1, 1.0  # the best rates of fp32 and fp32-sgd here, but for steps that explode
VOTE = ADAM / 5  # a tenth is advised; 100 steps are few
GAME = 0.3
UP, DOWN = "uplink.error_feedback=false", "downlink.error_feedback=false"


@dataclass(frozen=True)
class Lesson:
    """How a recipe is taught.

    Attributes:
        lr: at first; it falls to 0.
        loss: what it has to end below.
        options: of the recipe, in both runs.
        broken: the recipe without its essential part: options, or what makes it.
        worse: at least so many times the loss it ends with then; 0: see `indifferent`.
        indifferent: why nothing shows here.
        local_steps: of a worker.
        task: what is learnt.
    """

    lr: float
    loss: float
    options: tuple[str, ...] = ()
    broken: tuple[str, ...] | Callable[[Recipe], Recipe] = ()
    worse: float = 0.0
    indifferent: str = ""
    local_steps: int = 0
    task: Callable[[], Rings | Game] = Rings


class Attacked(Rings):
    """The last of four workers says the opposite, eight times as loud."""

    def gradient(self, rank, step, x):
        """See `Rings`."""
        loud = np.float32(-8.0 if rank == WORKERS - 1 else 1.0)
        return loud * super().gradient(rank, step, x)


def without_memory(recipe):
    """ef21's signs of the gradient itself."""
    forgetful = dataclasses.replace(preset("ef-sgd"), name="forgetful")
    return dataclasses.replace(forgetful, uplink=recipe.uplink)


def in_two_bits(recipe, *, stochastic):
    text = f"uniform:bits=2,stochastic={str(stochastic).lower()}"
    return dataclasses.replace(recipe, uplink=Uplink(text, error_feedback=False))


def without_looking_ahead(_):
    """Plain descent and ascent."""
    return preset("fp32-sgd")


FINE = "with so many bits the codecs leave next to nothing out on so short a way"
NOISE = "with four workers the noise that makes signs right on average costs more than it gives"
LESSONS = {
    "server-adam": Lesson(ADAM, 0.12, indifferent=FINE),
    "qadam": Lesson(2 * ADAM, 0.22, indifferent=FINE),
    "efficient-adam": Lesson(2 * ADAM, 0.22, indifferent=FINE),
    "qadam-1bit": Lesson(2 * ADAM, 0.22, broken=(UP, DOWN), worse=1.5),
    "local-adam": Lesson(ADAM, 0.25, broken=(UP, DOWN), worse=1.2, local_steps=4),
    "server-amsgrad": Lesson(ADAM, 0.12, indifferent="gradients have no early spike here"),
    "shared-adam": Lesson(
        ADAM,
        0.12,
        ("uplink.choice.first=5", "uplink.choice.period=25"),
        broken=(DOWN,),
        worse=1.4,
    ),
    "shared-direction": Lesson(
        ADAM,
        0.14,
        ("uplink.choice.first=5", "uplink.choice.period=25"),
        broken=(UP, DOWN),
        worse=2.0,
    ),
    "onebit-adam": Lesson(ADAM, 0.18, ("uplink.choice.steps=20",), broken=(UP, DOWN), worse=1.4),
    "diloco": Lesson(
        ADAM,
        0.12,
        broken=("apply.momentum=0.0", "apply.nesterov=false"),
        worse=2.0,
        local_steps=8,
    ),
    "coded": Lesson(
        ADAM, 0.12, indifferent="it is server-adam: replicas only make it outlive some"
    ),
    "fp32": Lesson(ADAM, 0.12, indifferent="nothing is left out"),
    "ef-sgd": Lesson(SGD, 0.36, broken=(UP, DOWN), worse=1.5),
    "dist-ef-sgdm": Lesson(SGD / 10, 0.42, broken=(UP, DOWN), worse=1.2),
    "ef21": Lesson(SGD / 2, 0.6, broken=without_memory, worse=1.1),
    "sto-sign": Lesson(VOTE, 0.9, indifferent=NOISE),
    "sto-sign-ef": Lesson(2 * SGD, 0.27, broken=(DOWN,), worse=1.2),
    "dp-sign": Lesson(
        VOTE, 0.85, ("direction.sigma=0.1",), indifferent="its noise protects, it does not teach"
    ),
    "sign-majority": Lesson(
        VOTE, 0.65, indifferent="momentum is for noise that lasts longer than 100 steps"
    ),
    "dist-lion": Lesson(
        VOTE, 0.7, indifferent="momentum is for noise that lasts longer than 100 steps"
    ),
    "dq-sgd": Lesson(SGD, 0.38, indifferent="of two bits it shows: see the test at the end"),
    "dqgan": Lesson(GAME, 0.05, broken=without_looking_ahead, worse=20.0, task=Game),
    "kardam": Lesson(SGD, 0.45, broken=("aggregate=mean",), worse=20.0, task=Attacked),
    "average": Lesson(SGD, 0.38, indifferent=FINE),
    "fp32-sgd": Lesson(SGD, 0.38, indifferent="nothing is left out"),
}


def learnt(recipe, lesson):
    """The loss that a recipe ends with, at a replica's weights."""
    if lesson.local_steps:
        recipe = recipe.with_rhythm(local_steps=lesson.local_steps)
    task = lesson.task()
    replicas = 2 if recipe.aggregate.kind == "coded" else 1
    plan = Plan.of(task.specs, recipe, WORKERS * replicas)
    cluster = Cluster(plan, task.x, task.gradient)
    rounds = STEPS // recipe.direction.local_steps
    for t in range(rounds):
        cluster.step(lesson.lr * (1 - t / rounds))
    return task.loss(cluster.workers[0].x)


def test_every_recipe_has_a_lesson():
    assert set(LESSONS) == set(PRESETS)
    odd = [name for name, each in LESSONS.items() if bool(each.worse) == bool(each.indifferent)]
    assert odd == [], "either it is worse by a factor, or there is a reason"


@pytest.mark.parametrize("name", LESSONS)
def test_a_recipe_learns_and_its_essential_part_is_needed(name):
    lesson = LESSONS[name]
    recipe = preset(name).with_options(*lesson.options)
    loss = learnt(recipe, lesson)
    assert loss <= lesson.loss
    start = lesson.task()
    assert lesson.loss < 0.6 * start.loss(start.x)
    if lesson.worse:
        change = lesson.broken
        broken = change(recipe) if callable(change) else recipe.with_options(*change)
        assert learnt(broken, lesson) >= lesson.worse * loss


def test_rounding_without_bias_is_what_two_bits_can_live_with():
    lesson = LESSONS["dq-sgd"]
    fair, biased = (
        learnt(in_two_bits(preset("dq-sgd"), stochastic=s), lesson) for s in (True, False)
    )
    assert biased >= 1.1 * fair

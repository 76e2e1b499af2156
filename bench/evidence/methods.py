"""The ways to train that are compared: every recipe of psq, plain Adam, and torch's PowerSGD.

A method's learning rate is a factor of a task's own: Adam's, or plain SGD's, which is looked for on
a seed of its own (`cells.RATE_SEED`). The factors are what the presets suggest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from psq.presets import PRESETS, preset
from psq.recipe import Recipe

Base = Literal["adam", "sgd"]
Way = Literal["plain", "simulated", "processes", "ddp"]


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: in files and tables.
        recipe: the preset; empty for what is none.
        options: changes to it, as for --with.
        uplink: another codec than the preset's.
        base, factor: of the learning rate.
        rank: PowerSGD's.
        consistency: what the recipe is made for.
        repeats: how many workers compute the same: each gets so many times the samples.
        note: what is unlike the others, for the table.
    """

    name: str
    recipe: str = ""
    options: tuple[str, ...] = ()
    uplink: str | None = None
    base: Base = "adam"
    factor: float = 1.0
    rank: int = 0
    consistency: str = "bsp"
    repeats: int = 1
    note: str = ""

    def make(self, *, feedback: bool = True) -> Recipe:
        """The recipe, or the same without error feedback."""
        recipe = preset(self.recipe).with_options(*self.options).with_codecs(uplink=self.uplink)
        return recipe if feedback else without_feedback(recipe)

    @property
    def has_feedback(self) -> bool:
        """Whether there is something to take away."""
        return bool(self.recipe) and without_feedback(self.make()) != self.make()


def without_feedback(recipe: Recipe) -> Recipe:
    """The same recipe with no residual on either side."""
    given = [
        f"{side}.error_feedback=false"
        for side in ("uplink", "downlink")
        if getattr(recipe, side).error_feedback
    ]
    return recipe.with_options(*given) if given else recipe


ADAM: Final = Method("adam", note="`torch.optim.Adam` on the whole batch, one process")
POWER: Final = tuple(
    Method(
        f"powersgd-{rank}",
        rank=rank,
        note=f"torch DDP over gloo, PowerSGD rank {rank} with its error feedback, Adam",
    )
    for rank in (1, 4)
)
_GIVEN: Final[dict[str, Method]] = {
    method.name: method
    for method in (
        Method("onebit-adam", "onebit-adam", ("uplink.choice.steps=80",), note="80 steps dense"),
        Method("coded", "coded", repeats=2, note="every sample is computed twice"),
        Method("ef-sgd", "ef-sgd", base="sgd"),
        Method("dist-ef-sgdm", "dist-ef-sgdm", base="sgd", factor=0.1),
        Method("ef21", "ef21", base="sgd", factor=0.5),
        Method("sto-sign", "sto-sign", factor=0.1),
        Method("sto-sign-ef", "sto-sign-ef", base="sgd", factor=2.0),
        Method("dp-sign", "dp-sign", factor=0.1, note="clip 1, noise 1: few workers"),
        Method("sign-majority", "sign-majority", factor=0.1),
        Method("dist-lion", "dist-lion", factor=0.1),
        Method("dq-sgd", "dq-sgd", base="sgd"),
        Method("dqgan", "dqgan", base="sgd"),
        Method(
            "kardam",
            "kardam",
            ("aggregate.f=1",),
            base="sgd",
            consistency="asp",
            note="asynchronous, f = 1",
        ),
        Method("fp32-sgd", "fp32-sgd", base="sgd"),
    )
}
RECIPES: Final = tuple(_GIVEN.get(name) or Method(name, name) for name in PRESETS)
METHODS: Final = (ADAM, *RECIPES, *POWER)
MAIN: Final = ("server-adam", "shared-adam", "qadam-1bit", "shared-direction")


def method_of(name: str) -> Method:
    """By name."""
    return next(method for method in METHODS if method.name == name)

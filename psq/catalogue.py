"""The parts that psq has, as data: options with their ranges, and what may stand beside them.

The arithmetic of each is the class that `rule` names; it is imported when a job first needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from psq.slots import Option, Part

__all__ = ["CATALOGUE", "MAX_PERIOD"]

MAX_PERIOD: Final = 1_000_000
_MAX_FAULTY: Final = 1024
_GRADIENT: Final = ("gradient",)
_ANY: Final = ("gradient", "update", "vote")


def _weight(name: str, default: float, meaning: str) -> Option:
    return Option(name, default, meaning, low=0.0, high=0.9999999)


def _count(name: str, default: int, meaning: str, low: int = 1, high: int = MAX_PERIOD) -> Option:
    return Option(name, default, meaning, low=low, high=high)


def _switch(name: str, meaning: str) -> Option:
    return Option(name, default=False, help=meaning)


_FIRST: Final = _count("first", 20, "steps at the start that refresh")
_PERIOD: Final = _count("period", 64, "steps from one refresh to the next")
_FAULTY: Final = _count("f", 1, "workers that may be faulty", low=0, high=_MAX_FAULTY)

DIRECTIONS: Final = (
    Part(
        "gradient",
        rule="psq.rules.directions:Gradient",
        summary="the gradient itself",
        says="gradient",
    ),
    Part(
        "adam",
        rule="psq.rules.directions:AdamDirection",
        summary="an Adam step with this worker's own moments, the learning rate inside",
        says="update",
        adam=True,
        local=True,
    ),
    Part(
        "momentum",
        options=(
            _weight("beta", 0.9, "weight of what was"),
            _switch("nesterov", "look one step ahead: g + beta m"),
            _switch("ema", "m = beta m + (1 - beta) g, otherwise m = beta m + g"),
            Option("weight_decay", 0.0, "times the weights, added to g", low=0.0, high=1e3),
        ),
        rule="psq.rules.directions:Momentum",
        summary="the gradient with momentum, kept by the worker",
        says="gradient",
    ),
    Part(
        "lion",
        options=(
            _weight("beta1", 0.9, "weight of the momentum in what is said"),
            _weight("beta2", 0.99, "weight of the momentum in what is kept"),
        ),
        rule="psq.rules.directions:Lion",
        summary="Lion: beta1 m + (1 - beta1) g, of which the sign counts",
        says="vote",
    ),
    Part(
        "omd",
        rule="psq.rules.directions:Optimistic",
        summary="optimistic mirror descent: the step from a look-ahead point, rate inside",
        says="update",
    ),
    Part(
        "ef21",
        rule="psq.rules.memory:Ef21",
        summary="the gradient's difference to what was said of it so far",
        says="gradient",
        remembers=True,
        needs=("apply=ef21",),
    ),
    Part(
        "dithered",
        options=(
            Option("b", 0.0, "half the width of the noise; 0: the block's largest value", low=0.0),
        ),
        rule="psq.rules.dithered:Dithered",
        summary="the gradient with uniform noise, so that its sign is right on average",
        says="gradient",
    ),
    Part(
        "gaussian",
        options=(
            Option("clip", 1.0, "largest L2 norm of the whole gradient", low=1e-12),
            Option("sigma", 1.0, "standard deviation of the noise, in the gradient's unit", low=0),
        ),
        rule="psq.rules.private:Gaussian",
        summary="the gradient clipped, with Gaussian noise of a seed only this worker knows",
        says="gradient",
    ),
    Part(
        "onebit",
        rule="psq.rules.replicated:OneBit",
        summary="the gradient during warm-up, then the common momentum moved by it",
        says="gradient",
        adam=True,
        needs=("apply=onebit",),
    ),
    Part(
        "shared",
        rule="psq.rules.replicated:Shared",
        summary="the common direction moved by the gradient in units of sqrt(v)",
        says="gradient",
        adam=True,
        needs=("apply=shared",),
    ),
)

AGGREGATES: Final = (
    Part(
        "mean",
        rule="psq.rules.base:AggregateRule",
        summary="the weighted mean, summed in rank order",
        takes=_ANY,
    ),
    Part(
        "majority",
        rule="psq.rules.votes:Majority",
        summary="+1 or -1, as most workers have it; a tie is +1",
        says="vote",
        takes=("gradient", "vote"),
        family="sign",
    ),
    Part(
        "median",
        rule="psq.rules.robust:Median",
        summary="the coordinate's median",
        takes=_ANY,
        counts_heads=True,
    ),
    Part(
        "trimmed-mean",
        options=(_FAULTY,),
        rule="psq.rules.robust:TrimmedMean",
        summary="the coordinate's mean without its f largest and f smallest values",
        takes=_ANY,
        whole=True,
        counts_heads=True,
    ),
    Part(
        "krum",
        options=(
            _FAULTY,
            _count("m", 1, "messages whose mean counts; over 1 is Multi-Krum", high=_MAX_FAULTY),
        ),
        rule="psq.rules.robust:Krum",
        summary="the messages nearest to their neighbours; not with error feedback",
        takes=_ANY,
        whole=True,
        counts_heads=True,
    ),
    Part(
        "clip",
        options=(Option("norm", 1.0, "largest L2 norm of a worker's whole message", low=1e-12),),
        rule="psq.rules.robust:Clip",
        summary="the mean of messages scaled down to a norm",
        takes=_ANY,
        whole=True,
        counts_heads=True,
    ),
    Part(
        "kardam",
        options=(
            _FAULTY,
            Option(
                "dampening",
                "inverse",
                "how late messages count: 1 / (1 + lateness), exp(-0.2 lateness), or in full",
                choices=("inverse", "exponential", "none"),
            ),
            Option(
                "noise",
                True,  # noqa: FBT003 - the default
                "a gradient may change as much as the workers' own do, however short the way",
            ),
            _count("window", 25, "coefficients of a worker that are remembered", high=1000),
        ),
        rule="psq.rules.kardam:Kardam",
        summary="messages whose growth fits the others', late ones dampened",
        takes=_GRADIENT,
        whole=True,
        counts_heads=True,
    ),
    Part(
        "coded",
        options=(_count("replicas", 2, "workers that compute the same", high=64),),
        rule="psq.rules.coded:Coded",
        summary="the mean of groups of workers, each heard once",
        takes=_ANY,
    ),
)

APPLIES: Final = (
    Part(
        "add",
        rule="psq.rules.applies:Add",
        summary="take the update off the weights",
        takes=("update",),
        replicable=True,
    ),
    Part(
        "adam",
        rule="psq.rules.applies:AdamStep",
        summary="an Adam step on the mean gradient",
        takes=_GRADIENT,
        adam=True,
        replicable=True,
    ),
    Part(
        "sgd",
        options=(
            _weight("momentum", 0.0, "weight of the velocity"),
            _switch("nesterov", "look one step ahead"),
            Option(
                "dampening", 0.0, "share of the gradient the velocity leaves out", low=0.0, high=1.0
            ),
            Option(
                "weight_decay", 0.0, "times the weights, added to the gradient", low=0.0, high=1e3
            ),
            _switch("decoupled", "take the decay off the weights, past the velocity"),
            Option("rate", 0.0, "a learning rate of its own; 0: the pushes'", low=0.0, high=1e6),
        ),
        rule="psq.rules.applies:Sgd",
        summary="a step of SGD, with momentum if wanted",
        takes=("gradient", "vote", "update if rate"),
        replicable=True,
    ),
    Part(
        "ef21",
        rule="psq.rules.applies:Ef21",
        summary="a step of SGD along the sum of all differences said",
        takes=_GRADIENT,
        needs=("direction=ef21", "aggregate=mean"),
    ),
    Part(
        "onebit",
        options=(
            Option("floor", 1e-3, "least root of v that stays, in rms of all", low=0.0, high=1.0),
        ),
        rule="psq.rules.replicas:OneBit",
        summary="Adam during warm-up, then momentum over a v that stays as it is",
        takes=_GRADIENT,
        adam=True,
        replicable=True,
        replicated=True,
        needs=("direction=onebit", "choice=first"),
        in_step=True,
    ),
    Part(
        "shared",
        options=(Option("floor", 1e-3, "smallest unit, in rms of all", low=1e-12, high=1.0),),
        rule="psq.rules.replicas:Shared",
        summary="Adam in units of sqrt(v), which everyone refreshes now and then",
        takes=_GRADIENT,
        adam=True,
        replicable=True,
        replicated=True,
        needs=("direction=shared", "choice=periodic"),
        in_step=True,
    ),
    Part(
        "return",
        rule="psq.rules.applies:Return",
        summary="nothing: the mean goes to an optimizer of each worker's own",
        takes=_GRADIENT,
        replicable=True,
        replicated=True,
        keeps_weights=False,
    ),
)

CHOICES: Final = (
    Part("fixed", rule="psq.rules.base:ChoiceRule", summary="always the same codec"),
    Part(
        "first",
        options=(
            _count("steps", 100, "steps at the start in another codec"),
            Option("codec", "fp32", "the codec of these steps"),
        ),
        rule="psq.rules.choices:First",
        summary="another codec for the first steps",
        codecs=("@codec",),
    ),
    Part(
        "periodic",
        options=(
            _FIRST,
            _PERIOD,
            Option("codec", "uniform:bits=8", "the codec of steps that refresh"),
        ),
        rule="psq.rules.choices:Periodic",
        summary="another codec for the first steps and every so many",
        codecs=("@codec",),
    ),
    Part(
        "dq",
        options=(
            Option("bits", 4.0, "bits a value on average", low=1.0, high=8.0),
            Option("steps", 0, "turns of the whole run; 0: no end", low=0, high=10**9),
            Option("norm", "max", "blocks' largest values, or all: l2", choices=("max", "l2")),
            Option("contraction", 1.0, "a of the strongly convex form", low=1e-6, high=1.0),
            Option("least", 2, "bits a value at least", low=1, high=8),
            Option("most", 8, "bits a value at most", low=1, high=8),
        ),
        rule="psq.rules.dynamic:Dynamic",
        summary="as many bits as the gradient's norm and the budget say",
        codecs=("*",),
        clocked=False,
    ),
)

CATALOGUE: Final[Mapping[str, tuple[Part, ...]]] = MappingProxyType(
    {
        "direction": DIRECTIONS,
        "aggregate": AGGREGATES,
        "apply": APPLIES,
        "choice": CHOICES,
    }
)

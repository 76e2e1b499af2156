"""Recipes without Adam: SGD, votes, games, robust aggregates, and optimizers of the user's own.

"After" a paper means that its formulas were followed as far as they are known; no figure of it is
claimed.
"""

from __future__ import annotations

from typing import Final

from psq.preset import Preset
from psq.recipe import AdamConfig, Aggregate, Apply, Choice, Direction, Downlink, Recipe, Uplink

__all__ = ["SGD_PRESETS"]

_VOTE_RATE: Final = "lr about a tenth of Adam's: every weight moves by lr in every step"
_SIGN: Final = Uplink("sign", error_feedback=False)
_VOTES: Final = Downlink("mean", "sign", error_feedback=False)


def _voting(name: str, direction: Direction) -> Recipe:
    """Signs up, the majority's sign down; nothing is fed back."""
    return Recipe(name, direction, _SIGN, Apply("sgd"), _VOTES, Aggregate("majority"))


def _ef_sgd(_: AdamConfig) -> Recipe:
    return Recipe("ef-sgd", Direction(), Uplink("sign"), Apply("sgd"), Downlink("delta", "sign"))


def _dist_ef_sgdm(_: AdamConfig) -> Recipe:
    momentum = Direction("momentum", options=(("beta", 0.9), ("nesterov", True)))
    return Recipe("dist-ef-sgdm", momentum, Uplink("sign"), Apply("sgd"), Downlink("delta", "sign"))


def _ef21(_: AdamConfig) -> Recipe:
    return Recipe("ef21", Direction("ef21"), _SIGN, Apply("ef21"), Downlink("delta", "sign"))


def _sto_sign(_: AdamConfig) -> Recipe:
    return _voting("sto-sign", Direction("dithered"))


def _sto_sign_ef(_: AdamConfig) -> Recipe:
    return Recipe(
        "sto-sign-ef", Direction("dithered"), _SIGN, Apply("sgd"), Downlink("delta", "sign")
    )


def _dp_sign(_: AdamConfig) -> Recipe:
    return _voting("dp-sign", Direction("gaussian", options=(("clip", 1.0), ("sigma", 1.0))))


def _sign_majority(_: AdamConfig) -> Recipe:
    return _voting("sign-majority", Direction("momentum", options=(("beta", 0.9), ("ema", True))))


def _dist_lion(_: AdamConfig) -> Recipe:
    return _voting("dist-lion", Direction("lion"))


def _dq_sgd(_: AdamConfig) -> Recipe:
    return Recipe(
        "dq-sgd",
        Direction(),
        Uplink("uniform:bits=4,stochastic=true", error_feedback=False, choice=Choice("dq")),
        Apply("sgd"),
        Downlink("weights", "uniform:bits=8", error_feedback=False),
    )


def _dqgan(_: AdamConfig) -> Recipe:
    return Recipe(
        "dqgan", Direction("omd"), Uplink("log:k=2"), Apply("add"), Downlink("delta", "log:k=2")
    )


def _kardam(_: AdamConfig) -> Recipe:
    return Recipe(
        "kardam",
        Direction(),
        Uplink("log:k=6", error_feedback=False),
        Apply("sgd"),
        Downlink("weights", "uniform:bits=8", error_feedback=False),
        Aggregate("kardam"),
    )


def _average(_: AdamConfig) -> Recipe:
    return Recipe(
        "average",
        Direction(),
        Uplink("lloyd-max:bits=4,block=256"),
        Apply("return"),
        Downlink("mean", "lloyd-max:bits=3"),
    )


def _fp32_sgd(_: AdamConfig) -> Recipe:
    return Recipe(
        "fp32-sgd",
        Direction(),
        Uplink("fp32", error_feedback=False),
        Apply("sgd"),
        Downlink("weights", "fp32", error_feedback=False),
    )


SGD_PRESETS: Final = (
    Preset(
        "ef-sgd",
        _ef_sgd,
        "SGD with a sign each way and feedback on both sides.",
        "after EF-SGD (1901.09847)",
        "without momentum or Adam it is as slow as SGD where curvature differs much between "
        "weights, as in transformers",
        "SGD's own learning rate; --with apply.momentum=0.9 for momentum on the server",
    ),
    Preset(
        "dist-ef-sgdm",
        _dist_ef_sgdm,
        "SGD with Nesterov momentum that each worker keeps, a sign each way, feedback on both "
        "sides; the residual is rescaled when the learning rate changes.",
        "after blockwise dist-EF-SGDM (1905.10936)",
        "a momentum of 0.9 is worth a tenfold learning rate: one chosen for plain SGD diverges",
        "SGD's learning rate divided by 10",
    ),
    Preset(
        "ef21",
        _ef21,
        "Each worker pushes the sign of the difference between its gradient and what it has said "
        "of it so far; the server sums all that was said and steps along it.",
        "after EF21 (2106.05203)",
        "what was said follows the gradient slowly, so with small noisy batches it is always late",
        "half of SGD's learning rate, large batches",
    ),
    Preset(
        "sto-sign",
        _sto_sign,
        "Uniform noise makes each sign right on average; the server answers with the majority's "
        "sign, one bit both ways, and keeps nothing.",
        "after stochastic-sign SGD (2002.10940)",
        "with few workers the vote is nearly all noise wherever a gradient is far below its "
        "block's largest",
        _VOTE_RATE,
    ),
    Preset(
        "sto-sign-ef",
        _sto_sign_ef,
        "sto-sign without a vote: the server takes the mean of the signs, and what its own sign "
        "leaves out of it waits in a residual on the server.",
        "after EF-sto-sign (2002.10940)",
        "the noise of the signs is still that of few workers; only the server's loss is made good",
        "twice SGD's learning rate: the mean of the signs is about half of the gradient",
    ),
    Preset(
        "dp-sign",
        _dp_sign,
        "Each worker clips its whole gradient, adds Gaussian noise that only it can know, and says "
        "signs; the majority's come back. Clip, noise and steps together say how little a worker's "
        "messages reveal of its batch.",
        "after dp-sign (2002.10940)",
        "privacy is of whole batches of a worker and adds up over steps; noise that protects much "
        "leaves nothing to learn from a few workers",
        f"clip near the gradient's usual norm, many workers; {_VOTE_RATE}",
    ),
    Preset(
        "sign-majority",
        _sign_majority,
        "The sign of each worker's momentum up, the majority's sign down: Signum, the simple "
        "baseline with one bit both ways and no residual anywhere.",
        "after signSGD with majority vote (1810.05291)",
        "a vote does not know sizes: it stalls at a distance of about lr from the minimum, and "
        "with different data a minority is never heard",
        _VOTE_RATE,
    ),
    Preset(
        "dist-lion",
        _dist_lion,
        "Lion with the momentum on each worker, signs up and the majority's sign down; weight "
        "decay with --with apply.weight_decay=X.",
        "after distributed Lion (2404.00438)",
        "as for sign-majority; Lion wants a larger weight decay than Adam, and a smaller rate",
        _VOTE_RATE,
    ),
    Preset(
        "dq-sgd",
        _dq_sgd,
        "SGD with unbiased rounding, whose bits follow the gradient's norm, the steps that remain "
        "and a budget: each worker chooses them for each shard and step.",
        "after DQ-SGD (2107.14575)",
        "unbiased rounding of few bits is loud: below 4 bits on average a codec with feedback is "
        "better",
        "SGD's own learning rate, --with uplink.choice.bits=4",
    ),
    Preset(
        "dqgan",
        _dqgan,
        "Optimistic mirror descent for games such as GANs: gradients are taken at a look-ahead "
        "point, both players step at once, three bits each way with feedback.",
        "after DQGAN (2010.13359)",
        "it is for games: on a plain minimum the look-ahead gains nothing over SGD",
        "the rate of plain gradient descent on the game",
    ),
    Preset(
        "kardam",
        _kardam,
        "For asynchronous runs with faulty workers: a message counts if the gradient's growth fits "
        "the others', none may speak too often, and late ones count less.",
        "after Kardam (1802.07928)",
        "it refuses honest workers as well where data differ much, needs more than 3 f of them, "
        "and keeps up to 12 bytes a parameter for each of them on the server",
        "--consistency asp, --with aggregate.f=F; --with apply=adam at Adam's learning rate, or "
        "with SGD its rate times the number of workers, as late messages are dampened",
    ),
    Preset(
        "average",
        _average,
        "The server returns the mean gradient in a few bits, and each worker's own torch optimizer "
        "steps with it: any optimizer, its state on every worker.",
        "the common data-parallel scheme, quantized with feedback",
        "a worker that starts late has no optimizer state, and optimizers that draw random numbers "
        "make replicas differ",
        "whatever the optimizer wants with the whole batch",
    ),
    Preset(
        "fp32-sgd",
        _fp32_sgd,
        "Dense both ways, SGD on the server: what the recipes without Adam are measured against.",
        "the yardstick",
        "it sends 30 times as much",
        "SGD's own learning rate",
    ),
)

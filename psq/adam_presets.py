"""Recipes with Adam: its moments on the server, on the workers, or shared by all.

"After" a paper means that its formulas were followed as far as they are known; no figure of it is
claimed.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from psq.preset import Preset
from psq.recipe import AdamConfig, Aggregate, Apply, Choice, Direction, Downlink, Recipe, Uplink

__all__ = ["ADAM_PRESETS"]

_FINE: Final = "lloyd-max:bits=4,block=256"
_SMALL_STEPS: Final = (
    "a worker's own v is that of its small batch, so steps are too small: raise lr with the number "
    "of workers"
)


def _server_adam(adam: AdamConfig) -> Recipe:
    return Recipe(
        "server-adam",
        Direction("gradient"),
        Uplink(_FINE),
        Apply("adam", adam),
        Downlink("delta", "lloyd-max:bits=3"),
    )


def _server_amsgrad(adam: AdamConfig) -> Recipe:
    return dataclasses.replace(_server_adam(adam).with_adam(amsgrad=True), name="server-amsgrad")


def _qadam(adam: AdamConfig) -> Recipe:
    return Recipe(
        "qadam",
        Direction("adam", adam),
        Uplink("log:k=2"),
        Apply("add"),
        Downlink("weights", "uniform:bits=8", error_feedback=False),
    )


def _qadam_1bit(adam: AdamConfig) -> Recipe:
    corrected = dataclasses.replace(adam, variance_correction=True)
    return Recipe(
        "qadam-1bit",
        Direction("adam", corrected),
        Uplink("sign:norm=l2"),
        Apply("add"),
        Downlink("delta", "sign:norm=l2"),
    )


def _local_adam(adam: AdamConfig) -> Recipe:
    one_bit = _qadam_1bit(adam)
    return dataclasses.replace(one_bit, name="local-adam").with_rhythm(local_steps=8)


def _efficient_adam(adam: AdamConfig) -> Recipe:
    return Recipe(
        "efficient-adam",
        Direction("adam", adam),
        Uplink("log:k=2"),
        Apply("add"),
        Downlink("delta", "log:k=2"),
    )


def _shared_adam(adam: AdamConfig) -> Recipe:
    refresh = Choice("periodic", (("first", 8), ("period", 128), ("codec", "lloyd-max:bits=3")))
    return Recipe(
        "shared-adam",
        Direction("shared", adam),
        Uplink(_FINE, choice=refresh),
        Apply("shared", adam),
        Downlink("mean", "sign", choice=refresh),
    )


def _shared_direction(adam: AdamConfig) -> Recipe:
    sign = "sign:block=256"
    refresh = Choice("periodic", (("first", 10), ("period", 128), ("codec", "lloyd-max:bits=4")))
    return Recipe(
        "shared-direction",
        Direction("shared", adam),
        Uplink(sign, choice=refresh),
        Apply("shared", adam),
        Downlink("mean", sign, choice=refresh),
    )


def _onebit_adam(adam: AdamConfig) -> Recipe:
    warm_up = Choice("first", (("steps", 100), ("codec", "fp32")))
    return Recipe(
        "onebit-adam",
        Direction("onebit", adam),
        Uplink("sign", choice=warm_up),
        Apply("onebit", adam),
        Downlink("mean", "sign", choice=warm_up),
    )


def _diloco(adam: AdamConfig) -> Recipe:
    outer = (("momentum", 0.9), ("nesterov", True), ("rate", 0.7))
    return Recipe(
        "diloco",
        Direction("adam", adam, local_steps=16),
        Uplink("lloyd-max:bits=4"),
        Apply("sgd", options=outer),
        Downlink("delta", "lloyd-max:bits=4"),
    )


def _coded(adam: AdamConfig) -> Recipe:
    return Recipe(
        "coded",
        Direction("gradient"),
        Uplink(_FINE),
        Apply("adam", adam),
        Downlink("delta", "lloyd-max:bits=3"),
        Aggregate("coded", (("replicas", 2),)),
    )


def _fp32(adam: AdamConfig) -> Recipe:
    return Recipe(
        "fp32",
        Direction("gradient"),
        Uplink("fp32", error_feedback=False),
        Apply("adam", adam),
        Downlink("weights", "fp32", error_feedback=False),
    )


ADAM_PRESETS: Final = (
    Preset(
        "server-adam",
        _server_adam,
        "Workers push gradients in four bits; the server takes their mean, steps Adam with its own "
        "moments and answers with the weights' change in three. Both sides feed back what their "
        "codecs leave out.",
        "after distributed Adam (2101.05471)",
        "raw gradients of very different sizes share a scale, so below three bits up it loses "
        "accuracy quickly",
        "Adam's own learning rate",
    ),
    Preset(
        "qadam",
        _qadam,
        "Each worker runs Adam with its own moments and pushes the update; the server adds the "
        "mean and answers with the weights in eight bits.",
        "after quantized Adam with error feedback (2004.14180)",
        _SMALL_STEPS,
        "1 to 4 times Adam's learning rate",
    ),
    Preset(
        "qadam-1bit",
        _qadam_1bit,
        "qadam with a sign each way, feedback on both sides, and each worker's v corrected to that "
        "of the whole batch, so that Adam's learning rate fits.",
        "after 2004.14180; the variance correction is psq's own",
        "on a transformer one bit down is visibly behind plain Adam at equal steps",
        "Adam's own learning rate",
    ),
    Preset(
        "local-adam",
        _local_adam,
        "qadam-1bit with eight steps on each worker's own weights for one that is pushed.",
        "after local Adam with two-way feedback; the composition is psq's own",
        "replicas are equal only when a round ends; with many local steps or very different data "
        "workers drift apart",
        "Adam's own learning rate, 4 to 8 local steps",
    ),
    Preset(
        "efficient-adam",
        _efficient_adam,
        "qadam with error feedback on the way down as well: the server answers with the weights' "
        "change in three bits.",
        "after Efficient-Adam (2205.14473)",
        _SMALL_STEPS,
        "1 to 4 times Adam's learning rate",
    ),
    Preset(
        "server-amsgrad",
        _server_amsgrad,
        "server-adam that divides by the largest v so far: a convergence proof at the price of one "
        "more vector on the server.",
        "after COMP-AMS (2205.05632), with an answer of few bits",
        "one early spike of the gradient keeps a weight's steps small for the rest of the run",
        "Adam's learning rate or a little more",
    ),
    Preset(
        "shared-adam",
        _shared_adam,
        "All nodes hold the same direction d and the same unit sqrt(v). A worker pushes d moved by "
        "its gradient in that unit, in four bits; the mean comes back in one bit and is the next "
        "d. In the first 8 steps and every 128th the gradient itself goes both ways in three bits, "
        "which refreshes v. The default.",
        "psq's own; relatives are 2102.02888 and 2202.06009",
        "every node keeps v, sqrt(v) and d, and all must take every step (bsp); v comes of few "
        "gradients, so at rates near the largest that Adam bears refresh it in the first 64 steps",
        "Adam's own learning rate",
    ),
    Preset(
        "shared-direction",
        _shared_direction,
        "shared-adam in one bit each way; in the first 10 steps and every 128th the gradient "
        "itself goes both ways in four bits, which refreshes v.",
        "psq's own; relatives are 2102.02888 and 2202.06009",
        "where gradients grow many times between two refreshes the unit is out of date",
        "Adam's own learning rate; a longer period saves bits, a shorter one follows v closer",
    ),
    Preset(
        "onebit-adam",
        _onebit_adam,
        "Plain Adam in fp32 during warm-up; then v stays as it is and the common momentum goes "
        "both ways in one bit with feedback. For comparison: psq's other recipes need no warm-up.",
        "after 1-bit Adam (2102.02888)",
        "it diverges if v is frozen too early, before it has settled, or where v was nearly 0",
        "warm-up of a sixth of the run: --with uplink.choice.steps=N sets both ways",
    ),
    Preset(
        "diloco",
        _diloco,
        "Each worker takes 16 Adam steps of its own and pushes how far it has come, in four bits; "
        "the server takes the mean as a gradient for SGD with Nesterov momentum.",
        "after DiLoCo (2311.08105); its messages are dense",
        "the outer momentum overshoots with few local steps; replicas are equal only when a round "
        "ends",
        "Adam's learning rate, 16 to 500 local steps, outer rate 0.7",
    ),
    Preset(
        "coded",
        _coded,
        "Workers form groups of two that compute the same on the same data, and the server needs "
        "one of each group: a straggler or a lost worker changes nothing.",
        "after gradient coding (1612.03301) and CodedReduce (1902.01981), by repetition",
        "every gradient is computed twice, and members of a group must be bit-equal: the same "
        "data, seed and kind of machine",
        "a world size that the replicas divide, bsp and one server",
    ),
    Preset(
        "fp32",
        _fp32,
        "Dense both ways, Adam on the server: what the others are measured against.",
        "the yardstick",
        "it sends 30 times as much",
        "Adam's own learning rate",
    ),
)

"""The recipes that have names."""

from __future__ import annotations

import dataclasses

from psq.errors import ConfigError
from psq.recipe import AdamConfig, Apply, Direction, Downlink, Recipe, Uplink

__all__ = ["PRESETS", "preset"]


def _server_adam(adam: AdamConfig) -> Recipe:
    return Recipe(
        "server-adam",
        Direction("gradient"),
        Uplink("lloyd-max:bits=4,block=256"),
        Apply("adam", adam),
        Downlink("delta", "lloyd-max:bits=3"),
    )


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


def _fp32(adam: AdamConfig) -> Recipe:
    return Recipe(
        "fp32",
        Direction("gradient"),
        Uplink("fp32", error_feedback=False),
        Apply("adam", adam),
        Downlink("weights", "fp32", error_feedback=False),
    )


PRESETS = {
    "server-adam": _server_adam,
    "qadam": _qadam,
    "qadam-1bit": _qadam_1bit,
    "local-adam": _local_adam,
    "efficient-adam": _efficient_adam,
    "fp32": _fp32,
}


def preset(name: str, adam: AdamConfig | None = None) -> Recipe:
    """One of PRESETS by name.

    Raises:
        ConfigError: no such recipe; the message lists what exists.
    """
    try:
        make = PRESETS[name]
    except KeyError:
        msg = f"no recipe {name!r}; there are: {', '.join(PRESETS)}"
        raise ConfigError(msg) from None
    return make(adam or AdamConfig())

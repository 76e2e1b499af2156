"""What a person or a probe says of the network, as the model's `Link` and `Cluster`."""

from __future__ import annotations

import os
import re
from typing import Final

from psq.advice.model import LOOPBACK, Link
from psq.errors import ConfigError

__all__ = ["ETHERNET_SHARE", "LOOPBACK_NAME", "cores", "link_of_mbit", "parse_link"]

ETHERNET_SHARE: Final = 1448 / 1538
"""Of a full Ethernet frame with its gap and preamble, what TCP carries for a program."""
LOOPBACK_NAME: Final = "loopback"
MBIT: Final = 1e6
_UNITS: Final = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_RATE: Final = re.compile(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)")


def parse_link(text: str, round_trip_s: float) -> Link:
    """A link as people name it: 100mbit, 2.5gbit, loopback.

    Raises:
        ConfigError: the text is none of these; it shows the form.
    """
    name = text.strip().lower()
    if name == LOOPBACK_NAME:
        return LOOPBACK
    match = _RATE.fullmatch(name)
    if match is None or float(match[1]) == 0.0:
        msg = f"link: expected a rate such as 100mbit or 2.5gbit, or loopback, got {text!r}"
        raise ConfigError(msg)
    payload_bit_s = float(match[1]) * _UNITS[match[2]] * ETHERNET_SHARE
    return Link(payload_bit_s, payload_bit_s, round_trip_s)


def link_of_mbit(up_mbit_s: float, down_mbit_s: float, round_trip_s: float) -> Link:
    """A link as it was measured, in what programs see."""
    return Link(MBIT * up_mbit_s, MBIT * down_mbit_s, round_trip_s)


def cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not everywhere
        return os.cpu_count() or 1

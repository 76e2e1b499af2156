"""Codec specs as text: the same codec with more or fewer bits.

A recipe knows its codecs by their specs only; what they are is `psq.codec`'s to say, which stands
above recipes. The widths here are the ones it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from psq.errors import ConfigError

__all__ = ["WIDTHS", "widths_of"]


class _Widths(NamedTuple):
    option: str
    values: Mapping[int, str]  # by bits
    default: str


_LOG: Final = MappingProxyType({2: "0", 3: "2", 4: "6"})  # the most levels of so many bits
_BITS: Final = MappingProxyType({bits: str(bits) for bits in range(1, 9)})

WIDTHS: Final[Mapping[str, _Widths]] = MappingProxyType(
    {
        "log": _Widths("k", _LOG, "6"),
        "uniform": _Widths("bits", {bits: _BITS[bits] for bits in range(2, 9)}, "4"),
        "lloyd-max": _Widths("bits", {bits: _BITS[bits] for bits in range(1, 5)}, "2"),
    }
)


def widths_of(spec: str, least: int, most: int) -> tuple[str, ...]:
    """Specs of a codec with each number of bits it can have from least to most, ascending.

    The codec itself keeps its spec, whatever options that leaves out.

    Raises:
        ConfigError: it has one width only, or none within the limits.
    """
    name, _, listed = spec.partition(":")
    options = dict(option.partition("=")[::2] for option in listed.split(",") if option)
    widths = WIDTHS.get(name)
    if widths is None:
        msg = f"codec {spec!r} has no bits to change: choose one of {', '.join(WIDTHS)}"
        raise ConfigError(msg)
    own = options.get(widths.option, widths.default)
    found = []
    for bits, value in widths.values.items():
        if least <= bits <= most:
            chosen = options | {widths.option: value}
            other = f"{name}:" + ",".join(f"{key}={text}" for key, text in chosen.items())
            found.append(spec if value == own else other)
    if not found:
        has = ", ".join(map(str, widths.values))
        msg = f"codec {spec!r} has {has} bits, none of them from {least} to {most}"
        raise ConfigError(msg)
    return tuple(found)

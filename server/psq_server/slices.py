"""How a part of a parameter is called in a file of weights: `fc.weight[8192:16384]`, flat.

A server that shares a job with others has some slices of some parameters. Parameter names are free
text, so a name is taken apart from its end.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["parse_slice", "slice_name"]

_SLICE: Final = re.compile(r"(.*)\[(\d{1,19}):(\d{1,19})\]", re.DOTALL)


def slice_name(tensor: str, start: int, stop: int) -> str:
    """The name of values [start, stop) of a flattened parameter."""
    return f"{tensor}[{start}:{stop}]"


def parse_slice(name: str) -> tuple[str, int, int] | None:
    """(tensor, start, stop) of a slice's name; None if it is none."""
    match = _SLICE.fullmatch(name)
    if match is None:
        return None
    return match[1], int(match[2]), int(match[3])

"""Vectors that a user pushes in the place of gradients: checked before any of them is sent.

Nothing is guessed: each pushed parameter has one, in its shape, in float32, finite. What is to be
zero is given as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from psq.errors import UsageError

__all__ = ["check_vectors"]

MAX_NAMES_SHOWN: Final = 8

Spec = tuple[str, tuple[int, ...]]


def check_vectors(vectors: Mapping[str, Tensor], specs: Sequence[Spec]) -> None:
    """Whether `vectors` has what is needed for each of these parameters, and nothing else.

    Args:
        vectors: by the name of the parameter.
        specs: (name, shape) of each parameter that is pushed.

    Raises:
        UsageError: a vector lacks, is of no such parameter, or is not of its shape, float32, dense
            or finite.

    Cost: one read.
    """
    shapes = dict(specs)
    lacking = [name for name in shapes if name not in vectors]
    if lacking:
        msg = f"vectors: none for {_names(lacking)}; give zeros for a parameter that is to rest"
        raise UsageError(msg)
    foreign = [name for name in vectors if name not in shapes]
    if foreign:
        there = _names([*shapes])
        msg = f"vectors: {_names(foreign)} is no parameter that is pushed; there are {there}"
        raise UsageError(msg)
    for name, shape in shapes.items():
        fault = _fault_of(vectors[name], shape)
        if fault:
            msg = f"vectors: {name!r} {fault}; nothing was sent"
            raise UsageError(msg)


def _fault_of(vector: object, shape: tuple[int, ...]) -> str:
    """What is wrong with one; empty when nothing is."""
    if not isinstance(vector, Tensor):
        return f"is a {type(vector).__name__}, expected a tensor (torch.as_tensor makes one)"
    if tuple(vector.shape) != shape:
        return f"has the shape {list(vector.shape)}, the parameter has {list(shape)}"
    if vector.dtype != torch.float32 or vector.layout != torch.strided:
        return f"is {vector.dtype} with layout {vector.layout}, expected dense torch.float32"
    if not bool(torch.isfinite(vector).all()):
        return "holds NaN or Inf"
    return ""


def _names(names: list[str]) -> str:
    more = len(names) - MAX_NAMES_SHOWN
    shown = ", ".join(repr(name) for name in names[:MAX_NAMES_SHOWN])
    return shown + (f" and {more} more" if more > 0 else "")

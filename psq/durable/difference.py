"""What differs between two checkpoints: arrays by name, shape, type and bits; meta by key.

Arrays with equal checksums are not read. The others are compared piece by piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psq.durable.checkpoint import Checkpoint, open_checkpoint
from psq.durable.manifest import ArrayEntry

__all__ = ["Difference", "diff"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that differs.

    Attributes:
        name: of the array, or the meta's key.
        what: "only in a", "only in b", "kind" (shape or dtype), "values", or "meta".
        differing: of values, how many have other bits.
        numel: of how many.
        largest: the largest absolute difference of finite values.
    """

    name: str
    what: str
    differing: int = 0
    numel: int = 0
    largest: float = 0.0


def diff(a: Path, b: Path) -> list[Difference]:
    """Compare two checkpoints; nothing, if they hold the same.

    Raises:
        StateError: one of them is missing or damaged.
    """
    first, second = open_checkpoint(a), open_checkpoint(b)
    found = _diff_meta(first.meta, second.meta)
    for name in {**first.arrays, **second.arrays}:
        one, other = first.arrays.get(name), second.arrays.get(name)
        if one is None or other is None:
            found.append(Difference(name, "only in a" if other is None else "only in b"))
        elif (one.dtype, one.shape) != (other.dtype, other.shape):
            found.append(Difference(name, "kind"))
        elif one.digest != other.digest:
            found.append(_diff_values(first, second, one))
    return found


def _diff_meta(a: dict[Any, Any], b: dict[Any, Any]) -> list[Difference]:
    missing = object()
    keys = [key for key in {**a, **b} if a.get(key, missing) != b.get(key, missing)]
    return [Difference(str(key), "meta") for key in keys]


def _diff_values(first: Checkpoint, second: Checkpoint, entry: ArrayEntry) -> Difference:
    dtype = np.dtype(entry.dtype)
    differing, numel, largest = 0, 0, 0.0
    chunks = zip(first.chunks(entry.name), second.chunks(entry.name), strict=True)
    for one, other in chunks:
        x, y = np.frombuffer(one, dtype), np.frombuffer(other, dtype)
        differing += int(np.count_nonzero(_bits(x) != _bits(y)))
        numel += x.size
        with np.errstate(all="ignore"):
            gaps = np.abs(x.astype(np.float64) - y.astype(np.float64))
        largest = max(largest, float(np.max(gaps, initial=0.0, where=np.isfinite(gaps))))
    return Difference(entry.name, "values", differing, numel, largest)


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    """The same memory as unsigned integers, so that NaN equals NaN and 0.0 is not -0.0."""
    return values.view(f"u{values.dtype.itemsize}")

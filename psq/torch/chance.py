"""The random numbers of a process: Python's, NumPy's and torch's global generators, as one value.

Generators that a script makes for itself are its own to keep (`Worker.keep`).
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["random_state", "set_random_state"]


def random_state() -> dict[str, Any]:
    """Where they stand. Cost: some tens of microseconds, and a synchronization with each GPU."""
    version, words, gauss = random.getstate()
    return {
        "python": (version, np.array(words, np.uint32), gauss),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 - the script's, as it is
        "torch": torch.get_rng_state(),
        "cuda": _on_gpus(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from there."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    np.random.set_state(state["numpy"])  # noqa: NPY002 - as above
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _on_gpus() -> list[torch.Tensor]:
    used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if used else []

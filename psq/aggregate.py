"""How the workers' messages become one: their mean, in a fixed order.

The first contribution is decoded into the accumulator, the others are added by ascending rank, and
the sum is multiplied by f32(1/n). The order is part of the result: float32 sums depend on it, and
two runs of a job must agree to the last bit whatever order the messages arrived in. A worker that
had nothing to say this round is simply not among the contributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from psq.kernels import Buffer, Floats

__all__ = ["Decoder", "mean"]


class Decoder(Protocol):
    """The half of a codec that reads."""

    def decode(self, payload: Buffer, out: Floats) -> None:
        """Write the payload's values to out."""

    def decode_add(self, payload: Buffer, out: Floats) -> None:
        """Add the payload's values to out."""


def mean(codec: Decoder, payloads: Sequence[Buffer], out: Floats) -> None:
    """Write the mean of the decoded payloads to `out`.

    Args:
        codec: what the payloads are written in.
        payloads: the contributions by ascending rank, at least one; already checked.
        out: f32[numel], written.

    Cost: one pass over `out` per payload, and one more for two or more of them.
    """
    first, *rest = payloads
    codec.decode(first, out)
    for payload in rest:
        codec.decode_add(payload, out)
    if rest:
        np.multiply(out, np.float32(1.0 / len(payloads)), out=out)

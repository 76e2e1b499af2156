"""A clipped gradient with Gaussian noise of a seed that only this worker knows, after 2002.10940.

    c = g min(1, clip / |g|) + sigma N(0, 1)          |g|: the L2 norm over the whole model

What leaves the worker is computed from c, so it is as private as c is. What that promises: of two
batches whose gradients differ at all, the clipped ones differ by no more than 2 clip, so a message
is (epsilon, delta)-private, epsilon < 1, with regard to this worker's whole batch where
sigma >= (2 clip / epsilon) sqrt(2 ln(1.25 / delta)); steps add up. Not promised: anything finer
than the batch (gradients are not clipped example by example), nor anything about when a worker
speaks, how long it takes, or whether a gradient was finite. The arithmetic is floating point, which
the theory does not know of.

The noise must be known to nobody else, and must never be used twice: it is drawn from SHAKE-256 of
128 bits from the operating system, which are in no plan, checkpoint or log. A worker that starts
again therefore does not repeat its payloads. Bounds hold in float32 too.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from psq.errors import UsageError
from psq.kernels import Floats
from psq.rules.base import DirectionRule, Segments
from psq.rules.directions import gather

__all__ = ["Gaussian"]

_SECRET_BITS: Final = 128
_MARGIN: Final = 1.0 - 2.0**-20  # more than float32 rounds up: the clipped norm is never over


class Gaussian(DirectionRule):
    """The gradient clipped over the whole model, with noise nobody else can know."""

    needs_all = True

    def setup(self, state: Mapping[str, Floats] | None) -> None:  # noqa: D102 - as the base class
        del state
        self._noise = _Noise(secrets.randbits(_SECRET_BITS))
        self._factor = 0.0
        self._ready: set[int] = set()

    def use_secret(self, secret: int) -> None:
        """Draw the noise from this number: for tests and simulations, where nothing is secret."""
        self._noise = _Noise(secret)

    def prepare(  # noqa: D102 - as the base class
        self, t: int, lr: float, gradients: Sequence[Segments]
    ) -> None:
        del t, lr
        norm = math.sqrt(sum(_square(g) for segments in gradients for g in segments))
        clip = float(self.options["clip"])
        self._factor = 1.0 if norm <= clip * _MARGIN else clip / norm * _MARGIN
        self._ready = {shard.index for shard in self.layout.shards}

    def write(  # noqa: D102, PLR0913 - as the base class
        self,
        shard: int,
        t: int,
        lr: float,
        gradients: Segments,
        out: Floats,
        *,
        weights: Segments | None,
        shared: Mapping[str, Floats],
    ) -> None:
        del t, lr, weights, shared
        if shard not in self._ready:
            msg = f"shard {shard}: clipping needs all gradients of a step first: call prepare"
            raise UsageError(msg)
        self._ready.discard(shard)
        gather(gradients, out)
        np.multiply(out, np.float32(self._factor), out=out)
        noise = self._noise.draw(out.size)
        np.add(out, float(self.options["sigma"]) * noise, out=out, casting="same_kind")


class _Noise:
    """Standard normal numbers from one secret, no bit of which is used twice."""

    def __init__(self, secret: int) -> None:
        self._secret = secret.to_bytes(_SECRET_BITS // 8, "little")
        self._drawn = 0

    def draw(self, numel: int) -> NDArray[np.float64]:
        """f64[numel], by Box and Muller."""
        pairs = (numel + 1) // 2
        source = hashlib.shake_256(self._secret + self._drawn.to_bytes(8, "little"))
        self._drawn += 1
        words = np.frombuffer(source.digest(16 * pairs), "<u8") >> 11
        uniform = (words.astype(np.float64) + 0.5) * 2.0**-53
        radius = np.sqrt(-2.0 * np.log(uniform[:pairs]))
        angle = 2.0 * np.pi * uniform[pairs:]
        return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:numel]


def _square(values: Floats) -> float:
    """The sum of squares, in float64."""
    return float(np.sum(np.square(values, dtype=np.float64)))

"""What is still to be said: one value for each parameter, in f32 or bf16.

No value that is not finite ever enters it. Where the server's step is the learning rate times what
was said, what waits has a weight, that of its own step: it is in units of a rate, and `Rates` keeps
it so when the rate changes.
"""

from __future__ import annotations

import math
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from psq import kernels
from psq.codec import get_codec
from psq.errors import ConfigError, UsageError
from psq.kernels import Floats, Residual, WorkerStep
from psq.kernels.quantizers import quantize_bf16
from psq.kernels.reference import expand
from psq.layout import Layout
from psq.rules.blocks import is_worth_nothing

__all__ = ["Rates", "ResidualType", "Residuals"]

ResidualType: TypeAlias = Literal["f32", "bf16"]
_DTYPES: Final[dict[str, Any]] = {"f32": np.float32, "bf16": np.uint16}
_FORM: Final = get_codec("fp32").format  # of a step that writes no payload


class Residuals:
    """The residual of a whole model, by shard.

    Attributes:
        array: f32[layout.numel], or uint16 for bf16.

    Raises:
        ConfigError: it cannot be kept in that type.
    """

    def __init__(self, layout: Layout, residual_dtype: str) -> None:
        if residual_dtype not in _DTYPES:
            msg = f"a residual cannot be kept in {residual_dtype!r}: choose f32 or bf16"
            raise ConfigError(msg)
        self.array: Residual = np.zeros(layout.numel, _DTYPES[residual_dtype])
        self._shards = layout.shards

    def of(self, shard: int) -> Residual:
        """A shard's view of it."""
        cut = self._shards[shard]
        return self.array[cut.offset : cut.offset + cut.numel]

    def values(self, shard: int) -> Floats:
        """A shard's as f32[shard.numel]: a view where that is how it is kept; only to be read."""
        return expand(self.of(shard))

    def clear(self, shard: int) -> None:
        """Let a shard's start from zero."""
        self.of(shard).fill(0)

    def add(self, shard: int, values: Floats) -> None:
        """Add what is not said now, f32[shard.numel]; a sum that is not finite changes nothing."""
        kernels.active().worker_step(
            WorkerStep(
                uplink=_FORM, gradients=[values], starts=[0], payload=None, residual=self.of(shard)
            )
        )

    def scale(self, shard: int, factor: Floats | np.float32) -> None:
        """Multiply by one number, or f32[shard.numel]; what is not finite then is given up: 0."""
        residual = self.of(shard)
        with np.errstate(all="ignore"):
            product = expand(residual) * factor
            product[~np.isfinite(product)] = 0.0
            residual[:] = product if residual.dtype == np.float32 else quantize_bf16(product)[0]


class Rates:
    """The learning rates that the shards' residuals are in units of.

    Attributes:
        array: f64[shards]; 0: nothing waits yet.
    """

    def __init__(self, residuals: Residuals, shards: int) -> None:
        self.array: NDArray[np.float64] = np.zeros(shards)
        self._residuals = residuals

    def follow(self, shard: int, lr: float) -> bool:
        """Bring a shard's residual to this step's rate.

        Returns:
            Whether it takes part in this step: one with the rate 0, or next to it, moves nothing,
            so what waits goes on waiting, and nothing comes to it.

        Raises:
            UsageError: the rate is negative or not finite.
        """
        if not (math.isfinite(lr) and lr >= 0.0):
            msg = f"the learning rate must be a finite number >= 0, got {lr!r}"
            raise UsageError(msg)
        before = float(self.array[shard])
        if is_worth_nothing(lr, before):
            return False
        if before not in {0.0, lr}:
            self._residuals.scale(shard, np.float32(before / lr))
        self.array[shard] = lr
        return True

"""What is still to be said: one value for each parameter, in f32 or bf16.

No value that is not finite ever enters it.
"""

from __future__ import annotations

from typing import Any, Final, Literal, TypeAlias

import numpy as np

from psq import kernels
from psq.codec import get_codec
from psq.errors import ConfigError
from psq.kernels import Floats, Residual, WorkerStep
from psq.kernels.quantizers import quantize_bf16
from psq.kernels.reference import expand
from psq.layout import Layout

__all__ = ["ResidualType", "Residuals"]

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

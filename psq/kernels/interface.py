"""What every level of kernels offers, and the arguments that have a shape of their own.

Documented, and defined, in `reference`, `reference_optim` and `reference_server`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from psq.kernels.formats import Format
from psq.kernels.reference import Buffer, Floats
from psq.kernels.reference_optim import AdamCoefficients, CorrectionCoefficients

__all__ = ["Kernels", "ServerStep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStep:
    """One round of one shard on a parameter server. The native code reads the fields by name.

    Vectors are f32[numel], C-contiguous, and do not overlap; numel is the sum of the segments.

    Attributes:
        uplink: what the payloads are written in.
        downlink: what the answer is written in.
        segments: how many values each segment has, in order.
        payloads: u8, the contributions by ascending rank, at least one; already checked.
        x: weights, updated.
        scratch: f32, at least as many as the largest segment has; its content means nothing.
        answer: u8 of the downlink's size, written; None: x moves, and nobody is told.
        delta: the answer is the change of x, not x.
        starts: u32 for each segment: where the downlink's random stream begins.
        adam: this step's numbers; None: the mean message is the direction.
        m: Adam's first moment, updated.
        v: Adam's second moment, updated.
        vmax: largest v so far, updated; AMSGrad when given.
        residual: what earlier deltas left out, updated; None: what they leave out is lost.
    """

    uplink: Format
    downlink: Format
    segments: Sequence[int]
    payloads: Sequence[Buffer]
    x: Floats
    scratch: Floats
    answer: Buffer | None
    delta: bool
    starts: Sequence[int]
    adam: AdamCoefficients | None = None
    m: Floats | None = None
    v: Floats | None = None
    vmax: Floats | None = None
    residual: Floats | None = None


class Kernels(Protocol):
    """The kernels of one level."""

    @property
    def name(self) -> str:
        """reference, v2, v3, v4 or neon."""

    def encode(  # noqa: D102, PLR0913, PLR0917
        self,
        family: int,
        bits: int,
        parameter: int,
        block: int,
        values: Floats,
        residual: Floats | None,
        payload: Buffer,
        start: int,
    ) -> None: ...

    def decode(  # noqa: D102, PLR0913, PLR0917
        self,
        family: int,
        bits: int,
        parameter: int,
        block: int,
        payload: Buffer,
        out: Floats,
        add: bool,  # noqa: FBT001
    ) -> None: ...

    def payload_finite(  # noqa: D102, PLR0913, PLR0917
        self, family: int, bits: int, parameter: int, block: int, payload: Buffer, numel: int
    ) -> bool: ...

    def all_finite(self, values: Floats) -> bool: ...  # noqa: D102

    def adam_update(  # noqa: D102, PLR0913
        self,
        g: Floats,
        m: Floats,
        v: Floats,
        out: Floats,
        coefficients: AdamCoefficients,
        *,
        vmax: Floats | None = None,
        x: Floats | None = None,
    ) -> None: ...

    def adam_update_corrected(  # noqa: D102, PLR0913, PLR0917
        self,
        g: Floats,
        m: Floats,
        v: Floats,
        s: Floats,
        out: Floats,
        coefficients: AdamCoefficients,
        correction: CorrectionCoefficients,
        *,
        x: Floats | None = None,
    ) -> None: ...

    def server_step(self, step: ServerStep) -> None: ...  # noqa: D102

"""What every level of kernels offers, and the arguments that have a shape of their own.

Documented, and defined, in `reference`, `reference_optim`, `reference_server` and
`reference_worker`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from psq.kernels.formats import Format
from psq.kernels.reference import Buffer, Floats, Residual
from psq.kernels.reference_optim import AdamCoefficients, CorrectionCoefficients
from psq.kernels.reference_worker import Blend

__all__ = ["Kernels", "ServerStep", "WorkerStep"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStep:
    """One push of one shard by a worker. The native code reads the fields by name.

    Vectors are C-contiguous and do not overlap; numel is the sum of the segments.

    Attributes:
        uplink: what the payload is written in.
        gradients: f32, one array for each segment, in order.
        starts: u32 for each segment: where the payload's random stream begins.
        payload: u8 of the uplink's size, written; None: the direction goes to the residual.
        residual: f32[numel] or bf16[numel] (uint16), updated; None: what is not said is lost.
        adam: this step's numbers; None: the gradient is the direction.
        correction: this step's numbers of the variance correction, with `third` its s; or None.
        m: Adam's first moment, f32[numel], updated.
        v: Adam's second moment, f32[numel], updated.
        third: f32[numel], updated: with a correction s, else vmax (AMSGrad); or None.
        blend: the direction moves a vector by the gradient instead; not with Adam.
        before: that vector, f32[numel]; with a blend.
        unit: what the gradient is divided by in a blend, f32[numel]; or None.
        weights: f32 like the gradients; needed where l2 or decay is not 0.
        scratch: f32, at least as many as the largest segment has; its content means nothing.
            Needed with Adam and with a blend.
        clear: what is finite of the gradients becomes 0; they must then be writable.
        residual_scale: what the residual is multiplied by first, finite: its units have changed.
    """

    uplink: Format
    gradients: Sequence[Floats]
    starts: Sequence[int]
    payload: Buffer | None
    residual: Residual | None
    adam: AdamCoefficients | None = None
    correction: CorrectionCoefficients | None = None
    m: Floats | None = None
    v: Floats | None = None
    third: Floats | None = None
    blend: Blend | None = None
    before: Floats | None = None
    unit: Floats | None = None
    weights: Sequence[Floats] | None = None
    scratch: Floats | None = None
    clear: bool = False
    residual_scale: float = 1.0


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
        residual: Residual | None,
        payload: Buffer,
        start: int,
        clear: bool = False,  # noqa: FBT001, FBT002 - kernels take positions
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

    def topk_ascends(  # noqa: D102, PLR0913, PLR0917
        self, family: int, bits: int, parameter: int, block: int, payload: Buffer, numel: int
    ) -> bool: ...

    def block_norms(  # noqa: D102
        self,
        values: Floats,
        residual: Residual | None,
        block: int,
        largest: bool,  # noqa: FBT001
        out: Floats,
    ) -> None: ...

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

    def worker_step(self, step: WorkerStep) -> None: ...  # noqa: D102

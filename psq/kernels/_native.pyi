# The native levels. What each method does is defined in the modules reference*.

from psq.kernels.interface import ServerStep, WorkerStep
from psq.kernels.reference import Buffer, Floats, Residual
from psq.kernels.reference_optim import AdamCoefficients, CorrectionCoefficients

def levels() -> tuple[str, ...]: ...

class Level:
    def __init__(self, name: str) -> None: ...
    @property
    def name(self) -> str: ...
    def encode(
        self,
        family: int,
        bits: int,
        parameter: int,
        block: int,
        values: Floats,
        residual: Residual | None,
        payload: Buffer,
        start: int,
        clear: bool = False,
    ) -> None: ...
    def decode(
        self,
        family: int,
        bits: int,
        parameter: int,
        block: int,
        payload: Buffer,
        out: Floats,
        add: bool,
    ) -> None: ...
    def payload_finite(
        self, family: int, bits: int, parameter: int, block: int, payload: Buffer, numel: int
    ) -> bool: ...
    def topk_ascends(
        self, family: int, bits: int, parameter: int, block: int, payload: Buffer, numel: int
    ) -> bool: ...
    def block_norms(
        self,
        values: Floats,
        residual: Residual | None,
        block: int,
        largest: bool,
        out: Floats,
    ) -> None: ...
    def all_finite(self, values: Floats) -> bool: ...
    def adam_update(
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
    def adam_update_corrected(
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
    def server_step(self, step: ServerStep) -> None: ...
    def worker_step(self, step: WorkerStep) -> None: ...

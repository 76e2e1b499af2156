"""The kernels of this process: native code of the best level this CPU runs, or the NumPy reference.

Every level gives the same bits (the modules `reference*` define them), so a cluster may
mix machines. The level is chosen at the first use: the best there is, or the one that PSQ_KERNEL
names, which fails where it does not exist. Nothing else in psq touches the native module.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Final

from psq.errors import ConfigError
from psq.kernels import reference
from psq.kernels.formats import BLOCKS, GROUP, WHOLE, Family, Format
from psq.kernels.interface import Kernels, ServerStep, WorkerStep
from psq.kernels.reference import Buffer, Floats, Residual
from psq.kernels.reference_optim import (
    AdamCoefficients,
    CorrectionCoefficients,
    adam_update,
    adam_update_corrected,
)
from psq.kernels.reference_server import compose
from psq.kernels.reference_worker import Blend, blend
from psq.kernels.reference_worker import compose as compose_push

try:
    from psq.kernels import _native
except ImportError:  # installed without a compiler: pure Python, the same bits, slower
    _native = None  # type: ignore[assignment]

__all__ = [
    "BLOCKS",
    "GROUP",
    "WHOLE",
    "AdamCoefficients",
    "Blend",
    "Buffer",
    "CorrectionCoefficients",
    "Family",
    "Floats",
    "Format",
    "Kernels",
    "Residual",
    "ServerStep",
    "WorkerStep",
    "active",
    "all_finite",
    "available",
    "blend",
    "get",
    "level",
    "use",
]

ENVIRONMENT: Final = "PSQ_KERNEL"
REFERENCE: Final = "reference"


class _Reference:
    """The NumPy definitions behind the face of a native level."""

    name = REFERENCE
    encode = staticmethod(reference.encode)
    decode = staticmethod(reference.decode)
    payload_finite = staticmethod(reference.payload_finite)
    topk_ascends = staticmethod(reference.topk_ascends)
    block_norms = staticmethod(reference.block_norms)
    all_finite = staticmethod(reference.all_finite)
    adam_update = staticmethod(adam_update)
    adam_update_corrected = staticmethod(adam_update_corrected)

    def server_step(self, step: ServerStep) -> None:
        compose(self, step)

    def worker_step(self, step: WorkerStep) -> None:
        compose_push(self, step)


_active: Kernels | None = None


def available() -> tuple[str, ...]:
    """Names of the levels this process can run, best first; the last is always "reference"."""
    return (*(_native.levels() if _native is not None else ()), REFERENCE)


def get(name: str) -> Kernels:
    """Return the kernels of one level.

    Raises:
        ConfigError: this CPU or this installation does not have it.
    """
    if name == REFERENCE:
        return _Reference()
    if name not in available():
        here = ", ".join(available())
        why = "" if _native is not None else " (installed without native code)"
        msg = f"kernel level {name!r} cannot run here{why}: choose one of {here}, or none at all"
        raise ConfigError(msg)
    verbs = [name for name in vars(_Reference) if not name.startswith("_")]
    lacking = [verb for verb in verbs if not hasattr(_native.Level, verb)]
    if lacking:
        msg = f"the native kernels are older than psq (no {lacking[0]}): install psq again"
        raise ConfigError(msg)
    return _native.Level(name)


def active() -> Kernels:
    """Return the kernels this process uses: PSQ_KERNEL's, else the best; chosen at the first call.

    Raises:
        ConfigError: PSQ_KERNEL names a level that cannot run here.
    """
    global _active  # noqa: PLW0603 - one choice per process
    if _active is None:
        _active = get(os.environ.get(ENVIRONMENT) or available()[0])
    return _active


def level() -> str:
    """Name the level this process uses.

    Raises:
        ConfigError: PSQ_KERNEL names a level that cannot run here.
    """
    return active().name


@contextlib.contextmanager
def use(name: str) -> Iterator[Kernels]:
    """Let the whole process use one level inside a `with`: for tests and benchmarks.

    Raises:
        ConfigError: this CPU or this installation does not have it.
    """
    global _active  # noqa: PLW0603
    before, _active = _active, get(name)
    try:
        yield _active
    finally:
        _active = before


def all_finite(values: Floats) -> bool:
    """Whether no value is NaN or Inf. values: f32[n]. Cost: one pass over memory."""
    return active().all_finite(values)

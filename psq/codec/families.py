"""The codecs, each a few lines: its parameters, their limits, and the format they mean.

    sign        1 bit            sign * mean |c| (Karimireddy 2019), or * rms (norm=l2)
    log         2, 3 or 4 bits   {0, +-2^-j, j = 0..k} * max |c|, after quantized generic Adam
    uniform     2 to 8 bits      (2^(bits-1) - 1) levels each side of 0, nearest or stochastic
    lloyd-max   1 to 4 bits      centroids of a Gaussian, least-squares scale (as DRIVE and EDEN)
    topk        k values of a block, their mean magnitude with a sign, nothing for the others
    bf16        16 bits          the upper half of a float32
    fp32        32 bits          the values

`block` values share a scale; 0 means the whole segment, as the papers have it. A scale of its own
for every thousand values costs 0.03 bits a value and is far more accurate on real gradients.
Prefer norm=l1 to norm=l2: the l2 scale overshoots where few values dominate a block, and what it
leaves in the residual can be larger than what was there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Final

from psq import kernels
from psq.codec.base import DEFAULT_BLOCK, Codec
from psq.errors import RemotePayloadError
from psq.kernels import BLOCKS, WHOLE, Buffer, Family, Format

__all__ = ["FAMILIES", "Bf16", "Fp32", "LloydMax", "Log", "Sign", "TopK", "Uniform"]

# Of each option: how its values are written, and what they are.
Choices = Mapping[str, Mapping[str, Any]]


def _numbers(values: Iterable[int]) -> Mapping[str, int]:
    return {str(value): value for value in values}


_BLOCK: Final = _numbers(BLOCKS)
_NORMS: Final = ("l1", "l2")


class Sign(Codec):
    """One bit: the sign, times the mean magnitude of the block."""

    name = "sign"
    choices: ClassVar[Choices] = MappingProxyType(
        {"norm": {norm: norm for norm in _NORMS}, "block": _BLOCK}
    )

    def __init__(self, norm: str = "l1", block: int = DEFAULT_BLOCK) -> None:
        parameter = _NORMS.index(norm) + 1
        options = "norm=l2" if norm == "l2" else ""
        super().__init__(
            Format(Family.SIGN, 1, parameter, block), options=options, parameter=parameter
        )


class Log(Codec):
    """Powers of two down to 2^-k of the block's largest value, and 0."""

    name = "log"
    choices: ClassVar[Choices] = MappingProxyType({"k": _numbers(range(7)), "block": _BLOCK})

    def __init__(self, k: int = 6, block: int = DEFAULT_BLOCK) -> None:
        bits = (2 * k + 2).bit_length()  # 2k + 3 levels
        super().__init__(Format(Family.LOG, bits, k, block), options=f"k={k}", parameter=k)


class Uniform(Codec):
    """Evenly spaced levels up to the block's largest value, and 0."""

    name = "uniform"
    choices: ClassVar[Choices] = MappingProxyType(
        {
            "bits": _numbers(range(2, 9)),
            "stochastic": {"false": False, "true": True},
            "block": _BLOCK,
        }
    )

    def __init__(
        self, bits: int = 4, *, stochastic: bool = False, block: int = DEFAULT_BLOCK
    ) -> None:
        family = Family.STOCHASTIC if stochastic else Family.UNIFORM
        options = f"bits={bits}" + (",stochastic=true" if stochastic else "")
        super().__init__(Format(family, bits, 0, block), options=options, parameter=bits)


class LloydMax(Codec):
    """The best levels for Gaussian values."""

    name = "lloyd-max"
    choices: ClassVar[Choices] = MappingProxyType({"bits": _numbers(range(1, 5)), "block": _BLOCK})

    def __init__(self, bits: int = 2, block: int = DEFAULT_BLOCK) -> None:
        form = Format(Family.LLOYD_MAX, bits, 0, block)
        super().__init__(form, options=f"bits={bits}", parameter=bits)


class Bf16(Codec):
    """The upper half of each float32, rounded to nearest even."""

    name = "bf16"
    choices: ClassVar[Choices] = MappingProxyType({})

    def __init__(self) -> None:
        super().__init__(Format(Family.BF16, 16, 0, WHOLE), options="", parameter=0)


class Fp32(Codec):
    """The values themselves: what the others are measured against."""

    name = "fp32"
    choices: ClassVar[Choices] = MappingProxyType({})

    def __init__(self) -> None:
        super().__init__(Format(Family.FP32, 32, 0, WHOLE), options="", parameter=0)


class TopK(Codec):
    """The k largest values of each block, as one size and their places: for slow links.

    k (log2(block) + 1) / block bits a value, and 32 / block for the scale: 0.2 at the defaults.
    Needs error feedback: what is not among the largest waits in the residual until it is.
    """

    name = "topk"
    choices: ClassVar[Choices] = MappingProxyType(
        {
            "k": _numbers(1 << power for power in range(8)),
            "block": _numbers(block for block in BLOCKS if block != WHOLE),
        }
    )

    def __init__(self, k: int = 16, block: int = DEFAULT_BLOCK) -> None:
        power = k.bit_length() - 1
        form = Format(Family.TOPK, block.bit_length(), power, block)
        super().__init__(form, options=f"k={k}", parameter=power)

    def check(self, payload: Buffer, numel: int) -> None:
        """Refuse a payload that is not one of `numel` finite values, or not in order.

        Reads all of it.

        Raises:
            RemotePayloadError: wrong length, a scale that is NaN or Inf, or an entry that names no
                value of its block, or none above the entry before.
        """
        super().check(payload, numel)
        if not kernels.active().topk_ascends(*self.format, payload, numel):
            msg = (
                f"payload of {numel} values in {self.spec!r} has entries that do not ascend "
                "within their blocks: the peer is broken"
            )
            raise RemotePayloadError(msg)


FAMILIES: Final = (Sign, Log, Uniform, LloydMax, Bf16, Fp32, TopK)

"""What every codec is: values in, a payload of an exact size out, and back.

A codec has no state: the residual of error feedback belongs to its caller, randomness comes from a
seed, and all its parameters are in its spec and in its wire id. The arithmetic is in
`psq.kernels`, whose reference defines it; a subclass only says which of its formats it is.

Laws, tested for each codec on every kernel level:

    nbytes(n) bytes exactly; encode writes all of them, decode takes any content
    decode(encode_ef(x, e)) + e' == x + e     exactly for log, uniform, bf16, fp32; otherwise to
                                              half a unit in the last place of the larger term;
                                              with e' in bf16 to 2^-8 of e'
    |c - decode(c)|^2 <= |c|^2                except stochastic, which is c on average instead, and
                                              sign:norm=l2, which only stays below 2 |c|^2
    encode(decode(p)) == p                    for log, uniform, bf16, fp32
    a block of zeros has scale 0 and decodes to 0; a block with NaN or Inf has the scale NaN, which
    `check` refuses, and leaves its residual alone
"""

from __future__ import annotations

from typing import ClassVar, Final

from psq import kernels
from psq.errors import RemotePayloadError
from psq.kernels import BLOCKS, Buffer, Family, Floats, Format, Residual

__all__ = ["DEFAULT_BLOCK", "Codec", "random_start"]

DEFAULT_BLOCK: Final = 1024
_MASK64: Final = (1 << 64) - 1
_BLOCK_CODES: Final = {block: code for code, block in enumerate(BLOCKS)}


class Codec:
    """A quantizer with all its parameters; one instance serves any number of segments and threads.

    Attributes:
        spec: canonical text, what `get_codec` takes: options at their default are left out.
        wire_id: u16, stable for ever: family, then block and parameter, a nibble each.
        bits: per value on the wire, scales not counted; topk: of an entry.
        stochastic: whether `seed` matters.
        format: the kernels' name of it.
    """

    name: ClassVar[str]

    def __init__(self, form: Format, *, options: str, parameter: int) -> None:
        plain = form.family in (Family.BF16, Family.FP32) or form.block == DEFAULT_BLOCK
        block = "" if plain else f"block={form.block}"
        listed = ",".join(filter(None, (options, block)))
        self.spec: Final = f"{self.name}:{listed}" if listed else self.name
        self.wire_id: Final = form.family << 8 | _BLOCK_CODES[form.block] << 4 | parameter
        self.bits: Final = form.bits
        self.stochastic: Final = form.family == Family.STOCHASTIC
        self.format: Final = form

    def __repr__(self) -> str:
        return f"<codec {self.spec}>"

    def nbytes(self, numel: int) -> int:
        """Exact payload bytes of a segment of `numel` values: scales and padded words."""
        return self.format.payload_bytes(numel)

    def encode(
        self, values: Floats, payload: Buffer, *, seed: int = 0, clear: bool = False
    ) -> None:
        """Quantize values.

        Args:
            values: f32[n], C-contiguous.
            payload: u8[nbytes(n)], written.
            seed: of stochastic codecs: the same seed gives the same payload; 64 bits count.
            clear: what is finite of the values becomes 0 in the same pass.

        Raises:
            TypeError: an argument has another type or layout.
            ValueError: a length that does not fit.
        """
        kernels.active().encode(*self.format, values, None, payload, self.start(seed), clear)

    def encode_ef(
        self,
        values: Floats,
        residual: Residual,
        payload: Buffer,
        *,
        seed: int = 0,
        clear: bool = False,
    ) -> None:
        """Quantize values + residual and leave in the residual what the payload does not carry.

        One pass over memory, 12 bytes a value; 8 with a residual in bf16. 4 more with `clear`.

        Args:
            values: f32[n], C-contiguous.
            residual: f32[n], updated in place; untouched where a block is not finite. Or uint16[n]:
                bf16, in which what stays is rounded to nearest.
            payload: u8[nbytes(n)], written.
            seed: as for `encode`.
            clear: as for `encode`.

        Raises:
            TypeError: an argument has another type or layout.
            ValueError: a length that does not fit.
        """
        kernels.active().encode(*self.format, values, residual, payload, self.start(seed), clear)

    def decode(self, payload: Buffer, out: Floats) -> None:
        """Write the payload's values to out, f32[n]. Any content decodes; see `check`.

        Raises:
            TypeError: an argument has another type or layout.
            ValueError: a length that does not fit.
        """
        kernels.active().decode(*self.format, payload, out, False)  # noqa: FBT003 - kernels take positions

    def decode_add(self, payload: Buffer, out: Floats) -> None:
        """Add the payload's values to out, f32[n]; otherwise as `decode`."""
        kernels.active().decode(*self.format, payload, out, True)  # noqa: FBT003 - kernels take positions

    def check(self, payload: Buffer, numel: int) -> None:
        """Refuse a payload that is not one of `numel` finite values.

        Reads the scales only; of bf16 and fp32, which have none, every value.

        Raises:
            RemotePayloadError: wrong length, or a scale (bf16, fp32: a value) that is NaN or Inf.
        """
        length, expected = len(payload), self.nbytes(numel)
        if length != expected:
            msg = (
                f"payload of {numel} values in {self.spec!r} must have {expected} bytes, "
                f"got {length}: both sides must run the same recipe"
            )
            raise RemotePayloadError(msg)
        if not kernels.active().payload_finite(*self.format, payload, numel):
            what = "scale" if self.format.family not in (Family.BF16, Family.FP32) else "value"
            msg = (
                f"payload of {numel} values in {self.spec!r} has a {what} that is NaN or Inf: "
                "what was encoded was not finite"
            )
            raise RemotePayloadError(msg)

    def start(self, seed: int) -> int:
        """Where the kernels' random stream begins for a seed: u32; 0 where the codec has none."""
        return random_start(seed) if self.stochastic else 0


def random_start(seed: int) -> int:
    """Where the random stream of a seed starts: u32, by the finalizer of splitmix64.

    Neighbouring seeds (steps, shards, ranks) give unrelated streams, so callers may count.
    """
    mixed = (seed + 0x9E3779B97F4A7C15) & _MASK64
    mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & _MASK64
    mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & _MASK64
    return (mixed ^ mixed >> 31) >> 32

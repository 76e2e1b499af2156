"""Messages to payloads and back: which codec, which random numbers, what the residual keeps.

A message is f32[shard.numel]. Of a shard's last payload it is remembered how it was made: one that
was not applied is then folded back into the residual it was taken from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from psq.codec import MAX_SCALE, ShardCodec, get_codec
from psq.errors import RemotePayloadError
from psq.feedback.residual import Residuals
from psq.kernels import Buffer, Floats
from psq.plan import Plan
from psq.rules import make_choice
from psq.seeds import stream_seed

__all__ = ["Payloads"]


@dataclass(frozen=True, slots=True)
class _Last:
    """A shard's last payload: its codec, and whether the residual holds what it does not say."""

    codec: ShardCodec
    has_residual: bool


class Payloads:
    """What one worker's messages are written in.

    Attributes:
        choice: what says in which codec.

    Args:
        plan: the job.
        rank: this worker's.
        seed: the job's.
        residuals: where what a payload does not say waits; None: it is lost.
    """

    def __init__(self, plan: Plan, rank: int, seed: int, residuals: Residuals | None) -> None:
        layout = plan.layout
        self._rank = rank
        self._seed = seed
        self._residuals = residuals
        self._codecs = [
            tuple(ShardCodec(get_codec(spec), shard) for spec in plan.uplink_codecs(shard.index))
            for shard in layout.shards
        ]
        self._last = [_Last(codecs[0], residuals is not None) for codecs in self._codecs]
        self.choice: Final = make_choice(plan.recipe.uplink, layout)
        self.choice.bind(self._codecs)

    def codecs(self, shard: int) -> tuple[ShardCodec, ...]:
        """All that a shard may be said in, the default first."""
        return self._codecs[shard]

    def seed(self, shard: int, step: int) -> int:
        """Of the random numbers of a shard's payload in this worker's `step`."""
        return stream_seed(self._seed, self._rank, step, shard)

    def encode(  # noqa: PLR0913 - what a payload is made of
        self,
        shard: int,
        message: Floats,
        payload: Buffer,
        *,
        t: int,
        step: int,
        uses_residual: bool = True,
    ) -> int:
        """Write a message in the codec that is chosen for it.

        Args:
            shard: its index.
            message: f32[shard.numel].
            payload: u8, of which the codec's bytes are written.
            t: the round.
            step: this worker's.
            uses_residual: the residual is added, and takes what is not said.

        Returns:
            The number of the codec.
        """
        codecs, residuals = self._codecs[shard], self._residuals if uses_residual else None
        index = 0
        if len(codecs) > 1:
            index = self.choice.choose(shard, t, self._norm_of(shard, message, residuals))
        codec, seed = codecs[index], self.seed(shard, step)
        target = memoryview(payload)[: codec.nbytes]
        if residuals is None:
            codec.encode(message, target, seed=seed)
        else:
            codec.encode_ef(message, residuals.of(shard), target, seed=seed)
        self._last[shard] = _Last(codec, residuals is not None)
        return index

    def note(self, shard: int, *, has_residual: bool) -> None:
        """Remember of a payload in the default codec, written elsewhere, how it was made."""
        self._last[shard] = _Last(self._codecs[shard][0], has_residual)

    def made(self, shard: int) -> tuple[int, bool]:
        """How a shard's last payload was made: the codec's number, and `note`'s has_residual."""
        last = self._last[shard]
        return self._codecs[shard].index(last.codec), last.has_residual

    def recall(self, shard: int, codec: int, *, has_residual: bool) -> None:
        """Take what `made` said in another process."""
        self._last[shard] = _Last(self._codecs[shard][codec], has_residual)

    def is_finite(self, shard: int, payload: Buffer) -> bool:
        """Whether a shard's last payload says no NaN or Inf. Cost: one read of the scales."""
        codec = self._last[shard].codec
        try:
            codec.check(memoryview(payload)[: codec.nbytes])
        except RemotePayloadError:  # what a server would say of it
            return False
        return True

    def decode(self, shard: int, payload: Buffer, out: Floats) -> None:
        """Write what a shard's last payload says to out, f32[shard.numel]."""
        codec = self._last[shard].codec
        codec.decode(memoryview(payload)[: codec.nbytes], out)

    def fold_back(self, shard: int, payload: Buffer) -> bool:
        """Give a shard's last payload back to the residual it was taken from, if there is one.

        Returns:
            Whether the residual was kept: no server takes a payload over `MAX_SCALE`, and then the
            shard's starts from zero.

        Cost: one shard of memory for the time of the call.
        """
        last, residuals = self._last[shard], self._residuals
        if residuals is None or not last.has_residual:
            return True
        scales = last.codec.scales(memoryview(payload)[: last.codec.nbytes])
        if (np.isfinite(scales) & (np.abs(scales) > MAX_SCALE)).any():
            residuals.clear(shard)
            return False
        said = np.empty(last.codec.shard.numel, np.float32)
        self.decode(shard, payload, said)
        residuals.add(shard, said)
        return True

    def _norm_of(
        self, shard: int, message: Floats, residuals: Residuals | None
    ) -> Callable[[], float]:
        """The norm of what is to be said, as the choice measures it, when it is asked for."""
        residual = None if residuals is None else residuals.of(shard)
        return lambda: self.choice.measure(shard, message, residual)

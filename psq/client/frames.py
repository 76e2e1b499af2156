"""The buffers of a worker's pushes: one per shard, encoded into, sealed and sent in place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from psq.codec import get_codec
from psq.plan import Plan
from psq_proto.frames import HEADER_BYTES

__all__ = ["PushFrames"]


class PushFrames:
    """A frame per shard that a server owns, allocated once: room for the header, then the payload.

    libzmq reads a large frame straight from its buffer, some time after it was sent. As a rule it
    is done long before the buffer is needed again, because the round ended in between; where it is
    not (what was sent before a connection broke), the shard gets a new buffer and the old one is
    let go.

    Args:
        plan: the job, as that server sees it.
        is_lent: whether somebody still reads a buffer.
    """

    def __init__(self, plan: Plan, is_lent: Callable[[bytearray], bool]) -> None:
        codec = get_codec(plan.recipe.uplink.codec)
        sizes = {
            shard.index: sum(codec.nbytes(segment.numel) for segment in shard.segments)
            for shard in plan.owned
        }
        self._is_lent = is_lent
        self._frames = {shard: bytearray(HEADER_BYTES + size) for shard, size in sizes.items()}
        self._payloads = {shard: _payload_of(frame) for shard, frame in self._frames.items()}

    def payload(self, shard: int) -> NDArray[np.uint8]:
        """Where to encode a shard: u8[nbytes], free to be written."""
        if self._is_lent(self._frames[shard]):
            self._replace(shard, bytearray(len(self._frames[shard])))
        return self._payloads[shard]

    def said(self, shard: int) -> NDArray[np.uint8]:
        """What a shard's payload is now: u8[nbytes], to be read."""
        return self._payloads[shard]

    def to_seal(self, shard: int) -> bytearray:
        """The frame with its payload, in a buffer whose header may be written."""
        if self._is_lent(self._frames[shard]):
            self._replace(shard, bytearray(self._frames[shard]))
        return self._frames[shard]

    def _replace(self, shard: int, frame: bytearray) -> None:
        self._frames[shard] = frame
        self._payloads[shard] = _payload_of(frame)


def _payload_of(frame: bytearray) -> NDArray[np.uint8]:
    return np.frombuffer(frame, np.uint8, offset=HEADER_BYTES)

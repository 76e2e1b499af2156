"""The buffers of a worker's pushes: one per shard, encoded into, sealed and sent in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from psq.codec import get_codec
from psq.layout import Shard
from psq.plan import Plan
from psq_proto.frames import HEADER_BYTES

__all__ = ["Frame", "PushFrames"]

Frame: TypeAlias = bytearray | memoryview


class PushFrames:
    """A frame per shard that a server owns, allocated once: room for the header, then the payload.

    Where a shard may be said in several codecs there is room for the longest of them, and a shorter
    payload travels as the beginning of its frame.

    libzmq reads a large frame straight from its buffer, some time after it was sent. As a rule it
    is done long before the buffer is needed again, because the round ended in between; where it is
    not (what was sent before a connection broke), the shard gets a new buffer and the old one is
    let go.

    Args:
        plan: the job, as that server sees it.
        is_lent: whether somebody still reads a buffer.
    """

    def __init__(self, plan: Plan, is_lent: Callable[[Frame], bool]) -> None:
        self._is_lent = is_lent
        self._buffers: dict[int, _Buffer] = {}
        for shard in plan.owned:
            codecs = [get_codec(spec) for spec in plan.uplink_codecs(shard.index)]
            sizes = [_payload_bytes(shard, codec.nbytes) for codec in codecs]
            self._buffers[shard.index] = _Buffer(sizes, [codec.wire_id for codec in codecs])

    def payload(self, shard: int) -> NDArray[np.uint8]:
        """Where to encode a shard: u8[nbytes of its longest codec], free to be written."""
        buffer = self._buffers[shard]
        if self._any_lent(buffer):
            buffer.renew(bytearray(len(buffer.whole)))
        return buffer.payload

    def use(self, shard: int, codec: int) -> None:
        """Note which of the plan's codecs for a shard its payload is written in."""
        self._buffers[shard].codec = codec

    def codec(self, shard: int) -> int:
        """The number of that codec."""
        return self._buffers[shard].codec

    def fill(self, shard: int, codec: int, payload: NDArray[np.uint8]) -> None:
        """Put back what was said of a shard before, u8[nbytes of that codec]."""
        self.use(shard, codec)
        self.payload(shard)[: payload.size] = payload

    def wire_id(self, shard: int) -> int:
        """The codec of a shard's payload, as it is named on the wire."""
        buffer = self._buffers[shard]
        return buffer.wire_ids[buffer.codec]

    def said(self, shard: int) -> NDArray[np.uint8]:
        """What a shard's payload is now: u8[nbytes of its codec], to be read."""
        buffer = self._buffers[shard]
        return buffer.payload[: buffer.sizes[buffer.codec]]

    def to_seal(self, shard: int) -> Frame:
        """The frame with its payload, in a buffer whose header may be written."""
        buffer = self._buffers[shard]
        if self._any_lent(buffer):
            buffer.renew(bytearray(buffer.whole))
        return buffer.frame()

    def _any_lent(self, buffer: _Buffer) -> bool:
        return self._is_lent(buffer.whole) or any(map(self._is_lent, buffer.cuts.values()))


class _Buffer:
    """One shard's: the whole frame, and its beginnings that shorter payloads travel in.

    These are kept, because a link knows by the object what it has lent.
    """

    __slots__ = ("codec", "cuts", "payload", "sizes", "whole", "wire_ids")

    def __init__(self, sizes: Sequence[int], wire_ids: Sequence[int]) -> None:
        self.sizes = sizes
        self.wire_ids = wire_ids
        self.codec = 0
        self.renew(bytearray(HEADER_BYTES + max(sizes)))

    def renew(self, whole: bytearray) -> None:
        self.whole = whole
        self.payload: NDArray[np.uint8] = np.frombuffer(whole, np.uint8, offset=HEADER_BYTES)
        self.cuts: dict[int, memoryview] = {}

    def frame(self) -> Frame:
        length = HEADER_BYTES + self.sizes[self.codec]
        if length == len(self.whole):
            return self.whole
        if length not in self.cuts:
            self.cuts[length] = memoryview(self.whole)[:length]
        return self.cuts[length]


def _payload_bytes(shard: Shard, nbytes: Callable[[int], int]) -> int:
    return sum(nbytes(segment.numel) for segment in shard.segments)

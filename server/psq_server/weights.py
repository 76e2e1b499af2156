"""The weights of a job on this server, and WEIGHTS frames made of them.

A round's frame of a shard is written by the reducer, straight into the buffer that is sent; these
buffers are used again and again. A buffer is free when it is not the shard's last frame (who pulls
may get that), and neither the link nor a queue has it: so two or three a shard are enough, unless
somebody reads slowly, and the number of versions that wait for one peer is bounded.

Whole shards are made anew for each peer that is to have them, when it has room: one that stands
still keeps no buffer that another waits for.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from psq.codec import get_codec
from psq.plan import Plan
from psq_proto.frames import HEADER_BYTES, Buffer, Header, seal
from psq_proto.messages import Flags, MessageType
from psq_server.reduce import Reducer
from psq_server.state import Reduce

__all__ = ["Weights"]


class Weights:
    """The reducer of a job, and frames of what it gives.

    Args:
        plan: the job.
        run_id: in every frame.
        epoch: in every frame.
        is_busy: whether somebody still reads this buffer.
    """

    def __init__(
        self, plan: Plan, run_id: bytes, epoch: int, is_busy: Callable[[Buffer], bool]
    ) -> None:
        self.plan = plan
        self.reducer = Reducer(plan)
        self.buffers = 0
        self._versions = {shard.index: 0 for shard in plan.owned}
        self._is_busy = is_busy
        self._run_id = run_id
        self._epoch = epoch
        self._pool: dict[int, list[bytearray]] = {shard.index: [] for shard in plan.owned}
        downlink = plan.recipe.downlink
        self._codec_id = get_codec(downlink.codec).wire_id
        self._flags = Flags.DELTA if downlink.kind == "delta" else Flags.FULL

    def reduce(self, action: Reduce) -> bytearray:
        """The sealed WEIGHTS of one shard after this round."""
        frame = self._take_buffer(action.shard)
        body = np.frombuffer(frame, np.uint8)[HEADER_BYTES:]
        self.reducer.reduce(action.shard, action.payloads, action.rate, body)
        self._versions[action.shard] = action.round + 1
        self._seal(frame, action.shard, 0, self._codec_id, self._flags)
        return frame

    def full(self, shard: int) -> tuple[int, tuple[Buffer, ...]]:
        """The version that a shard has now, and the sealed WEIGHTS of all of it."""
        full = self.reducer.full(shard)
        frames: list[Buffer] = []
        for part, body in enumerate(full.parts):
            frame = bytearray(HEADER_BYTES)
            frame += body.data
            self._seal(frame, shard, part, full.wire_id, Flags.FULL)
            frames.append(frame)
        return self._versions[shard], tuple(frames)

    def _take_buffer(self, shard: int) -> bytearray:
        """A free buffer of the pool: the one that was used longest ago; a new one if none is."""
        pool = self._pool[shard]
        for index, buffer in enumerate(pool[:-1]):
            if not self._is_busy(buffer):
                pool.append(pool.pop(index))
                return buffer
        self.buffers += 1
        pool.append(bytearray(HEADER_BYTES + self.reducer.payload_nbytes(shard)))
        return pool[-1]

    def _seal(self, frame: bytearray, shard: int, part: int, codec: int, flags: Flags) -> None:
        header = Header(
            type=MessageType.WEIGHTS,
            codec=codec,
            run_id=self._run_id,
            epoch=self._epoch,
            flags=flags,
            version=self._versions[shard],
            plan=self.plan.digest,
            shard=shard,
            part=part,
        )
        seal(frame, header)

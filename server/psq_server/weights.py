"""The weights of a job on this server, and WEIGHTS frames made of them.

A round's frame of a shard is written by the reducer, straight into the buffer that is sent; these
buffers are used again and again. A buffer is free when it is not the shard's last frame (who pulls
may get that), and neither the link nor a queue has it: so two or three a shard are enough (of each
length, where rounds are written in different codecs), unless somebody reads slowly, and the number
of versions that wait for one peer is bounded.

Whole shards are made anew for each peer that is to have them, when it has room: one that stands
still keeps no buffer that another waits for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from psq.plan import Plan
from psq_proto.frames import HEADER_BYTES, Buffer, Header, seal
from psq_proto.messages import Flags, MessageType
from psq_server.reduce import Reducer
from psq_server.state import Judge, Judged, Reduce

__all__ = ["Weights"]

_FLAGS: Final = {
    "weights": Flags.FULL,
    "delta": Flags.DELTA,
    "mean": Flags.MEAN,
    "nothing": Flags.MEAN | Flags.SKIP,
}


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
        self._pool: dict[tuple[int, int], list[bytearray]] = {}

    def reduce(self, action: Reduce) -> bytearray:
        """The sealed WEIGHTS of one shard after this round."""
        nbytes = self.reducer.payload_nbytes(action.shard, anything=bool(action.said))
        frame = self._take_buffer(action.shard, nbytes)
        body = np.frombuffer(frame, np.uint8)[HEADER_BYTES:]
        answer = self.reducer.step(action.shard, action.said, action.rate, body)
        self._versions[action.shard] = action.round + 1
        flags = _FLAGS[answer.kind]
        self._seal(frame, action.shard, 0, answer.wire_id, flags, answer.rate)
        return frame

    def judge(self, action: Judge) -> Judged:
        """What the recipe's rules make of a whole round."""
        judged = self.reducer.judge(action.round, action.said, action.rate)
        return Judged(
            action.round,
            weights={rank: one.weight for rank, one in judged.items() if not one.refused},
            refused={rank: one.refused for rank, one in judged.items() if one.refused},
        )

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

    def _take_buffer(self, shard: int, nbytes: int) -> bytearray:
        """A free buffer of the pool: the one that was used longest ago; a new one if none is."""
        pool = self._pool.setdefault((shard, nbytes), [])
        for index, buffer in enumerate(pool[:-1]):
            if not self._is_busy(buffer):
                pool.append(pool.pop(index))
                return buffer
        self.buffers += 1
        pool.append(bytearray(HEADER_BYTES + nbytes))
        return pool[-1]

    def _seal(  # noqa: PLR0913, PLR0917 - what a header says of a shard
        self,
        frame: bytearray,
        shard: int,
        part: int,
        codec: int,
        flags: Flags,
        rate: float = 0.0,
    ) -> None:
        header = Header(
            type=MessageType.WEIGHTS,
            codec=codec,
            run_id=self._run_id,
            epoch=self._epoch,
            flags=flags,
            version=self._versions[shard],
            rate=rate,
            plan=self.plan.digest,
            shard=shard,
            part=part,
        )
        seal(frame, header)

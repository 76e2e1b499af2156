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

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from psq.errors import StateError
from psq.plan import Plan
from psq_proto.frames import HEADER_BYTES, Buffer, Header, decode_frame, seal
from psq_proto.messages import Flags, MessageType
from psq_server.reduce import MEMORY, Reducer
from psq_server.shadow import Shadow
from psq_server.state import Judge, Judged, Reduce

__all__ = ["Stored", "Weights"]

_FLAGS: Final = {
    "weights": Flags.FULL,
    "delta": Flags.DELTA,
    "mean": Flags.MEAN,
    "nothing": Flags.MEAN | Flags.SKIP,
}


class Stored(Protocol):
    """Arrays on a disk; `psq.durable.Checkpoint` is one."""

    @property
    def arrays(self) -> Mapping[str, object]:
        """Their names."""

    def read(self, name: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """One of them, in `out` if that is given."""


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
        self._last: dict[int, bytearray] = {}
        self._shadow: Shadow | None = None

    def reduce(self, action: Reduce) -> bytearray:
        """The sealed WEIGHTS of one shard after this round."""
        if self._shadow is not None:
            self._shadow.protect(action.shard)
        nbytes = self.reducer.payload_nbytes(action.shard, anything=bool(action.said))
        frame = self._take_buffer(action.shard, nbytes)
        body = np.frombuffer(frame, np.uint8)[HEADER_BYTES:]
        answer = self.reducer.step(action.shard, action.said, action.rate, body)
        self._versions[action.shard] = action.round + 1
        flags = _FLAGS[answer.kind]
        self._seal(frame, action.shard, 0, answer.wire_id, flags, answer.rate)
        self._last[action.shard] = frame
        return frame

    def judge(self, action: Judge) -> Judged:
        """What the recipe's rules make of a whole round."""
        if self._shadow is not None:
            self._shadow.protect_all()  # a rule that takes whole rounds moves its own vectors now
        judged = self.reducer.judge(action.round, action.said, action.rate)
        return Judged(
            action.round,
            weights={rank: one.weight for rank, one in judged.items() if not one.refused},
            refused={rank: one.refused for rank, one in judged.items() if one.refused},
        )

    # ---- what outlives the process

    @property
    def versions(self) -> dict[int, int]:
        """The version that moved each shard last."""
        return dict(self._versions)

    @property
    def last_frames(self) -> dict[int, tuple[Buffer, ...]]:
        """What was broadcast last of each shard."""
        return {shard: (frame,) for shard, frame in self._last.items()}

    def watch(self, is_busy: Callable[[Buffer], bool]) -> None:
        """From now on ask this whether somebody still reads a buffer."""
        self._is_busy = is_busy

    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What belongs to the arrays of this moment, and where the parameters are in them.

        That is counts, versions and what the rules know; of each parameter its shape, and the
        ranges of arrays that are its values.
        """
        counts = {shard: list(each) for shard, each in self.reducer.counts().items()}
        named = {
            name: {"shape": list(shape), "pieces": [[f"x.{s}", a, b] for s, a, b in pieces]}
            for name, (shape, pieces) in self.reducer.vectors.pieces().items()
        }
        known = self.reducer.memory()[1]
        return {"counts": counts, "shards": self.versions, "memory": known}, named

    def still(self) -> dict[str, NDArray[Any]]:
        """Every array, not copied: for a server that stands still."""
        arrays: dict[str, NDArray[Any]] = {}
        for shard in self._versions:
            arrays |= self._piece(shard)
        return arrays | self.reducer.memory()[0]

    def shadow(self) -> Shadow:
        """Every array as it is at this moment, while rounds go on; until `let_go`."""
        self._shadow = Shadow(self._versions, self._piece, self.reducer.memory()[0])
        return self._shadow

    def let_go(self) -> None:
        """The shadow is written, or cannot be: nothing more is copied for it."""
        self._shadow = None

    def resume(self, facts: Mapping[str, Any], stored: Stored) -> None:
        """Take what was kept.

        Args:
            facts: what `facts` gave.
            stored: the arrays that went with it.

        Raises:
            StateError: an array is missing, or cannot be read.
        """
        for shard in self._versions:
            self._versions[shard] = operator.index(facts["shards"][shard])
            for name, view in self._piece(shard).items():
                if name not in stored.arrays:
                    msg = f"the checkpoint has no array {name!r}, which this job keeps"
                    raise StateError(msg)
                stored.read(name, view)
            if f"frame.{shard}" in stored.arrays:
                self._last[shard] = self._again(stored.read(f"frame.{shard}"))
        self.reducer.resume({shard: tuple(each) for shard, each in facts["counts"].items()})
        memory = {name: stored.read(name) for name in stored.arrays if MEMORY in name}
        self.reducer.remember(memory, facts["memory"])

    def _piece(self, shard: int) -> dict[str, NDArray[Any]]:
        """What moves with a shard, and the last that was said of it."""
        of = self.reducer.vectors.of
        arrays: dict[str, NDArray[Any]] = {
            f"{name}.{shard}": of(vector, shard)
            for name, vector in self.reducer.state_arrays().items()
        }
        if shard in self._last:
            arrays[f"frame.{shard}"] = np.frombuffer(self._last[shard], np.uint8)
        return arrays

    def _again(self, frame: NDArray[np.uint8]) -> bytearray:
        """A frame of an earlier start, sealed for this one; a buffer of the pool."""
        header, body = decode_frame(frame.tobytes())
        buffer = bytearray(HEADER_BYTES)
        buffer += body
        seal(buffer, replace(header, epoch=self._epoch, body_len=0, body_crc=0))
        self._pool.setdefault((header.shard, body.nbytes), []).append(buffer)
        self.buffers += 1
        return buffer

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

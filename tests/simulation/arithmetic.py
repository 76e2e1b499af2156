"""Integers in place of weights: what is wanted, what is said, and what a server makes of it.

A shard is two numbers, each an integer that f32 holds exactly: its value, and the sum of the
tickets of all that ever moved it. A ticket is the number of one encoding: whoever encodes twice has
two. What a worker wants to say depends on the weights that it computes from, so that a wrong weight
is not forgotten; it says a multiple of GRAIN, and the rest waits in its residual.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from psq.codec import get_codec
from psq.plan import Plan
from psq_proto.frames import Buffer, Header, decode_frame, encode_frame
from psq_proto.messages import Flags, MessageType
from psq_server.state import Judge, Judged, Pushed, Reduce

__all__ = [
    "INITIAL",
    "RATE",
    "IntegerWeights",
    "direction",
    "is_refused",
    "is_skipped",
    "numbers",
    "pack",
    "split",
    "wire_id",
]

GRAIN: Final = 4
SPREAD: Final = 41
RATE: Final = 0.5
INITIAL: Final = 7
NUMBERS: Final = struct.Struct("<2f")


def direction(rank: int, base: int, shard: int, weight: int) -> int:
    """What a rank wants to add to a shard of version `base` that has this weight."""
    mixed = (rank + 1) * 7919 + base * 104729 + shard * 1299709 + weight * 15485863
    return (mixed >> 3) % SPREAD - SPREAD // 2


def split(wanted: int) -> tuple[int, int]:
    """What is said of a value, and what is not."""
    said = GRAIN * (wanted // GRAIN)
    return said, wanted - said


def is_skipped(rank: int, base: int, shard: int) -> bool:
    """Whether a rank that skips at times has nothing to say to this shard now."""
    return (rank * 31 + base * 17 + shard * 7) % 5 == 0


def is_refused(rank: int, round_: int) -> bool:
    """Whether the rule of judged rounds refuses this rank."""
    return (rank * 13 + round_ * 7) % 3 == 0


def pack(value: int, ticket: int) -> bytes:
    """A shard's two numbers as they travel: f32[2]."""
    return NUMBERS.pack(value, ticket)


def numbers(body: Buffer) -> tuple[int, int]:
    """The two numbers in a payload."""
    value, ticket = NUMBERS.unpack(body)
    assert value.is_integer(), value
    assert ticket.is_integer(), ticket
    return int(value), int(ticket)


def wire_id() -> int:
    """What payloads are written in."""
    return get_codec("fp32").wire_id


class IntegerWeights:
    """A server's weights, and WEIGHTS frames of them; what `psq_server.weights.Weights` is.

    Args:
        plan: the job.
        run_id, epoch: in every frame.
        on_reduced: told of each shard that was reduced: round, shard, what was said, both numbers.
    """

    def __init__(
        self,
        plan: Plan,
        run_id: bytes,
        epoch: int,
        on_reduced: Callable[[int, int, tuple[Pushed, ...], tuple[int, int]], None],
    ) -> None:
        self.plan = plan
        self.values: dict[int, tuple[int, int]] = {shard.index: (0, 0) for shard in plan.owned}
        self.versions = dict.fromkeys(self.values, 0)
        self._run_id, self._epoch = run_id, epoch
        self.on_reduced = on_reduced
        self._last: dict[int, bytearray] = {}

    def init(self, shard: int, values: Buffer) -> None:
        """Take a shard's first weights."""
        self.values[shard] = numbers(values)

    def reduce(self, action: Reduce) -> bytearray:
        """Add what was said; the sealed WEIGHTS of the shard after it."""
        shard = action.shard
        said = [numbers(pushed.payload) for pushed in action.said]
        change = (sum(value for value, _ in said), sum(ticket for _, ticket in said))
        before = self.values[shard]
        now = self.values[shard] = (before[0] + change[0], before[1] + change[1])
        self.versions[shard] = action.round + 1
        self.on_reduced(action.round, shard, action.said, now)
        is_delta = self.plan.recipe.downlink.kind == "delta"
        kind, news = (Flags.DELTA, change) if is_delta else (Flags.FULL, now)
        frame = self._last[shard] = self._frame(shard, kind, news)
        return frame

    def judge(self, action: Judge) -> Judged:
        """Refuse some ranks, always the same ones in the same round."""
        ranks = {pushed.rank for said in action.said.values() for pushed in said}
        refused = {rank: "unlucky: today" for rank in ranks if is_refused(rank, action.round)}
        return Judged(action.round, {}, refused)

    @property
    def version(self) -> int:
        """The newest that any shard has."""
        return max(self.versions.values())

    def full(self, shard: int) -> tuple[int, tuple[Buffer, ...]]:
        """The version that a shard has now, and the sealed WEIGHTS of all of it."""
        return self.versions[shard], (self._frame(shard, Flags.FULL, self.values[shard]),)

    # ---- what outlives the process

    @property
    def last_frames(self) -> dict[int, tuple[Buffer, ...]]:
        """What was broadcast last of each shard."""
        return {shard: (frame,) for shard, frame in self._last.items()}

    def facts(self) -> tuple[dict[str, object], dict[str, object]]:
        """What belongs to the arrays of this moment; there are no parameters."""
        return {"versions": dict(self.versions)}, {}

    def still(self) -> dict[int, bytes]:
        """By shard its two numbers, and the last frame."""
        return {s: pack(*v) + bytes(self._last.get(s, b"")) for s, v in self.values.items()}

    shadow = still

    def let_go(self) -> None:
        """What `shadow` gave is a copy."""

    def resume(self, facts: Mapping[str, dict[int, int]], arrays: Mapping[int, bytes]) -> None:
        """Take what was kept, and seal it for this epoch."""
        self.versions = dict(facts["versions"])
        for shard, kept in arrays.items():
            self.values[shard] = numbers(kept[: NUMBERS.size])
            if kept[NUMBERS.size :]:
                header, body = decode_frame(kept[NUMBERS.size :])
                again = replace(header, epoch=self._epoch, body_len=0, body_crc=0)
                self._last[shard] = encode_frame(again, body)

    def _frame(self, shard: int, flags: Flags, said: tuple[int, int]) -> bytearray:
        header = Header(
            type=MessageType.WEIGHTS,
            codec=wire_id(),
            run_id=self._run_id,
            epoch=self._epoch,
            flags=flags,
            version=self.versions[shard],
            plan=self.plan.digest,
            shard=shard,
        )
        return encode_frame(header, pack(*said))

"""A round under way as a value that another process can go on with, and back."""

from __future__ import annotations

from psq.client.frames import PushFrames
from psq.client.identity import Kept, Pending
from psq.client.round import Round

__all__ = ["pending_of", "say_as_before"]


def pending_of(current: Round, frames: PushFrames) -> Pending | None:
    """What was said in a round, payloads copied; None: nothing."""
    if not current.pushed and not current.skipped:
        return None
    pushed = {
        shard: Kept(
            frames.said(shard).copy(),
            frames.codec(shard),
            current.weights.get(shard),
        )
        for shard in sorted(current.pushed)
    }
    return Pending(
        current.number,
        current.rate,
        current.weight,
        pushed,
        frozenset(current.skipped),
        silent=current.skipped_whole,
    )


def say_as_before(current: Round, pending: Pending, frames: PushFrames) -> None:
    """Note in a new round all that was said in it before, and put the payloads back."""
    for shard, kept in pending.pushed.items():
        current.push(shard, kept.weight)
        frames.fill(shard, kept.codec, kept.payload)
    current.skipped.update(pending.skipped)
    current.skipped_whole = pending.silent

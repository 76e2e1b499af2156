"""What a round says on the wire: each shard once, and again what was lost on the way.

While not joined nothing is queued: after WELCOME a STATUS will call it missing. Which shards are
said again, and when, is the machine's decision; that they are the same bytes is decided here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

from psq.client.frames import Frame, PushFrames
from psq.client.round import Round
from psq_proto.messages import NO_SHARD, Flags, MessageType
from psq_proto.session import State, WorkerSession

__all__ = ["Speech"]

_TYPE_OFFSET: Final = 5


class Speech:
    """The pushes of one worker to one server.

    Args:
        session: seals them.
        frames: holds them.

    Attributes:
        outbox: what is to be sent, pushes and all else, in order.
        beats: heartbeats sent since WELCOME.
        resent_frames: frames said again.
    """

    def __init__(self, session: WorkerSession, frames: PushFrames) -> None:
        self.outbox: deque[Frame] = deque()
        self.beats = 0
        self.resent_frames = 0
        self._session = session
        self._frames = frames

    def push(self, shard: int, current: Round) -> None:
        """Queue a shard's payload."""
        current.fence = self.beats
        if self._session.state is not State.JOINED:
            return
        frame, weight = self._frames.to_seal(shard), current.weight_of(shard)
        self._session.seal(
            frame,
            MessageType.PUSH,
            codec=self._frames.wire_id(shard),
            seq=current.number,
            round=current.number,
            version=current.number,
            rate=current.rate,
            shard=shard,
            part=weight if weight != 1 else 0,
        )
        self.outbox.append(frame)

    def skip(self, shards: Iterable[int], current: Round) -> None:
        """Say nothing of these shards, each by its name.

        Only a contribution without any payload is skipped in one message: such a SKIP speaks of all
        shards not said yet, and a shard whose PUSH came damaged would be among them.
        """
        current.fence = self.beats
        if self._session.state is not State.JOINED:
            return
        for shard in (NO_SHARD,) if current.skipped_whole else shards:
            frame = self._session.send(
                MessageType.PUSH,
                flags=Flags.SKIP,
                seq=current.number,
                round=current.number,
                version=current.number,
                rate=current.rate,
                shard=shard,
            )
            self.outbox.append(frame)

    def again(self, current: Round, missing: Iterable[int]) -> None:
        """Say again what the server misses of what was said."""
        lost = [shard for shard in missing if shard in current.pushed]
        skips = [shard for shard in missing if shard in current.skipped]
        for shard in lost:
            self.push(shard, current)
        if skips:
            self.skip(skips, current)
        self.resent_frames += len(lost) + (1 if current.skipped_whole and skips else len(skips))

    def ask(self, current: Round) -> None:
        """Say anything of a contribution again: it makes the server give its verdict.

        It was lost, or the rounds that may take the contribution are over, and what this server
        misses now is of another one.
        """
        if not current.pushed and not current.skipped:
            return
        if current.pushed:
            self.push(min(current.pushed), current)
        else:
            self.skip(sorted(current.skipped)[:1], current)
        self.resent_frames += 1

    def drop_pushes(self) -> None:
        """Take back what is queued: the round is over, and its buffers are needed."""
        if self.outbox:
            kept = [frame for frame in self.outbox if frame[_TYPE_OFFSET] != MessageType.PUSH]
            self.outbox.clear()
            self.outbox.extend(kept)

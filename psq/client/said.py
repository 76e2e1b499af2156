"""What a worker has said since its server's last checkpoint, kept for the server's sake.

At durability level `replay` a server's journal says who said what, and not the bytes: these are
with the workers. A server that comes back asks for them (RECALL), and gets the very bytes again
(AGAIN), or hears that this process has not kept them.

    a contribution ends with its verdict      its payloads are copied, under the version it led to
    the server has a checkpoint on disk       what led up to that version is let go
    the server asks                           shard by shard, as the link has room

Only what the server says of its disk lets anything go; that a version becomes a checkpoint is not
it. Everything lies in this process's memory, and ends with it. How much that may be is the server's
to see to, which makes a checkpoint in time and lets rounds wait for it; what goes beyond
`MAX_BYTES` for all that is let go, the oldest first, so that no server can fill this machine.

Pure bookkeeping: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from psq.client.frames import PushFrames
from psq.client.round import Round
from psq_proto.frames import HEADER_BYTES, Header
from psq_proto.messages import NONE, ControlBody, Flags, MessageType, Recall
from psq_proto.session import WorkerSession

__all__ = ["MAX_BYTES", "Said"]

MAX_BYTES: Final = 1 << 30
"""Four times what a server lets come together, where a round is not more than that by itself."""
MIN_ROUNDS: Final = 4
"""So many contributions are kept whatever they take."""
_MARKED: Final = frozenset({MessageType.WELCOME, MessageType.STATUS, MessageType.CKPT})
"""Their `seq` says what of the server's disk is known: see `Said.told`."""


@dataclass(frozen=True, slots=True)
class _Contribution:
    """What was said under one name: by shard, its codec on the wire and its bytes."""

    target: int
    shards: dict[int, tuple[int, bytes]]

    @property
    def nbytes(self) -> int:
        return sum(len(payload) for _, payload in self.shards.values())


class Said:
    """See the module's docstring.

    Args:
        session: seals what is said again.
        frames: where the open round's payloads are.

    Attributes:
        nbytes: what is kept.
    """

    def __init__(self, session: WorkerSession, frames: PushFrames) -> None:
        self._session = session
        self._frames = frames
        self._since = NONE
        self._kept: dict[int, _Contribution] = {}
        self._asked: dict[tuple[int, int], None] = {}
        self.nbytes = 0

    @property
    def is_needed(self) -> bool:
        """Whether the server may yet ask for something that nobody else has."""
        return bool(self._kept)

    def told(self, mark: int) -> None:
        """What the server says of its disk: 0, keep nothing; else one more than a version.

        The checkpoint of that version is there: what led up to it is not needed any more.
        """
        self._since = mark - 1
        gone = [seq for seq, each in self._kept.items() if not mark or each.target <= self._since]
        for seq in gone:
            self.nbytes -= self._kept.pop(seq).nbytes

    def note(self, ended: Round) -> None:
        """A contribution has its verdict: its buffers will be used again, so copy what they hold.

        Also what does not count: a rule that judged it may want to see it again.
        """
        if self._since == NONE or not ended.pushed or ended.target <= self._since:
            return
        frames = self._frames
        shards = {k: (frames.wire_id(k), frames.said(k).tobytes()) for k in sorted(ended.pushed)}
        before = self._kept.pop(ended.number, None)
        self.nbytes -= 0 if before is None else before.nbytes
        kept = self._kept[ended.number] = _Contribution(ended.target, shards)
        self.nbytes += kept.nbytes
        while self.nbytes > MAX_BYTES and len(self._kept) > MIN_ROUNDS:
            self.nbytes -= self._kept.pop(next(iter(self._kept))).nbytes

    # ---- when the server asks

    def hear(self, header: Header, body: ControlBody | memoryview) -> None:
        """What a message says of the server's disk, or asks for."""
        if header.type in _MARKED:
            self.told(header.seq)
        if header.type is MessageType.WELCOME:
            self._asked.clear()  # who asked before will ask again
        if isinstance(body, Recall):
            self._recall(header.seq, body.shards)

    def _recall(self, seq: int, shards: Iterable[int]) -> None:
        """The server asks for these shards of a contribution; asked twice is asked once."""
        self._asked |= dict.fromkeys((seq, shard) for shard in shards)

    def next(self, current: Round | None) -> bytearray | None:
        """The next frame that the server asked for, in a buffer of its own; None: nothing is due.

        Args:
            current: the open round, whose payloads are in its buffers.
        """
        if not self._asked or not self._session.may_send(MessageType.AGAIN):
            return None
        seq, shard = next(iter(self._asked))
        found = self._find(seq, shard, current)
        if found is None:
            self._asked = {each: None for each in self._asked if each[0] != seq}
            return self._session.send(MessageType.AGAIN, flags=Flags.SKIP, seq=seq)
        del self._asked[seq, shard]
        codec, payload = found
        frame = bytearray(HEADER_BYTES)
        frame += payload
        self._session.seal(frame, MessageType.AGAIN, codec=codec, seq=seq, shard=shard)
        return frame

    def _find(self, seq: int, shard: int, current: Round | None) -> tuple[int, bytes] | None:
        if current is not None and current.number == seq and shard in current.pushed:
            return self._frames.wire_id(shard), self._frames.said(shard).tobytes()
        kept = self._kept.get(seq)
        return None if kept is None else kept.shards.get(shard)

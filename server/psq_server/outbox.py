"""What waits to be sent to whom, so that a slow reader is nobody else's problem.

A frame that libzmq will not take now is queued for its peer alone, in order. Frames are shared, not
copied: a queue costs a reference each. It is bounded in two ways. Control frames beyond
MAX_CONTROL are dropped, because whoever lost them asks again. And weights are kept for one version
only: when the next version's come and the last one's have not left, all of them are dropped, and
the peer must pull.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Protocol

from psq.link import Buffer, Sent

__all__ = ["MAX_CONTROL", "Outbox", "Sender"]

MAX_CONTROL: Final = 64


class Sender(Protocol):
    """The part of a `ServerLink` that is used here."""

    def send(self, peer: bytes, frame: Buffer) -> Sent:
        """Queue one frame for a peer without blocking."""


class _Queue:
    """One peer's frames, each with its version; control frames have none."""

    def __init__(self) -> None:
        self.frames: deque[tuple[int | None, Buffer]] = deque()
        self.control = 0
        self.newest: int | None = None
        self.last: tuple[Buffer, ...] | None = None


class Outbox:
    """Sends now what can be sent now, and the rest when `flush` is called.

    Args:
        link: takes the frames.

    Attributes:
        gone: peers that were found not to exist any more; the owner empties it.
        dropped_frames: how many frames were dropped because a peer was too slow.
    """

    def __init__(self, link: Sender) -> None:
        self._link = link
        self._queues: dict[bytes, _Queue] = {}
        self.gone: list[bytes] = []
        self.dropped_frames = 0

    @property
    def waiting(self) -> bool:
        """Whether anything is queued."""
        return bool(self._queues)

    def send(self, peer: bytes, frame: Buffer) -> None:
        """Send a control frame."""
        queue = self._queues.get(peer)
        if queue is None:
            self._try(peer, None, frame)
        elif queue.control < MAX_CONTROL:
            self._append(queue, None, frame)
        else:
            self.dropped_frames += 1

    def send_weights(self, peer: bytes, version: int, frames: tuple[Buffer, ...]) -> bool:
        """Send the weights of one version; False if older ones were still waiting.

        In that case nothing is sent, and what waited is dropped but for control frames.
        """
        queue = self._queues.get(peer)
        if queue is not None and queue.newest is not None and queue.newest < version:
            self._drop_weights(peer, queue)
            self.dropped_frames += len(frames)
            return False
        if queue is not None and queue.last is frames:
            return True  # they are on their way already: an impatient reader asked twice
        for frame in frames:
            queue = self._queues.get(peer)
            if queue is not None:
                self._append(queue, version, frame)
            elif not self._try(peer, version, frame):
                return True
        queue = self._queues.get(peer)
        if queue is not None:
            queue.last = frames
        return True

    def flush(self) -> None:
        """Send what can be sent."""
        for peer in list(self._queues):
            self._flush_peer(peer)

    def forget(self, peer: bytes) -> None:
        """Drop everything for a peer that does not exist any more."""
        self._queues.pop(peer, None)

    def _flush_peer(self, peer: bytes) -> None:
        queue = self._queues[peer]
        while queue.frames:
            version, frame = queue.frames[0]
            sent = self._link.send(peer, frame)
            if sent is Sent.FULL:
                return
            if sent is Sent.GONE:
                self._lose(peer)
                return
            queue.frames.popleft()
            queue.control -= version is None
        del self._queues[peer]

    def _try(self, peer: bytes, version: int | None, frame: Buffer) -> bool:
        """Send a frame that nothing waits in front of; False if its peer is gone."""
        sent = self._link.send(peer, frame)
        if sent is Sent.FULL:
            queue = self._queues[peer] = _Queue()
            self._append(queue, version, frame)
        elif sent is Sent.GONE:
            self._lose(peer)
            return False
        return True

    @staticmethod
    def _append(queue: _Queue, version: int | None, frame: Buffer) -> None:
        queue.frames.append((version, frame))
        if version is None:
            queue.control += 1
        else:
            queue.newest = version

    def _drop_weights(self, peer: bytes, queue: _Queue) -> None:
        control = [(version, frame) for version, frame in queue.frames if version is None]
        self.dropped_frames += len(queue.frames) - len(control)
        queue.frames = deque(control)
        queue.newest = queue.last = None
        if not control:
            del self._queues[peer]

    def _lose(self, peer: bytes) -> None:
        self._queues.pop(peer, None)
        self.gone.append(peer)

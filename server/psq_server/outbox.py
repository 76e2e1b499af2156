"""What waits to be sent to whom, so that a slow reader is nobody else's problem.

A frame that libzmq will not take now is queued for its peer alone, in order. Frames are shared, not
copied: a queue costs a reference each. Everything is bounded:

- Echoes that have not left yet have MAX_ECHO_BYTES together: anybody may ask for one, and then not
  read it.
- Control frames beyond MAX_CONTROL are dropped, because whoever lost them asks again.
- A round's weights wait for `max_versions` versions at most. When one more comes, all of them are
  dropped, and the peer must pull.
- Whole weights (f32, so 32 times a round's at one bit) are not queued but noted, and made shard by
  shard as the peer takes them: one shard a peer is in memory.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from psq.link import Buffer, Sent

__all__ = ["MAX_CONTROL", "MAX_ECHO_BYTES", "MakeFull", "Outbox", "Sender"]

MAX_CONTROL: Final = 64
MAX_ECHO_BYTES: Final = 64 << 20
"""Of all peers; a frame that is small counts as MIN_ECHO_BYTES, for what holds it."""
MIN_ECHO_BYTES: Final = 4096


class Sender(Protocol):
    """The part of a `ServerLink` that is used here."""

    def send(self, peer: bytes, frame: Buffer, *, lend: bool = False) -> Sent:
        """Queue one frame for a peer without blocking; with `lend` it can be asked for below."""

    def is_lent(self, frame: Buffer) -> bool:
        """Whether a frame that was sent is still being read."""


MakeFull = Callable[[int], tuple[int, tuple[Buffer, ...]]]
"""A shard -> the version it has now, and its frames."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """One frame; `version` and `shard` are of weights, a control frame has none."""

    frame: Buffer
    version: int | None = None
    shard: int = -1


@dataclass(slots=True)
class _Queue:
    """One peer's frames, the shards it is to have whole, and the last of these that was made."""

    frames: deque[_Waiting] = field(default_factory=deque)
    control: int = 0
    whole: dict[int, None] = field(default_factory=dict)
    made: tuple[Buffer, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.frames and not self.whole

    def has(self, frame: Buffer) -> bool:
        return any(waiting.frame is frame for waiting in self.frames)

    def versions(self) -> set[int]:
        return {waiting.version for waiting in self.frames if waiting.version is not None}


class Outbox:
    """Sends now what can be sent now, and the rest when `flush` is called.

    Args:
        link: takes the frames.
        make_full: makes a shard's whole weights.

    Attributes:
        gone: peers that were found not to exist any more; the owner empties it.
        dropped_frames: how many frames were dropped because a peer was too slow.
        max_versions: of how many versions weights may wait for one peer.
        is_paused: whether no whole shard may be made now: what there is now may be taken back.
    """

    def __init__(self, link: Sender, make_full: MakeFull) -> None:
        self._link = link
        self._make_full = make_full
        self._queues: dict[bytes, _Queue] = {}
        self._held: Counter[int] = Counter()
        self._echoes: list[Buffer] = []  # that had not left when we last looked
        self.gone: list[bytes] = []
        self.dropped_frames = 0
        self.max_versions = 2
        self.is_paused: Callable[[], bool] = lambda: False

    @property
    def waiting(self) -> bool:
        """Whether anything is queued."""
        return bool(self._queues)

    @property
    def waiting_weights(self) -> bool:
        """Whether some of that is weights."""
        return any(queue.whole or queue.versions() for queue in self._queues.values())

    def holds(self, frame: Buffer) -> bool:
        """Whether this very buffer waits for anybody: then it must not be written to."""
        return id(frame) in self._held

    def send(self, peer: bytes, frame: Buffer) -> None:
        """Send a control frame."""
        queue = self._queues.get(peer)
        if queue is None:
            self._try(peer, _Waiting(frame))
        elif queue.control < MAX_CONTROL:
            self._append(queue, _Waiting(frame))
        else:
            self.dropped_frames += 1

    def send_if_idle(self, peer: bytes, frame: Buffer) -> None:
        """Send a frame that nobody needs, unless something waits for this peer, or too many do."""
        if peer in self._queues or not self._has_room_for_echoes():
            self.dropped_frames += 1
            return
        sent = self._link.send(peer, frame, lend=True)
        self.dropped_frames += sent is Sent.FULL
        if sent is Sent.QUEUED:
            self._echoes.append(frame)
        if sent is Sent.GONE:
            self.gone.append(peer)

    def send_weights(self, peer: bytes, version: int, frames: Sequence[tuple[int, Buffer]]) -> bool:
        """Send weights of one version, (shard, frame) each; False if too much was waiting.

        In that case nothing is sent, and what waited is dropped but for control frames. What the
        peer is to have whole anyway is not sent now.
        """
        queue = self._queues.get(peer)
        if queue is not None and self._is_behind(queue, version):
            whole = bool(queue.whole)
            self._drop_weights(peer, queue)
            if not whole:
                self.dropped_frames += len(frames)
                return False
        for shard, frame in frames:
            waiting = _Waiting(frame, version, shard)
            queue = self._queues.get(peer)
            if queue is None:
                if not self._try(peer, waiting):
                    return True
            elif shard not in queue.whole and not queue.has(frame):
                self._append(queue, waiting)
        return True

    def send_full(self, peer: bytes, shards: Iterable[int]) -> None:
        """Send these shards whole, each as it is when its turn comes."""
        queue = self._queues.setdefault(peer, _Queue())
        queue.whole.update(dict.fromkeys(shards))
        self._flush_peer(peer)

    def flush(self) -> None:
        """Send what can be sent."""
        for peer in list(self._queues):
            self._flush_peer(peer)

    def forget(self, peer: bytes) -> None:
        """Drop everything for a peer that does not exist any more."""
        queue = self._queues.pop(peer, None)
        for waiting in queue.frames if queue is not None else ():
            self._release(waiting)

    def _has_room_for_echoes(self) -> bool:
        self._echoes = [frame for frame in self._echoes if self._link.is_lent(frame)]
        return sum(max(len(f), MIN_ECHO_BYTES) for f in self._echoes) < MAX_ECHO_BYTES

    def _is_behind(self, queue: _Queue, version: int) -> bool:
        versions = queue.versions()
        return len(versions) >= self.max_versions and version > max(versions)

    def _flush_peer(self, peer: bytes) -> None:
        queue = self._queues[peer]
        while not queue.is_empty:
            self._make_next(queue)
            if not queue.frames:
                return
            waiting = queue.frames[0]
            sent = self._link.send(peer, waiting.frame)
            if sent is Sent.FULL:
                return
            if sent is Sent.GONE:
                self._lose(peer)
                return
            queue.frames.popleft()
            self._release(waiting)
            queue.control -= waiting.version is None
        del self._queues[peer]

    def _make_next(self, queue: _Queue) -> None:
        """Queue the next shard that is to be sent whole, once the one before has left.

        Behind what waits already, and not when nothing does: a peer that is slow and asks again has
        something waiting for ever, and would never get what it asks for.
        """
        if not queue.whole or self.is_paused():
            return
        if any(queue.has(frame) or self._link.is_lent(frame) for frame in queue.made):
            return
        shard = next(iter(queue.whole))
        del queue.whole[shard]
        version, queue.made = self._make_full(shard)
        for frame in queue.made:
            self._append(queue, _Waiting(frame, version, shard))

    def _try(self, peer: bytes, waiting: _Waiting) -> bool:
        """Send a frame that nothing waits in front of; False if its peer is gone."""
        sent = self._link.send(peer, waiting.frame)
        if sent is Sent.FULL:
            queue = self._queues[peer] = _Queue()
            self._append(queue, waiting)
        elif sent is Sent.GONE:
            self._lose(peer)
            return False
        return True

    def _append(self, queue: _Queue, waiting: _Waiting) -> None:
        queue.frames.append(waiting)
        queue.control += waiting.version is None
        self._held[id(waiting.frame)] += 1

    def _release(self, waiting: _Waiting) -> None:
        key = id(waiting.frame)
        self._held[key] -= 1
        if not self._held[key]:
            del self._held[key]

    def _drop_weights(self, peer: bytes, queue: _Queue) -> None:
        """Drop the weights that wait; whoever is to have some whole gets these whole too."""
        weights = [waiting for waiting in queue.frames if waiting.version is not None]
        for waiting in weights:
            self._release(waiting)
            if queue.whole:
                queue.whole[waiting.shard] = None
        self.dropped_frames += len(weights)
        queue.frames = deque(waiting for waiting in queue.frames if waiting.version is None)
        if queue.is_empty:
            del self._queues[peer]

    def _lose(self, peer: bytes) -> None:
        self.forget(peer)
        self.gone.append(peer)

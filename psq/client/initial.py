"""The first weights on their way to a server: a few frames at a time, never the whole model.

Frames are made when there is room for them: the link may still be reading `INITIAL_WINDOW` of them,
4 MiB. Pure: time and link are arguments.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from psq.client.frames import Frame
from psq.layout import PART_NUMEL, part_count
from psq.plan import Plan
from psq_proto.messages import MessageType
from psq_proto.session import WorkerSession

__all__ = ["INITIAL_WINDOW", "InitialWeights"]

INITIAL_WINDOW: Final = 4
"""Frames of initial weights that the link may still be reading."""
INITIAL_PAUSE_S: Final = 0.002
"""Until the link is asked again whether it has read the oldest of them."""


class InitialWeights:
    """What is still to be sent of them.

    Args:
        plan: the job, as that server sees it.
        session: seals the frames.
        values: the f32 values of a shard.
        is_lent: whether the link still reads a frame.
    """

    def __init__(
        self,
        plan: Plan,
        session: WorkerSession,
        values: Callable[[int], NDArray[np.float32]],
        is_lent: Callable[[Frame], bool],
    ) -> None:
        self._plan = plan
        self._session = session
        self._values = values
        self._is_lent = is_lent
        self._frames: Iterator[bytearray] | None = None
        self._sent: deque[bytearray] = deque()
        self._at_s = 0.0

    @property
    def due_s(self) -> float:
        """When to look again; never, where nothing is to be sent."""
        return math.inf if self._frames is None else self._at_s

    @property
    def over(self) -> bool:
        """Whether nothing is to be sent, and nothing is being read."""
        return self._frames is None

    def start(self, *, wanted: bool) -> None:
        """Send all of them from now on, or nothing any more."""
        self._frames = self._make() if wanted else None
        self._sent.clear()

    def next(self, now_s: float) -> bytearray | None:
        """The next frame, as soon as the link has read enough of those before."""
        assert self._frames is not None  # noqa: S101 - the caller looked whether it is over
        while self._sent and not self._is_lent(self._sent[0]):
            self._sent.popleft()
        if len(self._sent) < INITIAL_WINDOW:
            frame = next(self._frames, None)
            if frame is not None:
                self._sent.append(frame)
                return frame
            if not self._sent:
                self._frames = None
                return None
        self._at_s = now_s + INITIAL_PAUSE_S
        return None

    def _make(self) -> Iterator[bytearray]:
        """INIT frames of every shard, made one at a time."""
        for shard in self._plan.owned:
            values = self._values(shard.index)
            for part in range(part_count(shard.numel)):
                body = values[part * PART_NUMEL : (part + 1) * PART_NUMEL].data.cast("B")
                yield self._session.send(MessageType.INIT, body, shard=shard.index, part=part)

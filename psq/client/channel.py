"""One server of a job: its machine, its link, and what came while nobody looked.

Who calls holds the client's lock. Nothing here waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from psq.client.machine import Machine
from psq.errors import PsqError
from psq.link import DRAIN_LIMIT, WorkerLink
from psq_proto.messages import MessageType

__all__ = ["Channel"]

INBOX_FRAMES: Final = 256
_TYPE_OFFSET: Final = 5


class Channel:
    """See the module's docstring.

    Args:
        machine: what decides.
        link: where its frames go.
        name: the server in words, to put before errors; empty where it is the only one.
        shards: how many the server owns.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        machine: Machine,
        link: WorkerLink,
        name: str,
        shards: int,
        clock: Callable[[], float],
    ) -> None:
        self.machine = machine
        self.link = link
        self.name = name
        self.blocked = False
        self._clock = clock
        self._inbox: deque[memoryview] = deque()
        self._inbox_frames = max(INBOX_FRAMES, machine.turns.held_versions * shards)

    def flush(self) -> None:
        """Send until nothing is due or the link has no room (`blocked`)."""
        machine, link = self.machine, self.link
        now_s = self._clock()
        self.blocked = False
        while (frame := machine.next_frame(now_s)) is not None:
            if not link.send(frame):
                machine.not_sent(now_s)
                self.blocked = True
                return
            machine.sent(now_s)

    def put_aside(self) -> None:
        """Take what has come off the link, to be looked at later.

        At most `INBOX_FRAMES`, or `held_versions` of the weights where that is more; the rest stays
        in libzmq's queue, and what that does not hold the server drops: it is pulled later.
        """
        for frame in self.link.drain(self._inbox_frames - len(self._inbox)):
            if len(frame) > _TYPE_OFFSET and frame[_TYPE_OFFSET] == MessageType.STATUS:
                self.machine.answered_unseen()
            else:
                self._inbox.append(frame)

    def take_aside(self) -> None:
        """Look at what was put aside, and at weights whose turn may have come."""
        for header, body in self.machine.turns.take():
            self.machine.take_weights(header, body)
        while self._inbox:
            self._take(self._inbox.popleft())

    def take_in(self) -> None:
        """Look at what was put aside, then at what has come since."""
        self.take_aside()
        for frame in self.link.drain(DRAIN_LIMIT):
            self._take(frame)

    def take_answers(self) -> None:
        """Look at all but weights: those wait, as what is put aside does, for the step's end.

        What does not fit is dropped, and asked for again when it is missed.
        """
        waiting, self._inbox = self._inbox, deque()
        for frame in (*waiting, *self.link.drain(DRAIN_LIMIT)):
            if len(frame) <= _TYPE_OFFSET or frame[_TYPE_OFFSET] != MessageType.WEIGHTS:
                self._take(frame)
            elif len(self._inbox) < self._inbox_frames:
                self._inbox.append(frame)

    def _take(self, frame: memoryview) -> None:
        try:
            self.machine.receive(frame, self._clock())
        except PsqError as error:
            if self.name:
                error.args = (f"{self.name}: {error}", *error.args[1:])
            raise

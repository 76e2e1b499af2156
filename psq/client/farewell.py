"""The end of a worker's part: it says LEAVE, and goes when the server has taken note, or is gone.

Pure: the time is an argument.
"""

from __future__ import annotations

import math
from typing import Final

from psq_proto.messages import Leave

__all__ = ["ALONE_S", "FAREWELL_BEAT_S", "NEEDED_S", "Farewell"]

FAREWELL_BEAT_S: Final = 0.1
"""Between two heartbeats of a worker that has said goodbye: their answer lets it go."""
ALONE_S: Final = 0.5
"""Without a connection for so long after its goodbye, a worker takes it that the server ended: one
that is still there would have been found again."""
NEEDED_S: Final = 30.0
"""But so long, if it has what a server that comes back would ask for (see `psq.client.said`)."""


class Farewell:
    """See the module's docstring.

    Attributes:
        leave: what is to be said, if the worker wants to go.
        left: nobody holds it any more.
        is_said: it was said, once at least.
    """

    def __init__(self) -> None:
        self.leave: Leave | None = None
        self.left = self.is_said = False
        self._fence = 0
        self._alone_since_s = math.inf
        self._alone_s = ALONE_S

    @property
    def due_s(self) -> float:
        """When a worker that nobody hears may go; never, while somebody does."""
        return self._alone_since_s + self._alone_s

    def said(self, beats: int) -> None:
        """LEAVE is on its way, after so many heartbeats."""
        self.is_said = True
        self._fence = beats

    def answered(self, answers: int) -> None:
        """So many heartbeats are answered: one that was sent after it says that it arrived."""
        self.left = answers > self._fence

    def heard(self) -> None:
        """The link has taken something."""
        self._alone_since_s = math.inf

    def unheard(self, now_s: float, *, is_needed: bool = False) -> None:
        """It has not, although the goodbye is said."""
        self._alone_s = NEEDED_S if is_needed else ALONE_S
        self._alone_since_s = min(self._alone_since_s, now_s)
        self.left = self.left or now_s >= self.due_s

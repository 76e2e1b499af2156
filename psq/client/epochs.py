"""What a worker may still believe when its server comes back: what was committed, and only that.

A server that keeps its state goes on, in a new epoch, from the last version that was durable. What
it had sent of a later one (single shards of a round that was under way) never happened: the round
is made again, perhaps with other members. So the worker forgets these shards and gets them whole.

What the server had called committed cannot have gone. If the server is behind that, it came back
with an older state than this worker's (an old copy of its directory, or checkpoints without a
journal), and to train on would silently repeat rounds: that is a rollback, and the worker stops.
"""

from __future__ import annotations

from psq.errors import RemoteProtocolError
from psq_proto.messages import NONE

__all__ = ["Epochs"]


class Epochs:
    """The epochs and versions of one server, as far as a worker has heard of them."""

    def __init__(self) -> None:
        self._epoch = NONE
        self._committed = NONE

    def heard(self, version: int) -> None:
        """The server says that this version is committed."""
        self._committed = max(self._committed, version)

    def enter(self, epoch: int, version: int) -> bool:
        """The server welcomes this worker at a version; whether in an epoch that is new to it.

        Raises:
            RemoteProtocolError: it is behind what it has called committed before.
        """
        if version < self._committed:
            msg = (
                f"ROLLBACK: the server is at round {version}, and had told this worker of round "
                f"{self._committed}: it came back with an older state; put its newest --state-dir "
                "back, or start workers and servers again from a checkpoint that they share"
            )
            raise RemoteProtocolError(msg)
        is_new = self._epoch not in (NONE, epoch)
        self._epoch = epoch
        self.heard(version)
        return is_new

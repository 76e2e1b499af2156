"""What a worker may still believe when its server comes back: what was committed, and only that.

A server that keeps its state goes on, in a new epoch, from the last version that was durable. What
it had sent of a later one (single shards of a round that was under way) never happened: the round
is made again, perhaps with other members. So the worker forgets these shards and gets them whole:
all that are newer than what it knew to be committed, for by the time it joins again the server may
have committed other bytes under the same number. (Where rounds close as wholes, what came was
committed.)

What the server had called committed cannot have gone. If the server is behind that, it came back
with an older state than this worker's (an old copy of its directory, or checkpoints without a
journal), and to train on would silently repeat rounds: that is a rollback, and the worker stops. It
may have made rounds anew since, and be further than this worker; so it says at JOIN which version
is the newest that is what it was.
"""

from __future__ import annotations

from psq.clock import parse_consistency
from psq.errors import RemoteProtocolError
from psq.plan import Plan
from psq_proto.messages import NONE, Status

__all__ = ["Epochs", "check_not_behind", "comes_early"]


def comes_early(plan: Plan) -> bool:
    """Whether shards of this job leave a server before their round is committed."""
    if plan.recipe.whole or plan.recipe.downlink.kind == "mean":
        return False
    return parse_consistency(plan.consistency).eager


def check_not_behind(status: Status, number: int) -> None:
    """A server that knows all that was said of a round has that round open, or behind it.

    Raises:
        RemoteProtocolError: this one has not.
    """
    if status.round < number or status.resolved > number:
        msg = (
            f"ROLLBACK: the server is at round {status.round} and has resolved "
            f"{status.resolved} of this rank, this worker is at round {number}: "
            "the server came back with an older state; start the job again"
        )
        raise RemoteProtocolError(msg)


class Epochs:
    """The epochs and versions of one server, as far as a worker has heard of them.

    Args:
        early: whether shards come before their round is committed.

    Attributes:
        sure: in a new epoch, the version above which nothing that this worker has is for certain
            the server's.
    """

    def __init__(self, *, early: bool = False) -> None:
        self._early = early
        self._epoch = NONE
        self._committed = NONE
        self.sure = NONE

    @property
    def epoch(self) -> int:
        """In which the server welcomed this worker last; NONE: in none."""
        return self._epoch

    def heard(self, version: int) -> None:
        """The server says that this version is committed."""
        self._committed = max(self._committed, version)

    def begin(self, epoch: int, version: int) -> None:
        """A process begins in this epoch, with what an earlier one had of the server's version.

        The server may have said more since it welcomed this process.
        """
        self._epoch = epoch
        self.heard(version)

    def enter(
        self, epoch: int, version: int, since: int = NONE, *, has_nothing: bool = False
    ) -> bool:
        """The server welcomes this worker at a version; whether in an epoch that is new to it.

        Args:
            epoch: the server's.
            version: the server's.
            since: up to which one it is what this worker knew; NONE: up to any.
            has_nothing: neither weights, nor a word about what this worker said: then it is all the
                same to it how far the server was before.

        Raises:
            RemoteProtocolError: it is behind what it has called committed before.
        """
        if has_nothing:
            self._committed = NONE
        left = version if since == NONE else min(since, version)
        if left < self._committed:
            anew = f" (made anew from round {left} on)" if left < version else ""
            msg = (
                f"ROLLBACK: the server is at round {version}{anew}, and had told this worker of "
                f"round {self._committed}: it came back with an older state; put its newest "
                "--state-dir back, or start workers and servers again from a checkpoint that they "
                "share"
            )
            raise RemoteProtocolError(msg)
        is_new = self._epoch not in (NONE, epoch)
        self.sure = self._committed if self._early else left
        self._epoch = epoch
        self.heard(version)
        return is_new

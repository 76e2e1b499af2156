"""Weights in their turn, where ranks compute the same and one may be behind the others.

A replica has to compute every version, one after another, as its twin did: so it takes no weights
before all of its round is said, and then only up to the version that ends that round. What comes
earlier is kept here, up to `held_versions` of them; what does not fit is lost, so that the worker
asks for the whole weights and jumps, and the server knows it as cold. Pure bookkeeping.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from psq.client.round import Round
from psq.plan import Plan
from psq.rules.coded import MAX_LAG
from psq_proto.frames import Header
from psq_proto.messages import NONE

__all__ = ["HELD_VERSIONS", "Turns"]

HELD_VERSIONS: Final = 4
"""Of how many versions weights may lie unread, where a server may run ahead of this worker."""


class Turns:
    """See the module's docstring.

    Args:
        plan: the job, as a server sees it.

    Attributes:
        in_order: whether it matters at all.
        jumps: weights were asked for because some were lost: the next ones may be any.
    """

    def __init__(self, plan: Plan) -> None:
        self.in_order: Final = plan.replicas > 1
        self.jumps = False
        self._shards = len(plan.owned)
        self._later: deque[tuple[Header, memoryview]] = deque()

    @property
    def held_versions(self) -> int:
        """Of how many versions weights may wait."""
        return MAX_LAG + 2 if self.in_order else HELD_VERSIONS

    def keeps(self, header: Header, body: memoryview, version: int, current: Round | None) -> bool:
        """Whether these weights have to wait; then they do.

        Args:
            header: theirs.
            body: theirs.
            version: what the replica has.
            current: the round that is open, if one is.
        """
        if not self.in_order or version == NONE:
            return False
        if current is None or not current.unsaid():
            limit = version if current is None else current.target
            if header.version <= limit or self.jumps:
                return False
        if len(self._later) < self.held_versions * self._shards:
            self._later.append((header, body))
        return True

    def take(self) -> deque[tuple[Header, memoryview]]:
        """All that waits, to be looked at again."""
        held, self._later = self._later, deque()
        return held

    def forget_above(self, version: int) -> None:
        """Of what waits, let go what is of a later version."""
        self._later = deque(each for each in self._later if each[0].version <= version)

    def is_over(self, number: int, open_number: int) -> bool:
        """Whether a round is so old that the server has nothing to compare it with."""
        return open_number - number > MAX_LAG

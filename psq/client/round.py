"""One contribution on its way: what was sent, what the server said about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Round", "RoundResult"]


@dataclass(frozen=True, slots=True)
class RoundResult:
    """How a round ended for this worker.

    Attributes:
        applied: the server counted what this worker said (a skip it asked for is something said).
        reason: why not, in the server's words; empty when applied.
        version: the version of the weights after the round.
        server_s: what the server's own work took; 0 where a broken connection lost the answer.
        rejected: the shards that were pushed and did not count, ascending; what they said is back
            in the residual.
    """

    applied: bool
    reason: str
    version: int
    server_s: float
    rejected: tuple[int, ...] = ()


@dataclass(slots=True)
class Round:
    """The state of one round; its `seq` is `number` too, while rounds are synchronous.

    Attributes:
        number: it turns version `number` of the weights into `number` + 1.
        rate: the learning rate this worker asks for.
        pushed: the shards handed over so far.
        skipped: this worker contributes nothing.
        outcome: the verdict, once it is known.
        refusal: why what was pushed first was rejected; the round goes on with a skip.
        server_s, rejected: see `RoundResult`.
        old_answers: answers still to come to heartbeats that were sent before the last push: what
            such an answer calls missing may have arrived since.
    """

    number: int
    rate: float
    pushed: set[int] = field(default_factory=set)
    skipped: bool = False
    outcome: Literal["applied"] | None = None
    refusal: str = ""
    server_s: float = 0.0
    rejected: tuple[int, ...] = ()
    old_answers: int = 0

    def lost(self, missing: tuple[int, ...]) -> list[int]:
        """The shards that were pushed and did not arrive, given the server's missing ones."""
        return [shard for shard in missing if shard in self.pushed]

    def result(self, version: int) -> RoundResult:
        """How it ended, once it has."""
        return RoundResult(not self.refusal, self.refusal, version, self.server_s, self.rejected)

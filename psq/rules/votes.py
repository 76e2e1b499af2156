"""Majority vote: each value goes where most workers point, whatever sizes they claim.

    aggregate_j = +1 if as many workers say + as say - (weights counted), or more; else -1

After signSGD with majority vote, and Stochastic-Sign (2002.10940). Votes are counted on the packed
bits of sign payloads (`psq.rules.packed`); no payload is decoded, and scales are not looked at: who
sends a large one, or a negative one, has one vote like everybody. A value of which a worker has
nothing to say is a vote too: 0 is said as +, so give no gradient of exact zeros to this rule.

Up to (W - 1) // 2 hostile workers cannot turn a value on which all honest ones agree; where honest
workers are split, few are enough. Weights are whole numbers and count as that many votes: a rule
that believes them is no defence against a worker that lies about its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from psq.errors import UsageError
from psq.kernels import Floats
from psq.rules.base import AggregateRule, Said
from psq.rules.packed import SignPlanes, Votes, write_signs

__all__ = ["Majority"]


class Majority(AggregateRule):
    """Writes +1 or -1: the sign that most votes have; a tie is +1."""

    def combine(self, shard: int, said: Sequence[Said], out: Floats) -> None:
        """Count votes and write the signs, f32[shard.numel].

        Raises:
            ConfigError: a payload is not in a sign codec.
            UsageError: a weight is no whole number, or all are 0.

        Cost: for each vote its bytes and 5 bitwise operations on numel / 64 words; one decode.
        """
        votes, total = Votes(), 0
        for one in said:
            weight = _votes_of(one)
            if weight:
                votes.add(SignPlanes(one.codec).plane(one.payload), weight)
                total += weight
        if not total:
            msg = f"nobody voted on shard {shard}: a weight must be 1 or more"
            raise UsageError(msg)
        write_signs(votes.over(total // 2), self.cut(shard), out)


def _votes_of(one: Said) -> int:
    weight = int(one.weight)
    if weight != one.weight or weight < 0:
        msg = f"rank {one.rank} has {one.weight!r} votes: a weight is a whole number here"
        raise UsageError(msg)
    return weight

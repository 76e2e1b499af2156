"""What a compressor knows of a shard beside its vectors: counters, and how its last word was made.

With the vectors of `Compressor.state_arrays` it is the whole state of the shard, so that another
process can go on from there.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ShardCounts"]


@dataclass(frozen=True, slots=True)
class ShardCounts:
    """One shard's.

    Attributes:
        steps: taken; the random numbers of the next payload follow from it.
        moments: steps of this worker's own Adam; more than `steps` with local steps.
        rule: steps of the direction's rule.
        codec: the number of the codec of the last payload.
        has_residual: the residual holds what that payload does not say.
        told: the direction has been told what it says.
    """

    steps: int = 0
    moments: int = 0
    rule: int = 0
    codec: int = 0
    has_residual: bool = False
    told: bool = False

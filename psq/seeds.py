"""Where the random numbers of a job begin: one 64-bit seed for each use of chance.

A job's seed, a rank, a step and a shard name one stream; a further word tells different uses apart
that meet in the same place. Whoever knows the job's seed can replay all of it, which is what it is
for; noise that has to stay secret does not come from here.
"""

from __future__ import annotations

from typing import Final

__all__ = ["SERVER_RANK", "stream_seed"]

SERVER_RANK: Final = 0xFFFFFFFF  # the server's place in `stream_seed`: no worker has it
_MASK: Final = 0xFFFFFFFFFFFFFFFF


def stream_seed(job_seed: int, rank: int, step: int, shard: int, *more: int) -> int:
    """The 64-bit seed of the random stream of one payload, or of another use that `more` names.

    The numbers are absorbed one after another by splitmix64's finalizer; the last state is the
    seed. A restarted worker that repeats a step therefore makes the same payload.
    """
    state = 0
    for word in (job_seed, rank, step, shard, *more):
        state = ((state ^ word) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state

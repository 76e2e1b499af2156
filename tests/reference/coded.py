"""coded: server-adam over groups of workers that compute the same, each group heard once.

To the arithmetic a group is one worker (1612.03301, by repetition): `workers` counts groups.
"""

from reference.server_adam import train

__all__ = ["train"]

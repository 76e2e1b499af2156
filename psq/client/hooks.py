"""What a client asks of whoever owns the numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psq_proto.frames import Header

__all__ = ["Hooks"]


def _ignore(header: Header, body: memoryview) -> None:
    """The replica has these weights."""


def _let_pass(server: int, version: int) -> None:
    """Nobody keeps copies."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """Called inside `Client.join`, `Client.poll` and `Client.finish` only.

    Attributes:
        initial: the f32 values of a shard, for a server's first weights (asked of rank 0 only).
        weights: put a WEIGHTS frame's body into the replica.
        restore: the server did not take this shard: fold what was said back into the residual.
        reset: the residuals of these shards have a history that is not their server's: forget them.
        whole: whole weights came that the replica has: they are for somebody else, if anybody.
        checkpoint: this server makes this version a checkpoint: what goes with it is kept too.
        planes: how many vectors full weights are: the weights, and the state that replicas share.
    """

    initial: Callable[[int], NDArray[np.float32]]
    weights: Callable[[Header, memoryview], None]
    restore: Callable[[int], None]
    reset: Callable[[Sequence[int]], None]
    planes: int = 1
    whole: Callable[[Header, memoryview], None] = _ignore
    checkpoint: Callable[[int, int], None] = _let_pass

"""What one process of a worker leaves to the next: who it was, and what it had said.

An identity is offered at JOIN and taken up only if the answer shows that it fits: the residual that
goes with it is worth something at its own place in the job and nowhere else. Of a contribution that
was under way it holds the payloads, since what is said again must be the same bytes. Plain values:
no I/O, no arrays but those payloads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from psq_proto.messages import NONE, Welcome

__all__ = ["Attempt", "Identity", "Kept", "Pending", "Welcomed"]


@dataclass(frozen=True, slots=True)
class Kept:
    """A shard as it was said.

    Attributes:
        payload: u8, the codec's bytes.
        codec: the number of the plan's codec for this shard.
        weight: how much it counts, where that is not the round's.
    """

    payload: NDArray[np.uint8]
    codec: int = 0
    weight: int | None = None


@dataclass(frozen=True, slots=True)
class Pending:
    """A contribution of which something was said, and no verdict is known for sure.

    Attributes:
        number: its name: the version it was computed from.
        rate: the learning rate it names.
        weight: how much it counts in a mean.
        pushed: what was said of each shard.
        skipped: the shards of which nothing was said, and that was said.
        silent: one message said so of all shards.
    """

    number: int
    rate: float
    weight: int = 1
    pushed: Mapping[int, Kept] = field(default_factory=dict)
    skipped: frozenset[int] = frozenset()
    silent: bool = False


@dataclass(frozen=True, slots=True)
class Identity:
    """A worker as one server knows it.

    Attributes:
        run_id: of the server's run.
        lineage: the name of the residual's history.
        resolved: the last seq whose verdict is in the residual.
        version: of the weights that it computes from.
        versions: the version of each shard of the replica that goes with it; none: to be pulled.
        pending: the contribution under way.
        epoch: of the server, in which it was welcomed last.
    """

    run_id: bytes
    lineage: int
    resolved: int = NONE
    version: int = NONE
    versions: Mapping[int, int] = field(default_factory=dict)
    pending: Pending | None = None
    epoch: int = NONE

    @property
    def pending_number(self) -> int:
        """What JOIN says of the contribution under way."""
        return NONE if self.pending is None else self.pending.number


@dataclass(frozen=True, slots=True)
class Welcomed:
    """How a server took an identity.

    Attributes:
        run_id: of its run.
        version: what it has committed.
        welcome: what it said.
    """

    run_id: bytes
    version: int
    welcome: Welcome

    def misfit(self, identity: Identity) -> str:
        """Why the worker cannot go on as this identity, in words; empty if it can."""
        if self.run_id != identity.run_id:
            return f"it belongs to run {identity.run_id.hex()}, the server to {self.run_id.hex()}"
        if self.welcome.mode == "reset":
            return (
                f"it has resolved {identity.resolved} of lineage {identity.lineage:016x}, the "
                "server knows a later contribution of this rank, or another lineage"
            )
        if self.version < identity.version:
            return f"it is at version {identity.version}, the server at {self.version}"
        if NONE < self.welcome.since < identity.version:
            return (
                f"it is at version {identity.version}, and the server, which is at {self.version}, "
                f"has made anew what came after version {self.welcome.since}"
            )
        return ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """Something that a worker may go on from.

    Attributes:
        name: what it is, in words.
        identities: who it is to each server, in the job's order.
        load: puts the numbers that go with them in their places; called once, if it fits.
    """

    name: str
    identities: Sequence[Identity]
    load: Callable[[], None]

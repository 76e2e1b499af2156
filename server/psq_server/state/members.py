"""Ranks and connections: who is who, since when, and how far each one came.

A connection (a peer) is a conversation; a rank is a place in the job. A JOIN puts a peer in a
rank's place, with an incarnation that is larger than every earlier one, and from then on no other
peer speaks for that rank. What a rank has achieved (its lineage, the last of its contributions that
counted) belongs to the rank and outlives its connections.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from psq.keys import Authorized
from psq_proto.messages import NONE, Join, Leave, Verdict
from psq_proto.session import ServerSession

__all__ = [
    "MAX_STRANGERS",
    "NO_LINEAGE",
    "STANDINGS",
    "TRANSIENT",
    "Member",
    "Peer",
    "Peers",
    "Resolved",
    "may_continue",
    "standing",
]

MAX_STRANGERS: Final = 256
"""Connections that speak for no rank; the oldest is forgotten for a new one."""
NO_LINEAGE: Final = -1
"""Of a rank whose residual nobody can know any more: whoever joins next starts a new one."""
TRANSIENT: Final = frozenset(
    {
        *("incarnation", "seen_s", "peer", "synced", "pulling", "noted_silent", "cut_s", "held"),
        "process",
    }
)
"""Of a member what ends with the server's process: connections, times, what waits for either."""
STANDINGS: Final = ("joined", "silent", "left", "lost", "absent")


@dataclass(slots=True)
class Peer:
    """One connection, and whose key it has, where there are keys."""

    name: bytes
    session: ServerSession
    seen_s: float
    key: Authorized | None = None
    complaints: int = 0
    wants_job: bool = False


@dataclass(frozen=True, slots=True)
class Resolved:
    """A rank's last verdict: of which contribution, and after which version."""

    seq: int
    verdict: Verdict
    version: int


@dataclass(slots=True)
class Member:
    """One rank, from its first JOIN on.

    Attributes:
        peer: the connection that speaks for it; None while there is none.
        lineage: of its residual; of one that begins at the server's wish, a number that follows
            from its conversation.
        last_applied: the seq of its last contribution that counted, or NONE.
        resolved: the last verdict it was given, to be given again if it was lost.
        base: what it computes from is at least this version: the one after its last verdict, or the
            one it was given whole.
        took_s: how long its last contribution took, from the weights it was computed from.
        synced: it has been sent weights, so it can follow broadcasts.
        pulling: it asked for weights before there were any.
        left: its LEAVE, until it joins again.
        noted_silent: its silence has been logged.
        cut_s: when its connection ended, or was last heard to live on as another one that has not
            joined yet; None while there is one, and after this server's start.
        evicted: rounds go on without it, see `elastic`.
        since: the first round that needs it.
        kept: the newest checkpoint that it has a copy of its own for, or NONE.
        held: it waits for another server of the job, and can say nothing to this one before.
        process: who speaks for it, as host and pid; None: unknown since this server's start.
    """

    rank: int
    incarnation: int
    seen_s: float
    peer: bytes | None
    lineage: int
    last_applied: int = NONE
    resolved: Resolved | None = None
    base: int = 0
    took_s: float = 0.0
    synced: bool = False
    pulling: bool = False
    left: Leave | None = None
    noted_silent: bool = False
    cut_s: float | None = None
    evicted: bool = False
    since: int = 0
    kept: int = NONE
    held: bool = False
    process: tuple[str, int] | None = None

    def cut(self, now_s: float) -> None:
        """Nobody speaks for this rank any more, until it joins again."""
        self.peer, self.synced, self.pulling, self.cut_s = None, False, False, now_s
        self.held = False

    @property
    def finished(self) -> bool:
        """Whether it left with its work done."""
        return self.left is not None and self.left.reason == "done"

    @property
    def gone(self) -> bool:
        """Whether it left, for whatever reason."""
        return self.left is not None


def standing(member: Member | None, now_s: float, lease_s: float) -> str:
    """One of STANDINGS: absent (never came), left (done), lost (otherwise, or given up), ..."""
    if member is None:
        return "absent"
    if member.left is not None:
        return "left" if member.finished else "lost"
    if member.evicted:
        return "lost"
    if member.peer is None or now_s - member.seen_s > lease_s:
        return "silent"
    return "joined"


def may_continue(member: Member | None, join: Join) -> bool:
    """Whether a joiner's residual is the one that goes with what this rank has contributed so far.

    It is if the joiner claims no history at all, or if it is of the same lineage and knows at least
    of the last contribution that counted: as resolved, or as pending. A residual from before that
    would be wrong, and a wrong one is worse than none.
    """
    known = max(join.last_resolved, join.pending)
    if known == NONE:
        return member is None or member.last_applied == NONE or member.lineage != join.lineage
    return member is not None and member.lineage == join.lineage and known >= member.last_applied


class Peers:
    """All connections: at most one joined per rank, and a bounded number of strangers."""

    def __init__(self) -> None:
        self._joined: dict[bytes, Peer] = {}
        self._strangers: dict[bytes, Peer] = {}

    def get(self, name: bytes) -> Peer | None:
        """The peer of this name, if it is known."""
        return self._joined.get(name) or self._strangers.get(name)

    def add_stranger(self, peer: Peer) -> Peer | None:
        """Take in a connection that has not joined; returns the one that was forgotten for it."""
        evicted = None
        if len(self._strangers) >= MAX_STRANGERS:
            evicted = self._strangers.pop(next(iter(self._strangers)))
        self._strangers[peer.name] = peer
        return evicted

    def promote(self, peer: Peer) -> None:
        """A stranger has joined."""
        self._strangers.pop(peer.name, None)
        self._joined[peer.name] = peer

    def demote(self, peer: Peer) -> None:
        """A joined peer speaks for nobody any more."""
        if self._joined.pop(peer.name, None) is not None:
            self.add_stranger(peer)

    def forget(self, name: bytes) -> None:
        """The connection does not exist any more."""
        self._joined.pop(name, None)
        self._strangers.pop(name, None)

    def forget_silent(self, before_s: float) -> None:
        """Forget strangers last heard before this moment."""
        for name in [name for name, peer in self._strangers.items() if peer.seen_s < before_s]:
            del self._strangers[name]

    def joined(self) -> Iterator[Peer]:
        """The peers that speak for a rank."""
        yield from self._joined.values()

    def strangers(self) -> Iterator[Peer]:
        """The peers that do not."""
        yield from self._strangers.values()

    def __len__(self) -> int:
        return len(self._joined) + len(self._strangers)

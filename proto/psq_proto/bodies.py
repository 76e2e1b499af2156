"""Control bodies: the frozen dataclasses that travel as msgpack maps with exactly their fields.

Each is checked when it is made, so whoever holds one need not check it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from psq_proto import checks
from psq_proto.errors import UsageError
from psq_proto.limits import MAJOR, MAX_POSITIONS, NONE, U32_MAX, U64_MAX

__all__ = [
    "Bye",
    "ControlBody",
    "Cookie",
    "Draw",
    "Error",
    "Fenced",
    "Heartbeat",
    "Hello",
    "Join",
    "Kept",
    "Leave",
    "Range",
    "Recall",
    "StaleEpoch",
    "Status",
    "Verdict",
    "Welcome",
]

_MAX_MAJOR = 255


@dataclass(frozen=True, slots=True)
class Hello:
    """A worker opens its conversation, or opens it again; the answering COOKIE repeats `nonce`."""

    nonce: int
    majors: tuple[int, ...] = (MAJOR,)
    software: str = ""

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        checks.whole("nonce", self.nonce, 0, U64_MAX)
        if not checks.items("majors", self.majors):
            msg = "majors must name at least one protocol version"
            raise UsageError(msg)
        for major in self.majors:
            checks.whole("majors", major, 1, _MAX_MAJOR)
        checks.text("software", self.software)


@dataclass(frozen=True, slots=True)
class Cookie:
    """The answer to HELLO; its header hands out an incarnation, which binds nobody before JOIN."""

    nonce: int

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        checks.whole("nonce", self.nonce, 0, U64_MAX)


@dataclass(frozen=True, slots=True)
class Join:
    """A worker takes up the incarnation of its COOKIE, from which moment it alone is that rank.

    `lineage` names its residual's history, `last_resolved` the last seq it has a verdict for,
    `pending` the seq it has sent without one (NONE where there is none), `epoch` the one in which
    it was last welcomed (NONE: in none).
    """

    lineage: int
    last_resolved: int = NONE
    pending: int = NONE
    host: str = ""
    pid: int = 0
    epoch: int = NONE

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        checks.whole("lineage", self.lineage, 0, U64_MAX)
        checks.whole("last_resolved", self.last_resolved, NONE, U64_MAX)
        checks.whole("pending", self.pending, NONE, U64_MAX)
        checks.text("host", self.host)
        checks.whole("pid", self.pid, 0, U64_MAX)
        checks.whole("epoch", self.epoch, NONE, U32_MAX)


@dataclass(frozen=True, slots=True)
class Welcome:
    """The join is done; "reset" says that the worker's residual no longer goes with the weights.

    `since` is the newest version that is still what it was in the epoch that JOIN named (NONE: all
    are): a server without a journal makes later ones anew.
    """

    mode: Literal["continue", "reset"]
    last_applied: int
    lease_s: float
    init_wanted: bool
    world_size: int
    has_weights: bool
    since: int = NONE

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        checks.choice("mode", self.mode, ("continue", "reset"))
        checks.whole("last_applied", self.last_applied, NONE, U64_MAX)
        object.__setattr__(self, "lease_s", checks.seconds("lease_s", self.lease_s))
        checks.flag("init_wanted", self.init_wanted)
        checks.whole("world_size", self.world_size, 1, U32_MAX)
        checks.flag("has_weights", self.has_weights)
        checks.whole("since", self.since, NONE, U64_MAX)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the contribution `seq` of the header; `server_s` is what its round took.

    "applied": every shard counts but those in `rejected`, which were refused (at most
    MAX_LIST_ITEMS, ascending). "rejected": none counts, and the list is empty.
    """

    outcome: Literal["applied", "rejected"]
    reason: str = ""
    server_s: float = 0.0
    rejected: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        checks.choice("outcome", self.outcome, ("applied", "rejected"))
        checks.text("reason", self.reason)
        object.__setattr__(self, "server_s", checks.seconds("server_s", self.server_s))
        checks.shards("rejected", self.rejected)
        if self.rejected and self.outcome == "rejected":
            msg = f"a rejected contribution names no shards of its own, got {self.rejected!r:.80}"
            raise UsageError(msg)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A worker lives: the version it has (NONE before its first), how far its own loop came.

    `held` says that it waits for another server of the job, and can say nothing to this one before.
    """

    have_version: int = NONE
    progress: int = 0
    held: bool = False

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        checks.whole("have_version", self.have_version, NONE, U64_MAX)
        checks.whole("progress", self.progress, 0, U64_MAX)
        checks.flag("held", self.held)


@dataclass(frozen=True, slots=True)
class Status:
    """The answer to HEARTBEAT: the open round, the shards this worker owes it, who is waited for.

    `waiting` holds (rank, seconds since it was heard). Both lists hold at most MAX_LIST_ITEMS.
    `resolved` is the seq of this rank's last VERDICT (NONE if there was none). `clock_s` is what
    the server's monotonic clock says: good for drawing several machines on one axis of time, and
    for nothing else.
    """

    round: int
    version: int
    missing: tuple[int, ...] = ()
    waiting: tuple[tuple[int, float], ...] = ()
    text: str = ""
    resolved: int = NONE
    clock_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        checks.whole("round", self.round, 0, U64_MAX)
        checks.whole("version", self.version, 0, U64_MAX)
        for shard in checks.items("missing", self.missing):
            checks.whole("missing", shard, 0, U32_MAX - 1)
        for entry in checks.items("waiting", self.waiting):
            if not isinstance(entry, tuple) or len(entry) != 2:  # noqa: PLR2004 - a pair
                msg = f"waiting must hold (rank, silent_s) pairs, got {entry!r:.80}"
                raise UsageError(msg)
            checks.whole("waiting rank", entry[0], 0, U32_MAX)
        pairs = tuple(
            (rank, checks.seconds("silent_s", silent_s)) for rank, silent_s in self.waiting
        )
        object.__setattr__(self, "waiting", pairs)
        checks.text("text", self.text)
        checks.whole("resolved", self.resolved, NONE, U64_MAX)
        object.__setattr__(self, "clock_s", checks.seconds("clock_s", self.clock_s))


@dataclass(frozen=True, slots=True)
class Leave:
    """A worker ends its part of the job."""

    reason: Literal["done", "error", "interrupted"]
    text: str = ""

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        checks.choice("reason", self.reason, ("done", "error", "interrupted"))
        checks.text("text", self.text)


@dataclass(frozen=True, slots=True)
class Kept:
    """A worker's own copy of a checkpoint (the header's version) is on its disk.

    `digest` is of what it kept, by the worker's own reckoning: servers only compare it with itself.
    """

    digest: int = 0

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        checks.whole("digest", self.digest, 0, U64_MAX)


@dataclass(frozen=True, slots=True)
class Draw:
    """A worker asks for the range of data that contribution `seq` is computed from.

    `size`, `batch` and `seed` are of the job: all its workers name the same. `epoch` is the one
    that the worker is at.
    """

    seq: int
    epoch: int
    size: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        for name in ("seq", "epoch", "seed"):
            checks.whole(name, getattr(self, name), 0, U64_MAX)
        checks.whole("size", self.size, 1, MAX_POSITIONS)
        checks.whole("batch", self.batch, 1, U32_MAX)


@dataclass(frozen=True, slots=True)
class Range:
    """The answer to DRAW: positions [low, high) of the epoch's order, or why there are none.

    "drawn" ranges are bound to the rank's contribution `seq` until its VERDICT. "wait": all that is
    left is in others' hands. "late": that contribution cannot count any more. "end": this epoch is
    over, `epoch` is the present one. `left` positions of the epoch are not visited yet.
    """

    seq: int
    state: Literal["drawn", "wait", "late", "end"]
    epoch: int
    ranges: tuple[tuple[int, int], ...] = ()
    left: int = 0

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry: spans ascend and do not overlap."""
        checks.whole("seq", self.seq, 0, U64_MAX)
        checks.choice("state", self.state, ("drawn", "wait", "late", "end"))
        checks.whole("epoch", self.epoch, 0, U64_MAX)
        at = 0
        for span in checks.items("ranges", self.ranges):
            if not isinstance(span, tuple) or len(span) != 2:  # noqa: PLR2004 - a pair
                msg = f"ranges must hold (low, high) pairs, got {span!r:.80}"
                raise UsageError(msg)
            checks.whole("low", span[0], at, MAX_POSITIONS)
            checks.whole("high", span[1], span[0] + 1, MAX_POSITIONS)
            at = span[1]
        if bool(self.ranges) != (self.state == "drawn"):
            msg = f"ranges belong to state drawn, got {len(self.ranges)} with {self.state!r}"
            raise UsageError(msg)
        checks.whole("left", self.left, 0, MAX_POSITIONS)


@dataclass(frozen=True, slots=True)
class Recall:
    """The server has lost these shards of the contribution `seq` of the header: say them again.

    At least one, ascending. The answer is an AGAIN for each, or one AGAIN SKIP for all that the
    worker has not kept.
    """

    shards: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        checks.shards("shards", self.shards)
        if not self.shards:
            msg = "shards must name at least one"
            raise UsageError(msg)


@dataclass(frozen=True, slots=True)
class Error:
    """The server refuses something; after a fatal one it says no more on this connection."""

    code: str
    text: str = ""
    fatal: bool = False

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        checks.text("code", self.code)
        checks.text("text", self.text)
        checks.flag("fatal", self.fatal)
        object.__setattr__(self, "code", str(self.code))


@dataclass(frozen=True, slots=True)
class Bye:
    """The server ends the conversation: "done" when the job is, else a word for why."""

    reason: str
    text: str = ""

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        checks.text("reason", self.reason)
        checks.text("text", self.text)


@dataclass(frozen=True, slots=True)
class Fenced:
    """A newer process holds this rank: the receiver exits and does not join again by itself."""

    text: str = ""

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        checks.text("text", self.text)


@dataclass(frozen=True, slots=True)
class StaleEpoch:
    """This connection has not joined the server's present epoch: join again, same lineage."""

    text: str = ""

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        checks.text("text", self.text)


ControlBody: TypeAlias = (
    Hello
    | Join
    | Heartbeat
    | Leave
    | Kept
    | Draw
    | Cookie
    | Welcome
    | Verdict
    | Fenced
    | StaleEpoch
    | Status
    | Range
    | Recall
    | Error
    | Bye
)

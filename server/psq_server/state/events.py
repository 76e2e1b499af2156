"""What can happen to a server, and what it can decide to do.

Events go in, actions come out; both are frozen values. A frame inside either is opaque bytes:
events carry what came, actions carry sealed frames or the payload views a reducer needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

from psq.keys import Authorized
from psq.plan import Plan
from psq_proto.frames import Buffer

if TYPE_CHECKING:
    from psq_server.state.past import Past

__all__ = [
    "LOGGED",
    "Action",
    "Adopt",
    "Blocked",
    "Broadcast",
    "Changed",
    "Checkpoint",
    "Checkpointed",
    "Committed",
    "DurabilityLevel",
    "Durable",
    "Echo",
    "EndedAbove",
    "Event",
    "Field",
    "FrameReceived",
    "GoBack",
    "Initialize",
    "Judge",
    "Judged",
    "Level",
    "Log",
    "PeerBehind",
    "PeerGone",
    "Pushed",
    "Reduce",
    "Retake",
    "Retaken",
    "Save",
    "Send",
    "SendFull",
    "ShardReduced",
    "Started",
    "Stop",
    "StopRequested",
    "Tick",
    "WaitsAbove",
    "WeightsAbove",
]

Level = Literal["info", "warning", "error"]
Field: TypeAlias = str | int | float
DurabilityLevel = Literal["off", "checkpoint", "replay", "journal"]
"""What of a job outlives its server: nothing, its checkpoints, who said what in every round (while
its workers keep the payloads), every round."""
LOGGED: Final = frozenset({"replay", "journal"})
"""At these levels nobody hears of a round before it is on disk."""


class Pushed(NamedTuple):
    """One rank's contribution to one shard, checked.

    Attributes:
        rank: whose.
        payload: what it says, a view of the frame that it came in.
        codec: the wire id of what that is written in.
        weight: how often it counts in a weighted mean; what a rule has judged takes its place.
        staleness: how many versions had been made since the one it was computed from.
    """

    rank: int
    payload: memoryview
    codec: int
    weight: float = 1
    staleness: int = 0


# ---- events


@dataclass(frozen=True, slots=True)
class FrameReceived:
    """One frame came over the connection `peer`.

    A push's payload is kept, as a view of the frame, until its shard is reduced. `key` is whose
    key the connection has; None where nothing is encrypted, and everybody may speak for any rank.
    """

    peer: bytes
    frame: Buffer
    key: Authorized | None = None


@dataclass(frozen=True, slots=True)
class PeerGone:
    """The connection does not exist any more."""

    peer: bytes


@dataclass(frozen=True, slots=True)
class PeerBehind:
    """The peer reads too slowly: what was queued for it was dropped, and it must pull."""

    peer: bytes


@dataclass(frozen=True, slots=True)
class ShardReduced:
    """A `Reduce` is done: `frame` is the sealed WEIGHTS for everybody.

    With `more` they are the shard's whole weights, in as many frames.
    """

    round: int
    shard: int
    frame: Buffer
    reduce_s: float
    more: tuple[Buffer, ...] = ()


@dataclass(frozen=True, slots=True)
class Judged:
    """A `Judge` is answered.

    Attributes:
        round: whose contributions were judged.
        weights: of some ranks, what takes the place of the weight that they asked for.
        refused: of those of whom nothing is to count: why, in words.
    """

    round: int
    weights: Mapping[int, float]
    refused: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody wants this server to end; `reason` is a word for the log and for BYE."""

    reason: str


@dataclass(frozen=True, slots=True)
class WeightsAbove:
    """In a tree: the server above has weights, so this one can have them sent on."""


@dataclass(frozen=True, slots=True)
class WaitsAbove:
    """In a tree: what the servers above wait for, in words; empty for nothing."""

    text: str


@dataclass(frozen=True, slots=True)
class EndedAbove:
    """In a tree: there is no going on with the server above, and why."""

    exit_code: int
    text: str


@dataclass(frozen=True, slots=True)
class Durable:
    """A crash takes back neither the round that made `version` nor anything before it."""

    version: int


@dataclass(frozen=True, slots=True)
class Blocked:
    """The disk refuses what has to be durable, and why; empty: it does not any more."""

    text: str


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """The checkpoint of `version` is on disk, or `text` says why it is not."""

    version: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class Retaken:
    """A `Retake` is done: of each shard that the round moved, the sealed WEIGHTS."""

    round: int
    frames: Mapping[int, Buffer]


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed. A machine that hears nothing for long still has to notice silence."""


Above: TypeAlias = WeightsAbove | WaitsAbove | EndedAbove
Event: TypeAlias = (
    FrameReceived
    | PeerGone
    | PeerBehind
    | ShardReduced
    | Judged
    | StopRequested
    | Durable
    | Blocked
    | Checkpointed
    | Retaken
    | Tick
    | Above
)


# ---- actions


@dataclass(frozen=True, slots=True)
class Send:
    """Send one frame to one peer.

    An `early` one says nothing that a crash could take back, so it need not wait for the disk. A
    `stranger` speaks for no rank, and may be anybody.
    """

    peer: bytes
    frame: Buffer
    early: bool = False
    stranger: bool = False


@dataclass(frozen=True, slots=True)
class Echo:
    """Send one frame to one peer, unless something waits for it: it is measured, not needed."""

    peer: bytes
    frame: Buffer


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Send the same frames, weights of `version`, to all these peers.

    `shards` says of each frame which shard it is of; one that goes whole may have several.
    """

    peers: tuple[bytes, ...]
    version: int
    frames: tuple[Buffer, ...]
    shards: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SendFull:
    """Send these shards' whole weights to these peers.

    `versions` is by shard, as things are now. The frames may be made later, when a peer has room,
    and bear a later version then; all parts of a shard are of one version.
    """

    peers: tuple[bytes, ...]
    versions: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Adopt:
    """This plan is the job: make room for its weights.

    Attributes:
        plan: the job.
        level: what of it is to outlive this process.
        whole: nothing of a round may leave before all of it is durable. (Where shards go out one
            by one, they may: with the same members the same bytes come again.)
    """

    plan: Plan
    level: DurabilityLevel = "off"
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Initialize:
    """Set one part of a shard's initial weights. values: bytes of f32[n], finite."""

    shard: int
    part: int
    values: memoryview


@dataclass(frozen=True, slots=True)
class Judge:
    """Look at a whole round before any of it is reduced; answer with `Judged`.

    Attributes:
        round: the round.
        said: of every shard that it moves, the contributions in rank order.
        rate: its learning rate.
    """

    round: int
    said: Mapping[int, tuple[Pushed, ...]]
    rate: float


@dataclass(frozen=True, slots=True)
class Reduce:
    """Take one shard's step from what was said, in rank order; answer with `ShardReduced`.

    Nothing said: no rank has anything to say to it; nothing changes, and the answer says so. The
    answer is the shard of version round + 1.
    """

    round: int
    shard: int
    said: tuple[Pushed, ...]
    rate: float

    @property
    def payloads(self) -> tuple[memoryview, ...]:
        """What was said, as it came."""
        return tuple(one.payload for one in self.said)


@dataclass(frozen=True, slots=True)
class Retake:
    """Make a round again that was committed before a crash; answer with `Retaken`."""

    past: Past


@dataclass(frozen=True, slots=True)
class GoBack:
    """End this process's state, and begin again from the checkpoint: rounds after it are lost."""

    version: int
    text: str


@dataclass(frozen=True, slots=True)
class Committed:
    """A round is over: `version` is what it made.

    `staleness` is, of each contribution that counts, how many versions had been made since the one
    it was computed from.
    """

    version: int
    staleness: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Started:
    """The initial weights are whole: nothing that depends on them may leave before they are kept.

    Said, like the three below, only where something is to outlive this process.
    """


@dataclass(frozen=True, slots=True)
class Changed:
    """What is known of the ranks has changed outside a commit.

    What leaves from the actions on that it is among waits until that is durable.
    """


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Keep this version, as it is now; answer with `Checkpointed`.

    The `last` one is waited for by what follows: the process ends.
    """

    version: int
    last: bool = False


@dataclass(frozen=True, slots=True)
class Save:
    """Write the final weights, of this version."""

    version: int


@dataclass(frozen=True, slots=True)
class Log:
    """One line for whoever reads the log."""

    event: str
    fields: Mapping[str, Field] = field(default_factory=dict)
    level: Level = "info"


@dataclass(frozen=True, slots=True)
class Stop:
    """End the process. Nothing follows.

    `byes` went to workers that have not left: one that computes is slow to read, and must have.
    """

    exit_code: int
    reason: str
    text: str
    byes: tuple[Send, ...] = ()


Action: TypeAlias = (
    Send
    | Echo
    | Broadcast
    | SendFull
    | Adopt
    | Initialize
    | Judge
    | Reduce
    | Retake
    | GoBack
    | Committed
    | Started
    | Changed
    | Checkpoint
    | Save
    | Log
    | Stop
)

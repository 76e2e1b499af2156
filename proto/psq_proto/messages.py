"""Message types, limits and control bodies: what psq's processes can say to each other.

A control body is a frozen dataclass, checked when it is made, that travels as a msgpack map with exactly its fields.
Data bodies (PLAN, INIT, PUSH, WEIGHTS) are raw bytes and have no class; PULL has no body at all.
Nothing here does I/O or keeps state. `proto/README.md` is the specification.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum, IntFlag, StrEnum
from typing import Any, Final, Literal, TypeAlias

from psq_proto.errors import RemoteWireError, UsageError
from psq_proto.packing import PackLimits, pack, unpack

__all__ = [
    "BODY_TYPES",
    "CONTROL_LIMITS",
    "DATA_TYPES",
    "INIT_PART_NUMEL",
    "MAJOR",
    "MAX_CONTROL_BYTES",
    "MAX_LIST_ITEMS",
    "MAX_PAYLOAD_BYTES",
    "MAX_TEXT_BYTES",
    "NONE",
    "NO_SHARD",
    "NO_VERSION",
    "PLAN_LIMITS",
    "U32_MAX",
    "U64_MAX",
    "Bye",
    "ControlBody",
    "Cookie",
    "Error",
    "ErrorCode",
    "Fenced",
    "Flags",
    "Heartbeat",
    "Hello",
    "Join",
    "Leave",
    "MessageType",
    "StaleEpoch",
    "Status",
    "Verdict",
    "Welcome",
    "clip_text",
    "decode_body",
    "encode_body",
    "from_worker",
]

MAJOR: Final = 1
"""The protocol version this package speaks."""

U32_MAX: Final = (1 << 32) - 1
U64_MAX: Final = (1 << 64) - 1

MAX_PAYLOAD_BYTES: Final = 1 << 20
"""The longest body of a data message; the layout cuts shards so that no payload is longer."""
MAX_CONTROL_BYTES: Final = 64 * 1024
"""The longest body of a control message."""
MAX_TEXT_BYTES: Final = 4096
"""The longest string in a control body, in UTF-8 bytes."""
MAX_LIST_ITEMS: Final = 1024
"""The longest list in a control body; a server with more to report reports the first ones."""

NO_SHARD: Final = U32_MAX
"""The shard of a PUSH that carries none (SKIP)."""
NO_VERSION: Final = U64_MAX
"""The version of a PULL from a worker that has no weights yet."""
NONE: Final = -1
"""No version, no sequence number: in control bodies, where such fields are signed."""
INIT_PART_NUMEL: Final = MAX_PAYLOAD_BYTES // 4
"""Part p of a shard sent as f32 holds its elements [p * INIT_PART_NUMEL, ...)."""

CONTROL_LIMITS: Final = PackLimits(
    total_bytes=MAX_CONTROL_BYTES,
    map_items=64,
    array_items=MAX_LIST_ITEMS,
    str_bytes=MAX_TEXT_BYTES,
    bin_bytes=4096,
    depth=8,
    items=6 * MAX_LIST_ITEMS,
)
PLAN_LIMITS: Final = PackLimits(
    total_bytes=MAX_PAYLOAD_BYTES,
    map_items=64,
    array_items=65_536,
    str_bytes=4096,
    bin_bytes=0,
    depth=8,
    items=8 * 65_536,
)
"""For whoever reads a PLAN body; the wire layer passes it on as bytes."""


class MessageType(IntEnum):
    """What a frame is; 9 and 69 are reserved for checkpoints and refused until they exist."""

    HELLO = 1
    PLAN = 2
    JOIN = 3
    INIT = 4
    PUSH = 5
    PULL = 6
    HEARTBEAT = 7
    LEAVE = 8
    COOKIE = 65
    WELCOME = 66
    VERDICT = 67
    WEIGHTS = 68
    FENCED = 70
    STALE_EPOCH = 71
    STATUS = 72
    ERROR = 73
    BYE = 74


DATA_TYPES: Final = frozenset({MessageType.PLAN, MessageType.INIT, MessageType.PUSH, MessageType.WEIGHTS})


def from_worker(message_type: MessageType) -> bool:
    """Whether workers send this type (and servers receive it)."""
    return message_type < MessageType.COOKIE


class Flags(IntFlag):
    """Header flags; every other bit is reserved and refused."""

    NONE = 0
    SKIP = 1
    """PUSH without payload: this rank contributes nothing to this round."""
    DELTA = 2
    """WEIGHTS to add to the version before."""
    FULL = 4
    """WEIGHTS that replace what the worker has."""


class ErrorCode(StrEnum):
    """The codes an ERROR may carry; a receiver treats one it does not know like REFUSED."""

    WIRE = "wire"
    PROTOCOL = "protocol"
    VERSION = "version"
    PLAN = "plan"
    PAYLOAD = "payload"
    RANK = "rank"
    REFUSED = "refused"


def clip_text(text: str) -> str:
    """`text` cut, if it must be, to what a control body may hold; what UTF-8 cannot carry becomes '?'."""
    return text.encode("utf-8", "replace")[:MAX_TEXT_BYTES].decode("utf-8", "ignore")


def _whole(what: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        msg = f"{what} must be a whole number {low}..{high}, got {value!r:.80}"
        raise UsageError(msg)


def _seconds(what: str, value: object) -> float:
    """Finite and not negative; a whole number is taken as one, so that 0 and 0.0 mean the same."""
    if type(value) not in (int, float) or not 0 <= value < math.inf:  # type: ignore[operator]
        msg = f"{what} must be a finite number of seconds >= 0, got {value!r:.80}"
        raise UsageError(msg)
    return float(value)  # type: ignore[arg-type]


def _flag(what: str, value: object) -> None:
    if type(value) is not bool:
        msg = f"{what} must be true or false, got {value!r:.80}"
        raise UsageError(msg)


def _text(what: str, value: object) -> None:
    if not isinstance(value, str):
        msg = f"{what} must be a string, got {value!r:.80}"
        raise UsageError(msg)
    if len(value.encode("utf-8", "replace")) > MAX_TEXT_BYTES:
        msg = f"{what} must be at most {MAX_TEXT_BYTES} bytes, got {len(value)} characters: use clip_text"
        raise UsageError(msg)
    if not value.isascii() and clip_text(value) != value:
        msg = f"{what} must be text that UTF-8 can carry, got {value!r:.80}: use clip_text"
        raise UsageError(msg)


def _one_of(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        msg = f"{what} must be one of {', '.join(allowed)}, got {value!r:.80}"
        raise UsageError(msg)


def _list(what: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_LIST_ITEMS:
        msg = f"{what} must be a tuple of at most {MAX_LIST_ITEMS} items, got {value!r:.80}"
        raise UsageError(msg)
    return value


@dataclass(frozen=True, slots=True)
class Hello:
    """A worker opens (or opens again) its conversation; `nonce` comes back in the COOKIE that answers this HELLO."""

    nonce: int
    majors: tuple[int, ...] = (MAJOR,)
    software: str = ""

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        _whole("nonce", self.nonce, 0, U64_MAX)
        if not _list("majors", self.majors):
            msg = "majors must name at least one protocol version"
            raise UsageError(msg)
        for major in self.majors:
            _whole("majors", major, 1, 255)
        _text("software", self.software)


@dataclass(frozen=True, slots=True)
class Cookie:
    """The server's answer to HELLO; its header hands out epoch and incarnation, which bind nobody before JOIN."""

    nonce: int

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        _whole("nonce", self.nonce, 0, U64_MAX)


@dataclass(frozen=True, slots=True)
class Join:
    """A worker takes up the incarnation of its COOKIE, from which moment it alone is that rank.

    `lineage` names its residual's history, `last_resolved` the last seq it has a verdict for, `pending` the seq it has
    sent without one (NONE where there is none).
    """

    lineage: int
    last_resolved: int = NONE
    pending: int = NONE
    host: str = ""
    pid: int = 0

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        _whole("lineage", self.lineage, 0, U64_MAX)
        _whole("last_resolved", self.last_resolved, NONE, U64_MAX)
        _whole("pending", self.pending, NONE, U64_MAX)
        _text("host", self.host)
        _whole("pid", self.pid, 0, U64_MAX)


@dataclass(frozen=True, slots=True)
class Welcome:
    """The join is done; RESET tells the worker that its residual is not the one the server's weights go with."""

    mode: Literal["continue", "reset"]
    last_applied: int
    lease_s: float
    init_wanted: bool
    world_size: int
    has_weights: bool

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        _one_of("mode", self.mode, ("continue", "reset"))
        _whole("last_applied", self.last_applied, NONE, U64_MAX)
        object.__setattr__(self, "lease_s", _seconds("lease_s", self.lease_s))
        _flag("init_wanted", self.init_wanted)
        _whole("world_size", self.world_size, 1, U32_MAX)
        _flag("has_weights", self.has_weights)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one contribution, named by the header's seq; `server_s` is what the round's step took."""

    outcome: Literal["applied", "rejected"]
    reason: str = ""
    server_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        _one_of("outcome", self.outcome, ("applied", "rejected"))
        _text("reason", self.reason)
        object.__setattr__(self, "server_s", _seconds("server_s", self.server_s))


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A worker is alive: the version it has (NONE before its first) and how far its own loop came."""

    have_version: int = NONE
    progress: int = 0

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        _whole("have_version", self.have_version, NONE, U64_MAX)
        _whole("progress", self.progress, 0, U64_MAX)


@dataclass(frozen=True, slots=True)
class Status:
    """The answer to HEARTBEAT: the open round, the shards of it this worker still owes, and who is waited for.

    `waiting` holds (rank, seconds since it was heard). Both lists hold at most MAX_LIST_ITEMS entries.
    """

    round: int
    version: int
    missing: tuple[int, ...] = ()
    waiting: tuple[tuple[int, float], ...] = ()
    text: str = ""

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        _whole("round", self.round, 0, U64_MAX)
        _whole("version", self.version, 0, U64_MAX)
        for shard in _list("missing", self.missing):
            _whole("missing", shard, 0, U32_MAX - 1)
        for entry in _list("waiting", self.waiting):
            if not isinstance(entry, tuple) or len(entry) != 2:  # noqa: PLR2004 - a pair
                msg = f"waiting must hold (rank, silent_s) pairs, got {entry!r:.80}"
                raise UsageError(msg)
            _whole("waiting rank", entry[0], 0, U32_MAX)
        pairs = tuple((rank, _seconds("silent_s", silent_s)) for rank, silent_s in self.waiting)
        object.__setattr__(self, "waiting", pairs)
        _text("text", self.text)


@dataclass(frozen=True, slots=True)
class Leave:
    """A worker ends its part of the job."""

    reason: Literal["done", "error", "interrupted"]
    text: str = ""

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        _one_of("reason", self.reason, ("done", "error", "interrupted"))
        _text("text", self.text)


@dataclass(frozen=True, slots=True)
class Error:
    """The server refuses something; after a fatal one it says no more on this connection."""

    code: str
    text: str = ""
    fatal: bool = False

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        _text("code", self.code)
        _text("text", self.text)
        _flag("fatal", self.fatal)
        object.__setattr__(self, "code", str(self.code))


@dataclass(frozen=True, slots=True)
class Bye:
    """The server ends the conversation: "done" when the job is, else a word for why."""

    reason: str
    text: str = ""

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        _text("reason", self.reason)
        _text("text", self.text)


@dataclass(frozen=True, slots=True)
class Fenced:
    """A newer process holds this rank: the receiver exits and does not join again by itself."""

    text: str = ""

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        _text("text", self.text)


@dataclass(frozen=True, slots=True)
class StaleEpoch:
    """This connection has not joined the server's present epoch: join again, with the same lineage."""

    text: str = ""

    def __post_init__(self) -> None:
        """Refuse what the wire cannot carry."""
        _text("text", self.text)


ControlBody: TypeAlias = (
    Hello
    | Join
    | Heartbeat
    | Leave
    | Cookie
    | Welcome
    | Verdict
    | Fenced
    | StaleEpoch
    | Status
    | Error
    | Bye
)

BODY_TYPES: Final[dict[MessageType, type[ControlBody]]] = {
    MessageType.HELLO: Hello,
    MessageType.JOIN: Join,
    MessageType.HEARTBEAT: Heartbeat,
    MessageType.LEAVE: Leave,
    MessageType.COOKIE: Cookie,
    MessageType.WELCOME: Welcome,
    MessageType.VERDICT: Verdict,
    MessageType.FENCED: Fenced,
    MessageType.STALE_EPOCH: StaleEpoch,
    MessageType.STATUS: Status,
    MessageType.ERROR: Error,
    MessageType.BYE: Bye,
}
"""The class of each control message's body."""


def encode_body(body: ControlBody) -> bytes:
    """The msgpack map of a control body: every field, in the class's order."""
    packed = pack({name: getattr(body, name) for name in type(body).__slots__})
    if len(packed) > MAX_CONTROL_BYTES:
        msg = f"{type(body).__name__} takes {len(packed)} bytes, the limit is {MAX_CONTROL_BYTES}"
        raise UsageError(msg)
    return packed


def decode_body(message_type: MessageType, body: bytes | bytearray | memoryview) -> ControlBody:
    """The control body in `body`.

    Raises:
        RemoteWireError: it is not a map of exactly the fields of that message, each of its type and in its range.
    """
    made = BODY_TYPES[message_type]
    plain = unpack(body, CONTROL_LIMITS)
    if not isinstance(plain, dict) or plain.keys() != set(made.__slots__):
        came = ", ".join(map(repr, plain)) if isinstance(plain, dict) else type(plain).__name__
        msg = f"{message_type.name} body must be a map of {', '.join(made.__slots__)}; got {came:.400}"
        raise RemoteWireError(msg)
    try:
        return made(**plain)
    except UsageError as error:
        msg = f"{message_type.name} body: {error}"
        raise RemoteWireError(msg) from error

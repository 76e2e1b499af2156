"""Message types, flags and control bodies: what psq's processes can say to each other.

This is the module to import from; limits and bodies have files of their own. Data bodies (PLAN,
INIT, PUSH, AGAIN, WEIGHTS, PROBE, ECHO, JOB) are raw bytes and have no class; PULL and CKPT have no
body at all.
Nothing here does I/O or keeps state. `proto/README.md` is the specification.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag, StrEnum
from typing import Final

from psq_proto.bodies import (
    Bye,
    ControlBody,
    Cookie,
    Draw,
    Error,
    Fenced,
    Heartbeat,
    Hello,
    Join,
    Kept,
    Leave,
    Range,
    Recall,
    StaleEpoch,
    Status,
    Verdict,
    Welcome,
)
from psq_proto.checks import clip_text
from psq_proto.errors import RemoteWireError, UsageError
from psq_proto.limits import (
    CONTROL_LIMITS,
    INIT_PART_NUMEL,
    MAJOR,
    MAX_CONTROL_BYTES,
    MAX_LIST_ITEMS,
    MAX_PAYLOAD_BYTES,
    MAX_POSITIONS,
    MAX_TEXT_BYTES,
    NO_SHARD,
    NO_VERSION,
    NONE,
    PLAN_LIMITS,
    U32_MAX,
    U64_MAX,
)
from psq_proto.packing import pack, unpack

__all__ = [
    "BODY_TYPES",
    "CONTROL_LIMITS",
    "DATA_TYPES",
    "INIT_PART_NUMEL",
    "MAJOR",
    "MAX_CONTROL_BYTES",
    "MAX_LIST_ITEMS",
    "MAX_PAYLOAD_BYTES",
    "MAX_POSITIONS",
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
    "Draw",
    "Error",
    "ErrorCode",
    "Fenced",
    "Flags",
    "Heartbeat",
    "Hello",
    "Join",
    "Kept",
    "Leave",
    "MessageType",
    "Range",
    "Recall",
    "StaleEpoch",
    "Status",
    "Verdict",
    "Welcome",
    "clip_text",
    "decode_body",
    "encode_body",
    "from_worker",
]


class MessageType(IntEnum):
    """What a frame is; types below COOKIE are said by workers."""

    HELLO = 1
    PLAN = 2
    JOIN = 3
    INIT = 4
    PUSH = 5
    PULL = 6
    HEARTBEAT = 7
    LEAVE = 8
    CKPT_OK = 9
    PROBE = 10
    DRAW = 11
    AGAIN = 12
    COOKIE = 65
    WELCOME = 66
    VERDICT = 67
    WEIGHTS = 68
    CKPT = 69
    FENCED = 70
    STALE_EPOCH = 71
    STATUS = 72
    ERROR = 73
    BYE = 74
    ECHO = 75
    JOB = 76
    RANGE = 77
    RECALL = 78

    __hash__ = int.__hash__  # Enum's own is a Python function, and every frame is looked up often


DATA_TYPES: Final = frozenset(
    {
        MessageType.PLAN,
        MessageType.INIT,
        MessageType.PUSH,
        MessageType.AGAIN,
        MessageType.WEIGHTS,
        MessageType.PROBE,
        MessageType.ECHO,
        MessageType.JOB,
    }
)


def from_worker(message_type: MessageType) -> bool:
    """Whether workers send this type (and servers receive it)."""
    return message_type < MessageType.COOKIE


class Flags(IntFlag):
    """Header flags; every other bit is reserved and refused."""

    NONE = 0
    SKIP = 1
    """PUSH without payload: this rank contributes nothing to a shard, or to all it has not said.
    With MEAN: nobody has contributed, nothing is to be applied. With AGAIN: this rank has not kept
    what it said."""
    DELTA = 2
    """WEIGHTS to add to the version before."""
    FULL = 4
    """WEIGHTS that replace what the worker has."""
    MEAN = 8
    """WEIGHTS that every worker applies by the same rule: what all have said of a shard, as one."""


class ErrorCode(StrEnum):
    """The codes an ERROR may carry; a receiver treats one it does not know like REFUSED."""

    WIRE = "wire"
    PROTOCOL = "protocol"
    VERSION = "version"
    PLAN = "plan"
    PAYLOAD = "payload"
    RANK = "rank"
    REFUSED = "refused"


BODY_TYPES: Final[dict[MessageType, type[ControlBody]]] = {
    MessageType.HELLO: Hello,
    MessageType.JOIN: Join,
    MessageType.HEARTBEAT: Heartbeat,
    MessageType.LEAVE: Leave,
    MessageType.CKPT_OK: Kept,
    MessageType.DRAW: Draw,
    MessageType.COOKIE: Cookie,
    MessageType.WELCOME: Welcome,
    MessageType.VERDICT: Verdict,
    MessageType.FENCED: Fenced,
    MessageType.STALE_EPOCH: StaleEpoch,
    MessageType.STATUS: Status,
    MessageType.RANGE: Range,
    MessageType.RECALL: Recall,
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
        RemoteWireError: it is not a map of exactly the fields of that message, each of its type and
        in its range.
    """
    made = BODY_TYPES[message_type]
    plain = unpack(body, CONTROL_LIMITS)
    if not isinstance(plain, dict) or plain.keys() != set(made.__slots__):
        came = ", ".join(map(repr, plain)) if isinstance(plain, dict) else type(plain).__name__
        wanted = ", ".join(made.__slots__)
        msg = f"{message_type.name} body must be a map of {wanted}; got {came:.400}"
        raise RemoteWireError(msg)
    try:
        return made(**plain)
    except UsageError as error:
        msg = f"{message_type.name} body: {error}"
        raise RemoteWireError(msg) from error

"""What both ends of a conversation share: a state, an identity, and the way a message goes out."""

from __future__ import annotations

from typing import NamedTuple, TypedDict, Unpack

from psq_proto.errors import RemoteProtocolError, UsageError
from psq_proto.frames import (
    HEADER_BYTES,
    Buffer,
    Header,
    encode_control,
    encode_frame,
    seal,
)
from psq_proto.messages import ControlBody, Error, Flags, MessageType, from_worker
from psq_proto.transitions import TRANSITIONS, State

__all__ = ["Conversation", "HeaderFields", "Message", "describe", "is_wish"]


class Message(NamedTuple):
    """What was received: a control body as its dataclass, any other body as a view."""

    header: Header
    body: ControlBody | memoryview


class HeaderFields(TypedDict, total=False):
    """The header fields that a caller gives; identity and lengths are the session's to fill in."""

    codec: int
    flags: Flags
    seq: int
    round: int
    version: int
    rate: float
    shard: int
    part: int


class Conversation:
    """The half of a session that does not depend on its role."""

    def __init__(self, *, is_worker: bool, run_id: bytes, epoch: int, rank: int, plan: int) -> None:
        self.state = State.IDLE
        self.run_id = run_id
        self.epoch = epoch
        self.rank = rank
        self.incarnation = 0
        self.plan = plan
        self._is_worker = is_worker

    @property
    def joined(self) -> bool:
        """Whether the three-way join is done and nothing has ended it since."""
        return self.state in (State.JOINED, State.LEAVING)

    @property
    def fresh_lineage(self) -> int:
        """The name of a residual that begins with this conversation; both ends know it."""
        return self.epoch << 32 | self.incarnation

    def may_send(self, message_type: MessageType) -> bool:
        """Whether `send` or `seal` of this type is legal now."""
        mine = from_worker(message_type) is self._is_worker
        return mine and message_type in TRANSITIONS[self.state]

    def send(
        self,
        message_type: MessageType,
        body: ControlBody | Buffer = b"",
        **fields: Unpack[HeaderFields],
    ) -> bytearray:
        """A sealed frame, ready for the link; a data body is copied into it.

        Raises:
            UsageError: this role may not say this now, or the body or a field does not go with it.
        """
        self._check_may_send(message_type)
        header = self._address(message_type, fields)
        if isinstance(body, bytes | bytearray | memoryview):
            frame = encode_frame(header, body)
        else:
            frame = encode_control(header, body)
        self._sent(message_type, body)
        return frame

    def seal(
        self,
        frame: bytearray | memoryview,
        message_type: MessageType,
        **fields: Unpack[HeaderFields],
    ) -> None:
        """Write the header in front of the payload that `frame` holds behind HEADER_BYTES.

        Raises:
            UsageError: this role may not say this now, or the payload or a field is wrong for it.

        Cost: one CRC pass over the payload; nothing is copied.
        """
        self._check_may_send(message_type)
        seal(frame, self._address(message_type, fields))
        self._sent(message_type, memoryview(frame).cast("B")[HEADER_BYTES:])

    def _check_may_send(self, message_type: MessageType) -> None:
        if not self.may_send(message_type):
            role = "worker" if self._is_worker else "server"
            legal = ", ".join(kind.name for kind in MessageType if self.may_send(kind)) or "nothing"
            msg = f"a {role} that is {self.state.value} may send {legal}, not {message_type.name}"
            raise UsageError(msg)

    def _address(self, message_type: MessageType, fields: HeaderFields) -> Header:
        """The header of a message to be sent, with this session's identity in it."""
        return Header(
            type=message_type,
            run_id=self.run_id,
            epoch=self.epoch,
            incarnation=self.incarnation,
            rank=self.rank,
            plan=self.plan,
            **fields,
        )

    def _sent(self, message_type: MessageType, body: ControlBody | Buffer) -> None:
        """Take note of a message that is on its way."""
        if isinstance(body, Error) and body.fatal:
            self.state = State.CLOSED
        elif not is_wish(message_type, body):
            self.state = TRANSITIONS[self.state][message_type]

    def _check_allowed(self, header: Header) -> None:
        if header.type not in TRANSITIONS[self.state]:
            msg = f"{describe(header)} came while this end is {self.state.value}"
            raise RemoteProtocolError(msg)

    def _who(self) -> str:
        return f"rank {self.rank} incarnation {self.incarnation} of epoch {self.epoch}"


def is_wish(message_type: MessageType, body: ControlBody | Buffer) -> bool:
    """Whether a message is a PLAN without a body: it asks for the job's and moves nobody on."""
    return message_type is MessageType.PLAN and not body


def describe(header: Header) -> str:
    """A message and whose it is, for error texts."""
    return (
        f"{header.type.name} of rank {header.rank} incarnation {header.incarnation} "
        f"of epoch {header.epoch}"
    )

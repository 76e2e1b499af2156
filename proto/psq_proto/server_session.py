"""A server's end of a conversation; the theory is in `session`."""

from __future__ import annotations

from typing import Final

from psq_proto.conversation import Conversation, HeaderFields, Message, describe, is_wish
from psq_proto.errors import (
    FencedError,
    RefusedError,
    RemoteError,
    RemotePayloadError,
    RemotePlanError,
    RemoteProtocolError,
    RemoteVersionError,
    RemoteWireError,
    StaleFrameError,
    UsageError,
)
from psq_proto.frames import (
    Buffer,
    Header,
    decode_control,
    decode_frame,
    digest64,
    encode_control,
    encode_frame,
)
from psq_proto.messages import (
    BODY_TYPES,
    MAJOR,
    U32_MAX,
    ControlBody,
    Cookie,
    Error,
    ErrorCode,
    Fenced,
    Hello,
    Join,
    MessageType,
    StaleEpoch,
    clip_text,
    from_worker,
)
from psq_proto.transitions import TRANSITIONS, State

__all__ = ["ServerSession"]

_CODES: Final[tuple[tuple[type[RemoteError], ErrorCode, bool], ...]] = (
    (RemoteVersionError, ErrorCode.VERSION, True),
    (RemotePlanError, ErrorCode.PLAN, True),
    (RefusedError, ErrorCode.REFUSED, True),
    (RemoteWireError, ErrorCode.WIRE, False),
    (RemotePayloadError, ErrorCode.PAYLOAD, False),
    (RemoteError, ErrorCode.PROTOCOL, True),
)
"""What a server answers to each error, and whether that is fatal; the first that fits counts."""

_BEFORE_THE_PLAN: Final = frozenset({MessageType.PLAN, MessageType.PROBE})
"""What may name another plan than this session has: one is it, the other has no use for it."""


class ServerSession(Conversation):
    """A server's end of its conversation with one peer (one routing id).

    On HELLO `send_cookie`; on PLAN check the plan; on JOIN decide, and send WELCOME or a fatal
    ERROR. From JOIN on, `rank`, `incarnation`, `join` (its lineage and pending seq), `plan` (the
    digest) and `plan_body` are the worker's. When a JOIN takes over a rank that another connection
    held, send FENCED on that connection's session; if it was this same connection, its worker
    joined again and there is nobody to fence. WEIGHTS made here are addressed to all (rank 0,
    incarnation 0), so that one frame serves every worker. On a PLAN without a body `send_job`, as
    soon as there is a job; on PROBE `send_echo`.
    """

    def __init__(self, *, run_id: bytes, epoch: int) -> None:
        super().__init__(is_worker=False, run_id=run_id, epoch=epoch, rank=0, plan=0)
        self.hello: Hello | None = None
        self.join: Join | None = None
        self.plan_body = b""
        self._offered = 0

    @property
    def lineage(self) -> int:
        """The lineage the worker joined with.

        Raises:
            UsageError: it has not joined.
        """
        if self.join is None:
            msg = "a session has a lineage from JOIN on"
            raise UsageError(msg)
        return self.join.lineage

    def send_cookie(self, incarnation: int) -> bytearray:
        """The COOKIE that answers the last HELLO and hands out `incarnation` (1 or more).

        A HELLO that was only repeated (same nonce, same rank) gets the incarnation it got before.

        Raises:
            UsageError: there is no HELLO to answer, or the incarnation is out of range.
        """
        self._check_may_send(MessageType.COOKIE)
        if self.hello is None or not 1 <= incarnation <= U32_MAX:
            msg = f"an incarnation is 1..{U32_MAX} and answers a HELLO, got {incarnation}"
            raise UsageError(msg)
        self._offered = self._offered or incarnation
        self.incarnation = self._offered
        return self.send(MessageType.COOKIE, Cookie(self.hello.nonce))

    def send_job(self, plan_body: Buffer) -> bytearray:
        """The JOB that tells a worker which plan to join with; its header names that plan."""
        self._check_may_send(MessageType.JOB)
        header = Header(
            type=MessageType.JOB,
            run_id=self.run_id,
            epoch=self.epoch,
            incarnation=self.incarnation,
            rank=self.rank,
            plan=digest64(plan_body),
        )
        return encode_frame(header, plan_body)

    def send_echo(self, probe: Message) -> bytearray:
        """The ECHO of a PROBE: the first `part` bytes of its body, under its seq."""
        if not isinstance(probe.body, memoryview):
            msg = f"only a PROBE has an ECHO, not {describe(probe.header)}"
            raise UsageError(msg)
        body = probe.body[: probe.header.part]
        return self.send(MessageType.ECHO, body, seq=probe.header.seq)

    def receive(self, buffer: Buffer) -> Message:
        """The message in `buffer`, once it is found whole, current and legal.

        Whatever it raises goes to `answer`, which makes the reply.

        Raises:
            RemoteWireError: the bytes are no message.
            StaleFrameError: it belongs to an earlier conversation, or its sender has not joined on
                this connection.
            FencedError: the sender's rank was taken over.
            RemoteVersionError: the worker speaks no version that this side speaks.
            RemotePlanError: it names another plan than the one it sent.
            RemoteProtocolError: the worker said what it may not say now, or as another rank.
        """
        frame = decode_frame(buffer)
        header = frame.header
        if not from_worker(header.type):
            msg = f"{header.type.name} came to a server; only servers send it"
            raise RemoteProtocolError(msg)
        self._check_open(header)
        if header.type is not MessageType.HELLO:
            self._check_identity(header)
        self._check_allowed(header)
        body = decode_control(frame) if header.type in BODY_TYPES else frame.body
        self._received(header, body)
        return Message(header, body)

    def answer(self, error: RemoteError) -> bytearray | None:
        """The reply to what `receive`, or a check of the server's own, raised; None: say nothing.

        A fatal ERROR closes this session; its worker must come again on a new connection.
        """
        text = clip_text(str(error))
        if self.state is State.CLOSED:
            return None
        if self.state is State.FENCED or isinstance(error, FencedError):
            return self.send(MessageType.FENCED, Fenced(text))
        if isinstance(error, StaleFrameError):
            return self._send_stale_epoch(text, error.incarnation)
        code, fatal = next((c, f) for kind, c, f in _CODES if isinstance(error, kind))
        return self.send(MessageType.ERROR, Error(code, text, fatal))

    def _send_stale_epoch(self, text: str, incarnation: int) -> bytearray:
        """Addressed to the incarnation that is stale, so that a worker that moved on ignores it."""
        header = Header(
            type=MessageType.STALE_EPOCH,
            run_id=self.run_id,
            epoch=self.epoch,
            incarnation=incarnation,
        )
        return encode_control(header, StaleEpoch(text))

    def _address(self, message_type: MessageType, fields: HeaderFields) -> Header:
        if message_type is MessageType.COOKIE and not self.incarnation:
            msg = "a COOKIE hands out an incarnation: use send_cookie"
            raise UsageError(msg)
        if message_type is MessageType.JOB:
            msg = "a JOB names the plan that it carries: use send_job"
            raise UsageError(msg)
        if message_type is MessageType.WEIGHTS:
            return Header(
                type=message_type, run_id=self.run_id, epoch=self.epoch, plan=self.plan, **fields
            )
        return super()._address(message_type, fields)

    def _check_open(self, header: Header) -> None:
        if self.state is State.FENCED:
            msg = f"{self._who()} was taken over by a newer process"
            raise FencedError(msg)
        if self.state is State.CLOSED:
            msg = f"{describe(header)} came after the end of the conversation"
            raise StaleFrameError(msg, header.incarnation)

    def _check_identity(self, header: Header) -> None:
        if self.state in (State.IDLE, State.GREETED):
            msg = f"{describe(header)}, which has not joined on this connection: join (again) first"
            raise StaleFrameError(msg, header.incarnation)
        theirs = (header.run_id, header.epoch, header.incarnation)
        if theirs != (self.run_id, self.epoch, self.incarnation):
            msg = f"{describe(header)}, this conversation is with {self._who()}: join again"
            raise StaleFrameError(msg, header.incarnation)
        if header.rank != self.rank:
            msg = f"{describe(header)}, which said HELLO as rank {self.rank}"
            raise RemoteProtocolError(msg)
        if not self.plan and header.type is MessageType.JOIN:
            msg = f"{describe(header)} came without its PLAN, which was damaged or lost: join again"
            raise StaleFrameError(msg, header.incarnation)
        if header.plan != self.plan and header.type not in _BEFORE_THE_PLAN:
            msg = f"{describe(header)} names plan {header.plan:016x}, it sent plan {self.plan:016x}"
            raise RemotePlanError(msg)

    def _received(self, header: Header, body: ControlBody | memoryview) -> None:
        if isinstance(body, Hello):
            self._take_hello(header, body)
        elif isinstance(body, Join):
            self.join = body
            self._offered = 0
        elif header.type is MessageType.PLAN and isinstance(body, memoryview):
            self._take_plan(header, body)
        if not is_wish(header.type, body):
            self.state = TRANSITIONS[self.state][header.type]

    def _take_hello(self, header: Header, body: Hello) -> None:
        if MAJOR not in body.majors:
            theirs = ", ".join(map(str, body.majors))
            msg = (
                f"the worker ({body.software or 'unnamed'}) speaks protocol version {theirs}, "
                f"this server speaks {MAJOR}: install the same psq on both sides"
            )
            raise RemoteVersionError(msg)
        if self.hello is None or (self.hello.nonce, self.rank) != (body.nonce, header.rank):
            self._offered = 0
        self.hello, self.rank = body, header.rank
        self.incarnation = self.plan = 0
        self.join, self.plan_body = None, b""

    def _take_plan(self, header: Header, body: memoryview) -> None:
        if not body.nbytes:
            return
        digest = digest64(body)
        if digest != header.plan:
            msg = f"PLAN has digest {digest:016x}, its header says {header.plan:016x}"
            raise RemotePlanError(msg)
        self.plan, self.plan_body = digest, bytes(body)

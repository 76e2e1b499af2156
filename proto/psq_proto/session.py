"""Sessions: who may say what when, for both ends of a connection, without I/O.

Theory of operation
===================

One conversation runs over one connection between a worker and the server. Each end keeps a session; both run the
automaton of `transitions`. Three more things are theirs.

Three-way join. A HELLO may be old: held up in a queue, or sent by a process that is dead. It binds nobody. The server
answers with a COOKIE that hands out an incarnation, and only the JOIN that bears this incarnation takes the rank over.
An old HELLO's owner never answers, so it cannot fence a living worker. A repeated HELLO (same nonce) gets the same
incarnation again.

Identity. A session fills run_id, epoch, incarnation, rank and plan into what it sends and checks them in what it
receives; its caller handles neither.

Stale frames. Connections break and come back while messages are queued, so a frame of an earlier epoch, incarnation or
connection is ordinary. It raises StaleFrameError and changes nothing. A worker drops it. A server answers it with
STALE_EPOCH, which tells the worker, if it still is that incarnation, to join again with the same lineage: this is also
how a worker whose connection was replaced finds its way back.

A receive that raises leaves the session as it was, except at a worker that was fenced (then FENCED) or refused, or
that finds another run at its server's address (then CLOSED).

Never here: clocks, sockets, threads, randomness. Nonces, lineages and incarnations are arguments. A session is not
thread-safe.
"""

from __future__ import annotations

from typing import Final, NamedTuple, TypedDict, Unpack

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
    NO_RUN,
    Buffer,
    Header,
    decode_control,
    decode_frame,
    digest64,
    encode_control,
    encode_frame,
    seal,
)
from psq_proto.messages import (
    BODY_TYPES,
    MAJOR,
    NONE,
    U32_MAX,
    ControlBody,
    Cookie,
    Error,
    ErrorCode,
    Fenced,
    Flags,
    Hello,
    Join,
    MessageType,
    StaleEpoch,
    clip_text,
    from_worker,
)
from psq_proto.transitions import OVER, TRANSITIONS, State

__all__ = ["HeaderFields", "Message", "ServerSession", "State", "WorkerSession"]


class Message(NamedTuple):
    """What was received; the body is the message's dataclass, or a view for PLAN, INIT, PUSH, PULL and WEIGHTS."""

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


class _Session:
    """What both roles share: a state, an identity, and the way a message goes out."""

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
        """A sealed frame, ready for the link; a data body is copied into it (`seal` copies nothing).

        Raises:
            UsageError: this role may not say this now, or the body or a field does not go with the type.
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
        """Write the header in front of the payload that `frame` holds behind HEADER_BYTES; nothing is copied.

        Raises:
            UsageError: this role may not say this now, or the payload or a field does not go with the type.
        """
        self._check_may_send(message_type)
        seal(frame, self._address(message_type, fields))
        self._sent(message_type, b"")

    def _check_may_send(self, message_type: MessageType) -> None:
        if not self.may_send(message_type):
            role = "worker" if self._is_worker else "server"
            legal = ", ".join(kind.name for kind in MessageType if self.may_send(kind))
            msg = f"a {role} that is {self.state.value} may send {legal or 'nothing'}, not {message_type.name}"
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
        fatal = isinstance(body, Error) and body.fatal
        self.state = State.CLOSED if fatal else TRANSITIONS[self.state][message_type]

    def _who(self, header: Header) -> str:
        return f"rank {header.rank} incarnation {header.incarnation} of epoch {header.epoch}"

    def _check_allowed(self, header: Header) -> None:
        if header.type not in TRANSITIONS[self.state]:
            msg = f"{header.type.name} from {self._who(header)} came while this end is {self.state.value}"
            raise RemoteProtocolError(msg)


# ---- worker -----------------------------------------------------------------------------------------------------------

_LEFTOVERS: Final = frozenset(
    {MessageType.COOKIE, MessageType.VERDICT, MessageType.WEIGHTS, MessageType.STATUS}
)
"""What a server may have under way when a worker begins to join again: dropped, and not held against it."""

_PLANNED: Final = frozenset(
    {MessageType.WELCOME, MessageType.VERDICT, MessageType.WEIGHTS, MessageType.STATUS}
)
"""The server's messages that name the plan."""

_RAISED: Final[dict[str, type[RemoteError]]] = {
    ErrorCode.VERSION: RemoteVersionError,
    ErrorCode.PLAN: RemotePlanError,
    ErrorCode.PAYLOAD: RemotePayloadError,
    ErrorCode.WIRE: RemoteProtocolError,
    ErrorCode.PROTOCOL: RemoteProtocolError,
}
"""What a worker raises for each code of a fatal ERROR; RefusedError for every other code."""


class WorkerSession(_Session):
    """A worker's end of its conversation with one server.

    HELLO, then on COOKIE both PLAN and JOIN, then on WELCOME the rounds. On STALE_EPOCH (`state` is IDLE again) the same
    from HELLO, with the same lineage. `plan_body` is what PLAN sends and what names the plan everywhere.
    """

    def __init__(self, *, rank: int, plan_body: bytes) -> None:
        super().__init__(
            is_worker=True, run_id=NO_RUN, epoch=0, rank=rank, plan=digest64(plan_body)
        )
        self.plan_body = plan_body
        self._nonce = NONE
        self._last_epoch = 0

    def receive(self, buffer: Buffer) -> Message:
        """The message in `buffer`, once it is found whole, current and legal.

        Raises:
            RemoteWireError: the bytes are no message.
            StaleFrameError: it belongs to an earlier conversation; drop it.
            FencedError: another process holds this rank now.
            RemotePlanError, RemoteVersionError, RefusedError, RemotePayloadError: the server said so, fatally, or its
                plan is another.
            RemoteProtocolError: the server said what it may not say now, or serves another run.
        """
        frame = decode_frame(buffer)
        header = frame.header
        if from_worker(header.type):
            msg = f"{header.type.name} came from a server; only workers send it: is this address a worker's?"
            raise RemoteProtocolError(msg)
        if not self._is_current(header):
            msg = f"{header.type.name} for {self._who(header)}, this worker is {self._who(self._me())}"
            raise StaleFrameError(msg, header.incarnation)
        if header.type in _LEFTOVERS and header.type not in TRANSITIONS[self.state]:
            msg = f"{header.type.name} came while this worker is {self.state.value}: left over"
            raise StaleFrameError(msg, header.incarnation)
        self._check_allowed(header)
        if header.type in _PLANNED and header.plan != self.plan:
            msg = f"{header.type.name} names plan {header.plan:016x}, this worker's is {self.plan:016x}"
            raise RemotePlanError(msg)
        body = decode_control(frame) if header.type in BODY_TYPES else frame.body
        self._received(header, body)
        return Message(header, body)

    def _me(self) -> Header:
        return self._address(MessageType.HEARTBEAT, {})

    def _address(self, message_type: MessageType, fields: HeaderFields) -> Header:
        if message_type is MessageType.HELLO:
            return Header(type=message_type, rank=self.rank, **fields)
        return super()._address(message_type, fields)

    def _sent(self, message_type: MessageType, body: ControlBody | Buffer) -> None:
        super()._sent(message_type, body)
        if isinstance(body, Hello):
            self._nonce = body.nonce
            self._forget()

    def _forget(self) -> None:
        self.epoch = self.incarnation = 0

    def _is_current(self, header: Header) -> bool:
        """Whether a server's message is meant for this worker as it is now (a COOKIE's nonce is looked at later)."""
        kind = header.type
        if self.state in OVER:
            return False
        if kind is MessageType.COOKIE:
            return header.rank == self.rank
        if kind in (MessageType.ERROR, MessageType.BYE):
            return header.incarnation in (0, self.incarnation)
        if not self.incarnation:
            return False
        if kind is MessageType.STALE_EPOCH:
            return header.incarnation == self.incarnation
        if (header.run_id, header.epoch) != (self.run_id, self.epoch):
            return False
        to_all = kind is MessageType.WEIGHTS and (header.incarnation, header.rank) == (0, 0)
        return to_all or (header.incarnation, header.rank) == (self.incarnation, self.rank)

    def _received(self, header: Header, body: ControlBody | memoryview) -> None:
        if isinstance(body, Cookie):
            self._take_cookie(header, body)
        if isinstance(body, Error) and body.fatal:
            self.state = State.CLOSED
            raise _RAISED.get(body.code, RefusedError)(f"the server refused ({body.code}): {body.text}")
        self.state = TRANSITIONS[self.state][header.type]
        if isinstance(body, StaleEpoch):
            self.state = State.IDLE
            self._forget()
        if isinstance(body, Fenced):
            msg = f"another process holds rank {self.rank} now: {body.text}"
            raise FencedError(msg)

    def _take_cookie(self, header: Header, body: Cookie) -> None:
        if body.nonce != self._nonce:
            msg = f"COOKIE answers nonce {body.nonce:016x}, the last HELLO had {self._nonce:016x}"
            raise StaleFrameError(msg, header.incarnation)
        if self.run_id not in (NO_RUN, header.run_id):
            self.state = State.CLOSED
            msg = (
                f"the server serves run {header.run_id.hex()}, this worker belongs to run {self.run_id.hex()}: "
                "the server came back without its state; start the job again"
            )
            raise RemoteProtocolError(msg)
        if header.epoch < self._last_epoch:
            self.state = State.CLOSED
            msg = (
                f"the server is in epoch {header.epoch}, this worker has seen {self._last_epoch}: "
                "the server came back with an older state; start the job again"
            )
            raise RemoteProtocolError(msg)
        self.run_id, self.incarnation = header.run_id, header.incarnation
        self.epoch = self._last_epoch = header.epoch


# ---- server -----------------------------------------------------------------------------------------------------------

_CODES: Final[tuple[tuple[type[RemoteError], ErrorCode, bool], ...]] = (
    (RemoteVersionError, ErrorCode.VERSION, True),
    (RemotePlanError, ErrorCode.PLAN, True),
    (RefusedError, ErrorCode.REFUSED, True),
    (RemoteWireError, ErrorCode.WIRE, False),
    (RemotePayloadError, ErrorCode.PAYLOAD, False),
    (RemoteError, ErrorCode.PROTOCOL, True),
)
"""What a server answers to each error, and whether that ends the conversation; the first that fits counts."""


class ServerSession(_Session):
    """A server's end of its conversation with one peer (one routing id).

    On HELLO `send_cookie`; on PLAN check the plan; on JOIN decide, and send WELCOME or a fatal ERROR. From JOIN on, `rank`,
    `incarnation`, `join` (its lineage and pending seq), `plan` (the digest) and `plan_body` are the worker's. When a JOIN
    takes over a rank that another connection held, that connection's session sends FENCED (if it is the same
    connection, the worker joined again and there is nobody to fence). WEIGHTS that are sealed here are addressed to
    all (rank 0, incarnation 0), so that one frame serves every worker.
    """

    def __init__(self, *, run_id: bytes, epoch: int) -> None:
        super().__init__(is_worker=False, run_id=run_id, epoch=epoch, rank=0, plan=0)
        self.hello: Hello | None = None
        self.join: Join | None = None
        self.plan_body = b""
        self._offered: tuple[int, int] | None = None

    @property
    def lineage(self) -> int:
        """The lineage the worker joined with.

        Raises:
            UsageError: it has not joined yet.
        """
        if self.join is None:
            msg = "a session has a lineage from JOIN on"
            raise UsageError(msg)
        return self.join.lineage

    def send_cookie(self, incarnation: int) -> bytearray:
        """The COOKIE that answers the last HELLO and hands out `incarnation` (1 or more).

        A HELLO that was only repeated (same nonce, same rank) gets the incarnation that it got before.

        Raises:
            UsageError: there is no HELLO to answer.
        """
        self._check_may_send(MessageType.COOKIE)
        if self.hello is None or not 1 <= incarnation <= U32_MAX:
            msg = f"an incarnation is 1..{U32_MAX} and answers a HELLO, got {incarnation}"
            raise UsageError(msg)
        nonce = self.hello.nonce
        if self._offered is None or self._offered[0] != nonce:
            self._offered = (nonce, incarnation)
        self.incarnation = self._offered[1]
        frame = encode_control(self._address(MessageType.COOKIE, {}), Cookie(nonce))
        self._sent(MessageType.COOKIE, b"")
        return frame

    def receive(self, buffer: Buffer) -> Message:
        """The message in `buffer`, once it is found whole, current and legal; give what it raises to `answer`.

        Raises:
            RemoteWireError: the bytes are no message.
            StaleFrameError: it belongs to an earlier conversation, or its sender has not joined on this connection.
            FencedError: the sender's rank was taken over.
            RemoteVersionError: the worker speaks no version that this side speaks.
            RemotePlanError: it names another plan than the one it sent.
            RemoteProtocolError: the worker said what it may not say now, or another rank than it joined as.
        """
        frame = decode_frame(buffer)
        header = frame.header
        if not from_worker(header.type):
            msg = f"{header.type.name} came to a server; only servers send it"
            raise RemoteProtocolError(msg)
        if self.state is State.FENCED:
            msg = f"rank {self.rank} incarnation {self.incarnation} was taken over by a newer process"
            raise FencedError(msg)
        if self.state is State.CLOSED:
            msg = f"{header.type.name} from {self._who(header)} came after the end of the conversation"
            raise StaleFrameError(msg, header.incarnation)
        if header.type is not MessageType.HELLO:
            self._check_identity(header)
        self._check_allowed(header)
        body = decode_control(frame) if header.type in BODY_TYPES else frame.body
        self._received(header, body)
        return Message(header, body)

    def answer(self, error: RemoteError) -> bytearray | None:
        """The reply to a worker whose message made `receive` (or the server's own checks) raise `error`, if any is due.

        A fatal ERROR closes this session; its worker must come again on a new connection.
        """
        text = clip_text(str(error))
        if self.state is State.CLOSED:
            return None
        if self.state is State.FENCED or isinstance(error, FencedError):
            return self.send(MessageType.FENCED, Fenced(text))
        if isinstance(error, StaleFrameError):
            header = Header(
                type=MessageType.STALE_EPOCH,
                run_id=self.run_id,
                epoch=self.epoch,
                incarnation=error.incarnation,
            )
            return encode_control(header, StaleEpoch(text))
        code, fatal = next((c, f) for kind, c, f in _CODES if isinstance(error, kind))
        return self.send(MessageType.ERROR, Error(code, text, fatal))

    def _address(self, message_type: MessageType, fields: HeaderFields) -> Header:
        if message_type is MessageType.COOKIE and not self.incarnation:
            msg = "a COOKIE hands out an incarnation: use send_cookie"
            raise UsageError(msg)
        if message_type is MessageType.WEIGHTS:
            return Header(
                type=message_type, run_id=self.run_id, epoch=self.epoch, plan=self.plan, **fields
            )
        return super()._address(message_type, fields)

    def _check_identity(self, header: Header) -> None:
        name, who = header.type.name, self._who(header)
        if self.state in (State.IDLE, State.GREETED):
            msg = f"{name} from {who}, which has not joined on this connection: join (again) first"
            raise StaleFrameError(msg, header.incarnation)
        theirs = (header.run_id, header.epoch, header.incarnation)
        if theirs != (self.run_id, self.epoch, self.incarnation):
            msg = f"{name} from {who}, this conversation is {self._who(self._peer())}: join again"
            raise StaleFrameError(msg, header.incarnation)
        if header.rank != self.rank:
            msg = f"{name} from {who}, which said HELLO as rank {self.rank}"
            raise RemoteProtocolError(msg)
        if header.plan != self.plan and header.type is not MessageType.PLAN:
            msg = f"{name} from {who} names plan {header.plan:016x}, it sent plan {self.plan:016x}"
            raise RemotePlanError(msg)

    def _peer(self) -> Header:
        return self._address(MessageType.STATUS, {})

    def _received(self, header: Header, body: ControlBody | memoryview) -> None:
        if isinstance(body, Hello):
            self._take_hello(header, body)
        elif header.type is MessageType.PLAN and isinstance(body, memoryview):
            self._take_plan(header, body)
        elif isinstance(body, Join):
            self.join = body
            self._offered = None
        self.state = TRANSITIONS[self.state][header.type]

    def _take_hello(self, header: Header, body: Hello) -> None:
        if MAJOR not in body.majors:
            theirs = ", ".join(map(str, body.majors))
            msg = (
                f"the worker ({body.software or 'unnamed'}) speaks protocol version {theirs}, "
                f"this server speaks {MAJOR}: install the same psq on both sides"
            )
            raise RemoteVersionError(msg)
        if self.hello != body or self.rank != header.rank:
            self._offered = None
        self.hello, self.rank = body, header.rank
        self.incarnation = self.plan = 0
        self.join, self.plan_body = None, b""

    def _take_plan(self, header: Header, body: memoryview) -> None:
        digest = digest64(body)
        if digest != header.plan:
            msg = f"PLAN has digest {digest:016x}, its header says {header.plan:016x}"
            raise RemotePlanError(msg)
        self.plan, self.plan_body = digest, bytes(body)

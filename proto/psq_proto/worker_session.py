"""A worker's end of a conversation; the theory is in `session`."""

from __future__ import annotations

from typing import Final

from psq_proto.conversation import Conversation, HeaderFields, Message, describe
from psq_proto.errors import (
    FencedError,
    RefusedError,
    RemoteError,
    RemotePayloadError,
    RemotePlanError,
    RemoteProtocolError,
    RemoteVersionError,
    StaleFrameError,
)
from psq_proto.frames import NO_RUN, Buffer, Header, decode_control, decode_frame, digest64
from psq_proto.messages import (
    BODY_TYPES,
    NONE,
    ControlBody,
    Cookie,
    Error,
    ErrorCode,
    Fenced,
    Hello,
    MessageType,
    StaleEpoch,
    from_worker,
)
from psq_proto.transitions import OVER, TRANSITIONS, State

__all__ = ["WorkerSession"]

_LEFTOVERS: Final = frozenset(
    {
        MessageType.COOKIE,
        MessageType.VERDICT,
        MessageType.WEIGHTS,
        MessageType.CKPT,
        MessageType.STATUS,
        MessageType.RANGE,
        MessageType.RECALL,
        MessageType.ECHO,
        MessageType.JOB,
    }
)
"""What a server may have under way when a worker moves on or joins again: dropped, no fault."""

_NAMING_THE_PLAN: Final = frozenset(
    {
        MessageType.WELCOME,
        MessageType.VERDICT,
        MessageType.WEIGHTS,
        MessageType.STATUS,
        MessageType.RECALL,
    }
)

_RAISED: Final[dict[str, type[RemoteError]]] = {
    ErrorCode.VERSION: RemoteVersionError,
    ErrorCode.PLAN: RemotePlanError,
    ErrorCode.PAYLOAD: RemotePayloadError,
    ErrorCode.WIRE: RemoteProtocolError,
    ErrorCode.PROTOCOL: RemoteProtocolError,
}
"""What a fatal ERROR of each code raises; RefusedError for every other code."""


class WorkerSession(Conversation):
    """A worker's end of its conversation with one server.

    HELLO; on COOKIE both PLAN (`plan_body`) and JOIN; on WELCOME the rounds. After STALE_EPOCH the
    state is IDLE and it starts again from HELLO, with the same lineage. One that does not know the
    job has an empty `plan_body`: it says PLAN with it, gets the job's plan in JOB, and another
    session joins with that.
    """

    def __init__(self, *, rank: int, plan_body: bytes) -> None:
        plan = digest64(plan_body)
        super().__init__(is_worker=True, run_id=NO_RUN, epoch=0, rank=rank, plan=plan)
        self.plan_body = plan_body
        self._nonce = NONE
        self._last_epoch = 0

    def receive(self, buffer: Buffer) -> Message:
        """The message in `buffer`, once it is found whole, current and legal.

        Raises:
            RemoteWireError: the bytes are no message.
            StaleFrameError: it belongs to an earlier conversation; drop it.
            FencedError: another process holds this rank now.
            RemoteVersionError, RemotePlanError, RemotePayloadError, RefusedError: the server
                refused this worker for good, or answers for another plan.
            RemoteProtocolError: the server said what it may not say now, or serves another run.
        """
        frame = decode_frame(buffer)
        header = frame.header
        if from_worker(header.type):
            msg = f"{header.type.name} came from a server; only workers send it"
            raise RemoteProtocolError(msg)
        if not self._is_current(header) or self._is_left_over(header):
            msg = f"{describe(header)} is not for {self._who()}, {self.state.value}"
            raise StaleFrameError(msg, header.incarnation)
        self._check_allowed(header)
        if header.type in _NAMING_THE_PLAN and header.plan != self.plan:
            msg = f"{describe(header)} names plan {header.plan:016x}, ours is {self.plan:016x}"
            raise RemotePlanError(msg)
        body = decode_control(frame) if header.type in BODY_TYPES else frame.body
        if header.type is MessageType.JOB and digest64(frame.body) != header.plan:
            msg = f"{describe(header)} names plan {header.plan:016x}, which its body is not"
            raise RemotePlanError(msg)
        self._received(header, body)
        return Message(header, body)

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

    def _is_left_over(self, header: Header) -> bool:
        return header.type in _LEFTOVERS and header.type not in TRANSITIONS[self.state]

    def _is_current(self, header: Header) -> bool:
        """Whether a message is meant for this worker as it is now (a COOKIE shows that later)."""
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
        return self._is_addressed(header)

    def _is_addressed(self, header: Header) -> bool:
        if (header.run_id, header.epoch) != (self.run_id, self.epoch):
            return False
        to = (header.incarnation, header.rank)
        to_all = header.type is MessageType.WEIGHTS and to == (0, 0)
        return to_all or to == (self.incarnation, self.rank)

    def _received(self, header: Header, body: ControlBody | memoryview) -> None:
        if isinstance(body, Cookie):
            self._take_cookie(header, body)
        if isinstance(body, Error) and body.fatal:
            self.state = State.CLOSED
            msg = f"the server refused this worker ({body.code}): {body.text}"
            raise _RAISED.get(body.code, RefusedError)(msg)
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
        if not header.incarnation or header.run_id == NO_RUN:
            msg = "COOKIE must hand out an incarnation of 1 or more and name its run"
            raise RemoteProtocolError(msg)
        if self.run_id not in (NO_RUN, header.run_id):
            self._refuse_server(
                f"run {header.run_id.hex()}", f"belongs to run {self.run_id.hex()}", "without its"
            )
        if header.epoch < self._last_epoch:
            self._refuse_server(
                f"epoch {header.epoch}", f"has seen epoch {self._last_epoch}", "with an older"
            )
        self.run_id, self.incarnation = header.run_id, header.incarnation
        self.epoch = self._last_epoch = header.epoch

    def _refuse_server(self, serves: str, mine: str, how: str) -> None:
        self.state = State.CLOSED
        msg = (
            f"the server is in {serves}, this worker {mine}: "
            f"the server came back {how} state; start the job again"
        )
        raise RemoteProtocolError(msg)

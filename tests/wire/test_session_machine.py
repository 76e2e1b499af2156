"""Two sessions, a network that misbehaves, and callers that try everything.

The machine keeps its own record of which handshake messages each end really sent and accepted, and
holds both sessions to it: only the documented errors, nothing taken that was meant for somebody
else, and nobody JOINED without HELLO, COOKIE, PLAN, JOIN, WELCOME in this order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from psq_proto.errors import FencedError, RemoteError, UsageError
from psq_proto.frames import Header, decode_frame, digest64, encode_control
from psq_proto.messages import (
    BODY_TYPES,
    NO_SHARD,
    Bye,
    ControlBody,
    Cookie,
    Error,
    Flags,
    Hello,
    Join,
    MessageType,
    StaleEpoch,
    Welcome,
    from_worker,
)
from psq_proto.session import Message, ServerSession, State, WorkerSession
from psq_proto.transitions import OVER

T = MessageType
HANDSHAKE = (T.HELLO, T.COOKIE, T.PLAN, T.JOIN, T.WELCOME)
HANDSHAKE_TYPES = [kind for kind in HANDSHAKE if kind in BODY_TYPES]
LINK_FRAMES = 8
"""Frames on their way in one direction at most; the oldest is lost when there are more."""

ANSWERED = (T.PROBE, T.ECHO, T.JOB)
ENDINGS = (T.ERROR, T.BYE, T.FENCED)


def messages(kinds: Iterable[MessageType]) -> st.SearchStrategy[tuple[MessageType, ControlBody]]:
    return st.one_of([st.tuples(st.just(kind), st.from_type(BODY_TYPES[kind])) for kind in kinds])


WELCOME = Welcome("continue", -1, 10.0, init_wanted=False, world_size=2, has_weights=True)
RUNS = (b"r" * 16, b"s" * 16)
WRONG = st.fixed_dictionaries(
    {},
    optional={
        "run_id": st.sampled_from(RUNS),
        **dict.fromkeys(("epoch", "incarnation", "rank", "plan"), st.integers(0, 3)),
    },
)


def data_fields(kind: MessageType, skip: bool) -> tuple[bytes, dict[str, Any]]:  # noqa: FBT001
    if kind is T.PUSH and skip:
        return b"", {"flags": Flags.SKIP, "shard": NO_SHARD}
    if kind is T.PUSH:
        return b"bits", {"codec": 1, "rate": 0.5}
    if kind is T.WEIGHTS:
        return b"bits", {"codec": 1, "flags": Flags.DELTA if skip else Flags.FULL}
    if kind is T.PROBE:
        return b"four", {"part": 0 if skip else 4, "seq": 3}
    if kind is T.PLAN:
        return b"" if skip else b"plan", {}
    return b"" if kind in (T.PULL, T.CKPT) else b"four", {}


def identity(who: Header | WorkerSession | ServerSession) -> tuple[object, ...]:
    return who.run_id, who.epoch, who.incarnation, who.rank


class Sessions(RuleBasedStateMachine):
    """A worker, the server session of its present connection, and the frames between them."""

    @initialize(rank=st.integers(0, 2), steps=st.sampled_from([0, 4, 4, 4]))
    def start(self, rank: int, steps: int) -> None:
        self.worker = WorkerSession(rank=rank, plan_body=b"plan")
        self.epoch, self.run_id, self.incarnations = 1, RUNS[0], 0
        self.to_server: list[bytes] = []
        self.to_worker: list[bytes] = []
        self.history: list[bytes] = []
        self.steps: dict[str, list[MessageType]] = {"worker": []}
        self.welcomed: set[tuple[object, ...]] = set()
        self.nonce = -1
        self.connect()
        self.both_do_what_comes_next(nonce=1, lineage=1, steps=steps)

    def connect(self) -> None:
        self.server = ServerSession(run_id=self.run_id, epoch=self.epoch)
        self.steps["server"] = []

    # ---- what a session did, recorded apart from the session

    def took(self, end: str, kind: MessageType, body: object = None) -> None:
        if kind is T.HELLO:
            self.steps[end] = []
        if kind in HANDSHAKE and not (kind is T.PLAN and not body):
            self.steps[end].append(kind)
        if end == "worker" and isinstance(body, StaleEpoch):
            self.steps[end] = []

        if isinstance(body, Hello) and end == "worker":
            self.nonce = body.nonce

    def put(self, frame: bytes | bytearray, link: list[bytes]) -> None:
        link.append(bytes(frame))
        self.history.append(bytes(frame))
        del link[:-LINK_FRAMES], self.history[: -4 * LINK_FRAMES]

    # ---- callers that try everything

    def try_send(self, end: str, kind: MessageType, body: Any, fields: dict[str, Any]) -> None:
        session, link = (
            (self.worker, self.to_server) if end == "worker" else (self.server, self.to_worker)
        )
        before, may = session.state, session.may_send(kind)
        try:
            frame = session.send(kind, body, **fields)
        except UsageError:
            assert session.state is before
            assert not may or kind in (T.COOKIE, T.JOB)
        else:
            assert may
            assert decode_frame(frame).header.type is kind
            self.took(end, kind, body)
            self.put(frame, link)
            if kind is T.WELCOME:
                self.welcomed.add(identity(self.server))

    @rule(
        end=st.sampled_from(["worker", "server"]),
        message=messages(kind for kind in BODY_TYPES if kind not in ENDINGS),
    )
    def send_control(self, end: str, message: tuple[MessageType, ControlBody]) -> None:
        self.try_send(end, *message, {})

    @rule(
        end=st.sampled_from(["worker", "server"]),
        kind=st.sampled_from([T.PLAN, T.INIT, T.PUSH, T.PULL, T.WEIGHTS, T.CKPT, *ANSWERED]),
        skip=st.booleans(),
    )
    def send_data(self, end: str, kind: MessageType, skip: bool) -> None:  # noqa: FBT001
        self.try_send(end, kind, *data_fields(kind, skip))

    @rule(message=messages(ENDINGS))
    def the_server_ends_it(self, message: tuple[MessageType, ControlBody]) -> None:
        self.try_send("server", *message, {})

    # ---- callers that mean it, so that runs get past the join

    def offer_cookie(self) -> None:
        self.incarnations += 1
        try:
            frame = self.server.send_cookie(self.incarnations)
        except UsageError:
            assert not self.server.may_send(T.COOKIE)
        else:
            self.took("server", T.COOKIE)
            self.put(frame, self.to_worker)

    @rule(nonce=st.integers(1, 3), lineage=st.integers(0, 3), steps=st.sampled_from([1, 2, 4, 4]))
    def both_do_what_comes_next(self, nonce: int, lineage: int, steps: int) -> None:
        for _ in range(steps):
            if self.worker.state is State.IDLE:
                self.try_send("worker", T.HELLO, Hello(nonce), {})
            if self.server.state is State.GREETED:
                self.offer_cookie()
            if self.worker.state is State.COOKIED:
                self.try_send("worker", T.PLAN, b"plan", {})
                self.try_send("worker", T.JOIN, Join(lineage), {})
            if self.server.state is State.JOINING:
                self.try_send("server", T.WELCOME, WELCOME, {})
            self.everything_is_delivered()

    @rule(times=st.integers(1, 2), job=st.sampled_from([b"plan", b"another plan"]))
    def the_worker_asks_for_the_job(self, times: int, job: bytes) -> None:
        steps = {State.IDLE: 2, State.GREETED: 1}.get(self.worker.state, 0)
        self.both_do_what_comes_next(nonce=9, lineage=1, steps=steps)
        for _ in range(times if self.worker.state is State.COOKIED else 0):
            self.try_send("worker", T.PLAN, b"", {})
            self.everything_is_delivered()
            self.the_server_tells_the_job(job)
            self.everything_is_delivered()

    @rule(part=st.integers(0, 4))
    def the_worker_measures_the_link(self, part: int) -> None:
        if self.worker.may_send(T.PROBE):
            self.try_send("worker", T.PROBE, b"four", {"part": part})

    @rule()
    def the_server_offers_a_cookie(self) -> None:
        self.offer_cookie()

    @rule(body=st.sampled_from([b"plan", b"another plan"]))
    def the_server_tells_the_job(self, body: bytes) -> None:
        try:
            frame = self.server.send_job(body)
        except UsageError:
            assert not self.server.may_send(T.JOB)
        else:
            self.put(frame, self.to_worker)

    # ---- the network

    def deliver_to_server(self, frame: bytes) -> None:
        before = self.server.state
        try:
            header, body = self.server.receive(frame)
        except RemoteError as error:
            assert self.server.state is before
            answer = self.server.answer(error)
            if answer is not None:
                self.put(answer, self.to_worker)
        else:
            assert from_worker(header.type)
            assert before not in OVER
            assert header.type is T.HELLO or identity(header) == identity(self.server)
            assert header.rank == self.server.rank
            self.took("server", header.type, body)
            if header.type is T.PROBE:
                self.put(self.server.send_echo(Message(header, body)), self.to_worker)

    def deliver_to_worker(self, frame: bytes) -> None:
        before, me = self.worker.state, identity(self.worker)
        try:
            header, body = self.worker.receive(frame)
        except FencedError:
            assert identity(decode_frame(frame).header) == me
        except RemoteError:
            assert self.worker.state in (before, State.CLOSED)
        else:
            assert not from_worker(header.type)
            assert before not in OVER
            self.check_meant_for_worker(header, body, me)
            self.took("worker", header.type, body)

    def check_meant_for_worker(self, header: Header, body: Any, me: tuple[object, ...]) -> None:
        if isinstance(body, Cookie):
            assert body.nonce == self.nonce
        elif isinstance(body, StaleEpoch):
            assert header.incarnation == me[2] != 0
        elif isinstance(body, Error | Bye):
            assert not (isinstance(body, Error) and body.fatal)
        elif header.type is not T.WEIGHTS or header.incarnation:
            assert identity(header) == me
            if header.type is T.JOB:
                assert header.plan == digest64(body)
            elif header.type is not T.ECHO:
                assert header.plan == self.worker.plan

    @precondition(lambda self: self.to_server)
    @rule()
    def the_server_reads(self) -> None:
        self.deliver_to_server(self.to_server.pop(0))

    @precondition(lambda self: self.to_worker)
    @rule()
    def the_worker_reads(self) -> None:
        self.deliver_to_worker(self.to_worker.pop(0))

    @rule()
    def everything_is_delivered(self) -> None:
        while self.to_server:
            self.deliver_to_server(self.to_server.pop(0))
        while self.to_worker:
            self.deliver_to_worker(self.to_worker.pop(0))

    @precondition(lambda self: self.history)
    @rule(index=st.integers(0, 4 * LINK_FRAMES), to_worker=st.booleans())
    def an_old_frame_comes_again(self, index: int, to_worker: bool) -> None:  # noqa: FBT001
        frame = self.history[index % len(self.history)]
        (self.to_worker if to_worker else self.to_server).append(frame)

    @precondition(lambda self: self.history)
    @rule(
        index=st.integers(0, 4 * LINK_FRAMES), bit=st.integers(0, 1 << 16), to_worker=st.booleans()
    )
    def a_frame_comes_damaged(self, index: int, bit: int, to_worker: bool) -> None:  # noqa: FBT001
        frame = bytearray(self.history[index % len(self.history)])
        bit %= 8 * len(frame)
        frame[bit // 8] ^= 1 << bit % 8
        (self.deliver_to_worker if to_worker else self.deliver_to_server)(bytes(frame))

    @rule(
        message=messages(HANDSHAKE_TYPES) | messages(BODY_TYPES),
        right=st.booleans(),
        to_worker=st.booleans(),
        wrong=WRONG,
    )
    def a_rogue_speaks(
        self,
        message: tuple[MessageType, ControlBody],
        right: bool,  # noqa: FBT001
        to_worker: bool,  # noqa: FBT001
        wrong: dict[str, Any],
    ) -> None:
        """Whole, well-formed frames that no session made: out of turn, or as somebody else."""
        kind, body = message
        end = self.worker if to_worker else self.server
        names = ("run_id", "epoch", "incarnation", "rank", "plan")
        claims = {name: getattr(end, name) for name in names} | ({} if right else wrong)
        header = Header(kind, **claims)
        if isinstance(body, Cookie) and right:
            body = Cookie(max(self.nonce, 0))
        if kind is T.WELCOME:
            self.welcomed.add(identity(header))
        frame = bytes(encode_control(header, body))
        (self.deliver_to_worker if to_worker else self.deliver_to_server)(frame)

    @rule(frame=st.binary(max_size=150), to_worker=st.booleans())
    def rubbish_comes(self, frame: bytes, to_worker: bool) -> None:  # noqa: FBT001
        (self.deliver_to_worker if to_worker else self.deliver_to_server)(frame)

    @rule(which=st.sampled_from(["to_server", "to_worker"]))
    def a_frame_is_lost(self, which: str) -> None:
        del getattr(self, which)[:1]

    @rule(keep=st.booleans())
    def the_connection_is_replaced(self, keep: bool) -> None:  # noqa: FBT001
        self.to_worker.clear()
        if not keep:
            self.to_server.clear()
        self.connect()

    @rule(lost_state=st.booleans())
    def the_server_restarts(self, lost_state: bool) -> None:  # noqa: FBT001
        if lost_state:
            self.run_id = RUNS[1]
        self.epoch += 1
        self.incarnations = 0
        self.the_connection_is_replaced(keep=True)

    @precondition(lambda self: self.server.state in OVER)
    @rule()
    def a_connection_that_is_over_is_replaced(self) -> None:
        self.the_connection_is_replaced(keep=False)

    @precondition(lambda self: self.worker.state in OVER)
    @rule(rank=st.integers(0, 2))
    def another_worker_takes_its_place(self, rank: int) -> None:
        self.worker = WorkerSession(rank=rank, plan_body=b"plan")
        self.steps["worker"] = []

    # ---- what must hold

    @invariant()
    def nobody_is_joined_without_the_three_way_join(self) -> None:
        for end, session in (("worker", self.worker), ("server", self.server)):
            if session.joined:
                assert tuple(self.steps[end]) == HANDSHAKE, end

    @invariant()
    def a_joined_worker_was_welcomed_as_who_it_is(self) -> None:
        if self.worker.joined:
            assert identity(self.worker) in self.welcomed

    @invariant()
    def a_joined_session_has_a_whole_identity(self) -> None:
        if self.server.joined:
            assert self.server.incarnation
            assert self.server.lineage is not None
            assert self.server.plan_body == b"plan"


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=300, stateful_step_count=50)

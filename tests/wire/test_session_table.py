"""Every message in every state, at both ends: taken exactly where the table has it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from psq_proto.errors import FencedError, RemoteError
from psq_proto.frames import Header, encode_control, encode_frame
from psq_proto.messages import (
    NO_SHARD,
    Bye,
    ControlBody,
    Cookie,
    Draw,
    Error,
    Fenced,
    Flags,
    Heartbeat,
    Hello,
    Join,
    Kept,
    Leave,
    MessageType,
    Range,
    Recall,
    StaleEpoch,
    Status,
    Verdict,
    Welcome,
    from_worker,
)
from psq_proto.session import TRANSITIONS, ServerSession, State, WorkerSession
from psq_proto.transitions import OVER

T = MessageType
NONCE = 5
WELCOME = Welcome("continue", -1, 10.0, init_wanted=False, world_size=2, has_weights=True)
BODIES: dict[MessageType, ControlBody | bytes] = {
    T.HELLO: Hello(NONCE),
    T.PLAN: b"plan",
    T.JOIN: Join(1),
    T.INIT: b"four",
    T.PUSH: b"",
    T.PULL: b"",
    T.HEARTBEAT: Heartbeat(),
    T.LEAVE: Leave("done"),
    T.CKPT_OK: Kept(7),
    T.DRAW: Draw(0, 0, 10, 2, 0),
    T.RANGE: Range(0, "drawn", 0, ((0, 2),), 10),
    T.RECALL: Recall((0,)),
    T.AGAIN: b"bits",
    T.CKPT: b"",
    T.COOKIE: Cookie(NONCE),
    T.WELCOME: WELCOME,
    T.VERDICT: Verdict("applied"),
    T.WEIGHTS: b"bits",
    T.FENCED: Fenced(),
    T.STALE_EPOCH: StaleEpoch(),
    T.STATUS: Status(0, 0),
    T.ERROR: Error("wire"),
    T.BYE: Bye("done"),
    T.PROBE: b"",
    T.ECHO: b"",
    T.JOB: b"plan",
}
PATH = (T.HELLO, T.COOKIE, T.PLAN, T.JOIN, T.WELCOME, T.LEAVE)
STATES = (State.IDLE, State.GREETED, State.COOKIED, State.PLANNED, State.JOINING, State.JOINED)
DEPTH = {state: depth for depth, state in enumerate((*STATES, State.LEAVING))}


def brought_to(state: State) -> tuple[WorkerSession, ServerSession]:
    """Both sessions in this state, by legal means."""
    worker = WorkerSession(rank=1, plan_body=b"plan")
    server = ServerSession(run_id=b"r" * 16, epoch=3)
    end = {State.FENCED: T.FENCED, State.CLOSED: T.BYE}.get(state)
    steps = (*PATH[:5], end) if end else PATH[: DEPTH[state]]
    for kind in steps:
        if from_worker(kind):
            server.receive(worker.send(kind, BODIES[kind]))
            continue
        frame = server.send_cookie(9) if kind is T.COOKIE else server.send(kind, BODIES[kind])
        try:
            worker.receive(frame)
        except FencedError:
            assert kind is T.FENCED
    assert (worker.state, server.state) == (state, state)
    return worker, server


def forged(kind: MessageType, end: WorkerSession | ServerSession) -> bytearray:
    """A frame of this type that claims all the right things."""
    names = ("run_id", "epoch", "incarnation", "rank", "plan")
    fields = {name: getattr(end, name) for name in names}
    if kind is T.COOKIE:
        fields |= {"run_id": b"r" * 16, "epoch": 3, "incarnation": 10}
    if kind in (T.PLAN, T.JOB):
        fields["plan"] = WorkerSession(rank=0, plan_body=b"plan").plan
    if kind is T.PUSH:
        fields |= {"flags": Flags.SKIP, "shard": NO_SHARD}
    if kind is T.WEIGHTS:
        fields |= {"flags": Flags.FULL, "codec": 1}
    if kind is T.AGAIN:
        fields["codec"] = 1
    body = BODIES[kind]
    if isinstance(body, bytes):
        return encode_frame(Header(kind, **fields), body)
    return encode_control(Header(kind, **fields), body)


def outcome(receive: Callable[[], object]) -> str:
    try:
        receive()
    except RemoteError as error:
        return "fenced" if isinstance(error, FencedError) else "refused"
    return "taken"


@pytest.mark.parametrize("state", State, ids=lambda state: state.value)
@pytest.mark.parametrize(
    "kind", [kind for kind in T if from_worker(kind)], ids=lambda kind: kind.name
)
def test_a_server_takes_what_the_table_has(state: State, kind: MessageType) -> None:
    _, server = brought_to(state)
    result = outcome(lambda: server.receive(forged(kind, server)))
    if state is State.FENCED:
        assert result == "fenced"
    else:
        assert result == ("taken" if kind in TRANSITIONS[state] else "refused")
    assert server.state is (TRANSITIONS[state][kind] if result == "taken" else state)


@pytest.mark.parametrize("state", State, ids=lambda state: state.value)
@pytest.mark.parametrize(
    "kind", [kind for kind in T if not from_worker(kind)], ids=lambda kind: kind.name
)
def test_a_worker_takes_what_the_table_has(state: State, kind: MessageType) -> None:
    worker, _ = brought_to(state)
    legal = kind in TRANSITIONS[state] and state not in OVER
    if worker.incarnation == 0 and kind in (T.STALE_EPOCH, T.FENCED):
        legal = False  # they are addressed to an incarnation, and this worker has none yet
    result = outcome(lambda: worker.receive(forged(kind, worker)))
    expected = "fenced" if kind is T.FENCED else "taken"
    assert result == (expected if legal else "refused")
    if legal:
        after = State.IDLE if kind is T.STALE_EPOCH else TRANSITIONS[state][kind]
        assert worker.state is after
    else:
        assert worker.state is state


@pytest.mark.parametrize("state", State, ids=lambda state: state.value)
@pytest.mark.parametrize("kind", T, ids=lambda kind: kind.name)
def test_both_ends_may_send_what_the_table_has(state: State, kind: MessageType) -> None:
    worker, server = brought_to(state)
    for end, mine in ((worker, from_worker(kind)), (server, not from_worker(kind))):
        assert end.may_send(kind) == (mine and kind in TRANSITIONS[state])

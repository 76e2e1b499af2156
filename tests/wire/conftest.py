"""How hypothesis makes control bodies: after this, `st.from_type(Hello)` gives any legal Hello."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from psq_proto.messages import (
    MAX_POSITIONS,
    NONE,
    U32_MAX,
    U64_MAX,
    Bye,
    Cookie,
    Draw,
    Error,
    ErrorCode,
    Fenced,
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
)
from psq_proto.session import ServerSession, WorkerSession

# A deadline per example says how busy the machine is, not whether the code is right.
settings.register_profile("wire", deadline=None)
settings.load_profile("wire")

U64 = st.integers(0, U64_MAX)
U64_OR_NONE = st.integers(NONE, U64_MAX)
TEXT = st.text(st.characters(codec="utf-8"), max_size=60)
SHARDS = st.sets(st.integers(0, U32_MAX - 1), max_size=9).map(lambda some: tuple(sorted(some)))
SECONDS = st.floats(0, 1e300, allow_nan=False) | st.integers(0, 10**6)
POSITIONS = st.integers(0, MAX_POSITIONS)
SPANS = st.sets(POSITIONS, max_size=8).map(
    lambda ends: tuple(zip(sorted(ends)[::2], sorted(ends)[1::2], strict=False))
)
LEAVE_REASONS = st.sampled_from(["done", "error", "interrupted"])

STRATEGIES = {
    Hello: st.builds(
        Hello,
        nonce=U64,
        majors=st.lists(st.integers(1, 255), min_size=1, max_size=5).map(tuple),
        software=TEXT,
    ),
    Cookie: st.builds(Cookie, nonce=U64),
    Join: st.builds(
        Join, lineage=U64, last_resolved=U64_OR_NONE, pending=U64_OR_NONE, host=TEXT, pid=U64
    ),
    Welcome: st.builds(
        Welcome,
        mode=st.sampled_from(["continue", "reset"]),
        last_applied=U64_OR_NONE,
        lease_s=SECONDS,
        init_wanted=st.booleans(),
        world_size=st.integers(1, U32_MAX),
        has_weights=st.booleans(),
    ),
    Verdict: st.builds(
        Verdict, outcome=st.just("applied"), reason=TEXT, server_s=SECONDS, rejected=SHARDS
    )
    | st.builds(Verdict, outcome=st.just("rejected"), reason=TEXT, server_s=SECONDS),
    Heartbeat: st.builds(Heartbeat, have_version=U64_OR_NONE, progress=U64),
    Status: st.builds(
        Status,
        round=U64,
        version=U64,
        missing=st.lists(st.integers(0, U32_MAX - 1), max_size=9).map(tuple),
        waiting=st.lists(st.tuples(st.integers(0, U32_MAX), SECONDS), max_size=9).map(tuple),
        text=TEXT,
        resolved=U64_OR_NONE,
        clock_s=SECONDS,
    ),
    Kept: st.builds(Kept, digest=U64),
    Draw: st.builds(
        Draw,
        seq=U64,
        epoch=U64,
        size=st.integers(1, MAX_POSITIONS),
        batch=st.integers(1, U32_MAX),
        seed=U64,
    ),
    Range: st.builds(
        Range, seq=U64, state=st.just("drawn"), epoch=U64, ranges=SPANS.filter(bool), left=POSITIONS
    )
    | st.builds(
        Range, seq=U64, state=st.sampled_from(["wait", "late", "end"]), epoch=U64, left=POSITIONS
    ),
    Recall: st.builds(Recall, shards=SHARDS.filter(bool)),
    Leave: st.builds(Leave, reason=LEAVE_REASONS, text=TEXT),
    Error: st.builds(
        Error, code=st.sampled_from(ErrorCode).map(str) | TEXT, text=TEXT, fatal=st.booleans()
    ),
    Bye: st.builds(Bye, reason=TEXT, text=TEXT),
    Fenced: st.builds(Fenced, text=TEXT),
    StaleEpoch: st.builds(StaleEpoch, text=TEXT),
}
for _type, _strategy in STRATEGIES.items():
    st.register_type_strategy(_type, _strategy)

RUN_ID = bytes(range(16))
PLAN_BODY = b"a plan, as far as the wire is concerned"
WELCOME = Welcome("continue", NONE, 10.0, init_wanted=False, world_size=2, has_weights=True)


@pytest.fixture
def worker() -> WorkerSession:
    return WorkerSession(rank=1, plan_body=PLAN_BODY)


@pytest.fixture
def server() -> ServerSession:
    return ServerSession(run_id=RUN_ID, epoch=4)


@pytest.fixture
def join() -> Callable[..., None]:
    """Takes a worker and a server session through the three-way join."""

    def run(worker: WorkerSession, server: ServerSession, *, incarnation: int = 7) -> None:
        server.receive(worker.send(MessageType.HELLO, Hello(nonce=incarnation)))
        worker.receive(server.send_cookie(incarnation))
        server.receive(worker.send(MessageType.PLAN, worker.plan_body))
        server.receive(worker.send(MessageType.JOIN, Join(lineage=99)))
        worker.receive(server.send(MessageType.WELCOME, WELCOME))

    return run

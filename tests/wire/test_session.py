from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

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
    HEADER_BYTES,
    Header,
    decode_control,
    decode_frame,
    digest64,
    encode_control,
    encode_frame,
)
from psq_proto.messages import (
    NO_SHARD,
    Bye,
    ControlBody,
    Cookie,
    Error,
    Fenced,
    Flags,
    Heartbeat,
    Hello,
    Join,
    Leave,
    MessageType,
    StaleEpoch,
    Status,
    Verdict,
    Welcome,
)
from psq_proto.session import TRANSITIONS, ServerSession, State, WorkerSession

Joiner = Callable[..., None]
T = MessageType


def control(frame: bytearray | None) -> ControlBody:
    assert frame is not None
    return decode_control(decode_frame(frame))


def refuse(session: ServerSession, frame: bytearray) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        session.receive(frame)
    return caught.value


# ---- joining


def test_the_three_way_join_gives_both_ends_the_same_identity(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server, incarnation=7)
    assert (worker.state, server.state) == (State.JOINED, State.JOINED)
    for name in ("run_id", "epoch", "incarnation", "rank", "plan"):
        assert getattr(worker, name) == getattr(server, name)
    assert server.plan_body == worker.plan_body
    assert (server.lineage, server.incarnation) == (99, 7)


def test_nobody_is_joined_before_welcome(worker: WorkerSession, server: ServerSession) -> None:
    steps: list[Callable[[], object]] = [
        lambda: server.receive(worker.send(T.HELLO, Hello(1))),
        lambda: worker.receive(server.send_cookie(1)),
        lambda: server.receive(worker.send(T.PLAN, worker.plan_body)),
        lambda: server.receive(worker.send(T.JOIN, Join(1))),
    ]
    for step in steps:
        step()
        assert not worker.joined
        assert not server.joined


def test_a_hello_alone_binds_nobody(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    delayed = WorkerSession(rank=1, plan_body=b"older").send(T.HELLO, Hello(1))
    join(worker, server)
    other = ServerSession(run_id=server.run_id, epoch=server.epoch)
    other.receive(delayed)
    other.send_cookie(8)
    assert (server.state, other.state) == (State.JOINED, State.COOKIED)
    assert worker.joined
    assert other.join is None


def test_a_repeated_hello_gets_the_same_incarnation_and_a_new_one_another(
    worker: WorkerSession, server: ServerSession
) -> None:
    for nonce, offered, given in ((1, 5, 5), (1, 6, 5), (2, 7, 7)):
        server.receive(worker.send(T.HELLO, Hello(nonce)))
        assert decode_frame(server.send_cookie(offered)).header.incarnation == given


def test_an_incarnation_that_was_joined_is_not_handed_out_again(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server, incarnation=7)
    server.receive(worker.send(T.HELLO, Hello(7)))
    assert decode_frame(server.send_cookie(8)).header.incarnation == 8


def test_a_cookie_for_an_earlier_hello_is_stale(
    worker: WorkerSession, server: ServerSession
) -> None:
    server.receive(worker.send(T.HELLO, Hello(1)))
    late = server.send_cookie(1)
    server.receive(worker.send(T.HELLO, Hello(2)))
    with pytest.raises(StaleFrameError, match="answers nonce 0000000000000001"):
        worker.receive(late)
    worker.receive(server.send_cookie(2))
    assert worker.incarnation == 2


def test_a_second_cookie_is_dropped(worker: WorkerSession, server: ServerSession) -> None:
    hello = worker.send(T.HELLO, Hello(1))
    server.receive(hello)
    first = server.send_cookie(1)
    server.receive(hello)
    second = server.send_cookie(2)
    worker.receive(first)
    server.receive(worker.send(T.PLAN, worker.plan_body))
    with pytest.raises(StaleFrameError):
        worker.receive(second)
    server.receive(worker.send(T.JOIN, Join(1)))
    worker.receive(server.send(T.WELCOME, Welcome("continue", -1, 1, True, 2, False)))  # noqa: FBT003
    assert worker.joined
    assert server.joined


def test_a_worker_that_joins_again_on_its_connection_gets_a_new_incarnation(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server, incarnation=1)
    join(worker, server, incarnation=2)
    assert (worker.incarnation, server.incarnation) == (2, 2)


def test_a_server_that_shares_no_version_says_both_and_what_to_do(
    worker: WorkerSession, server: ServerSession
) -> None:
    error = refuse(server, worker.send(T.HELLO, Hello(1, majors=(2, 3), software="psq 9.1")))
    assert isinstance(error, RemoteVersionError)
    with pytest.raises(
        RemoteVersionError, match=r"psq 9.1.* version 2, 3, this server speaks 1: install"
    ):
        worker.receive(answered(server, error))
    assert (worker.state, server.state) == (State.CLOSED, State.CLOSED)


def answered(server: ServerSession, error: RemoteError) -> bytearray:
    frame = server.answer(error)
    assert frame is not None
    return frame


def test_a_version_list_that_holds_ours_is_accepted(
    worker: WorkerSession, server: ServerSession
) -> None:
    server.receive(worker.send(T.HELLO, Hello(1, majors=(3, 1))))
    assert server.state is State.GREETED


def test_a_cookie_needs_an_incarnation(worker: WorkerSession, server: ServerSession) -> None:
    server.receive(worker.send(T.HELLO, Hello(1)))
    with pytest.raises(UsageError, match="use send_cookie"):
        server.send(T.COOKIE, Cookie(1))
    with pytest.raises(UsageError, match="an incarnation is 1"):
        server.send_cookie(0)


def test_a_lineage_is_known_from_join_on(server: ServerSession) -> None:
    with pytest.raises(UsageError, match="from JOIN on"):
        _ = server.lineage


# ---- plan


def test_a_plan_whose_digest_is_not_its_headers_is_refused(
    worker: WorkerSession, server: ServerSession
) -> None:
    server.receive(worker.send(T.HELLO, Hello(1)))
    worker.receive(server.send_cookie(1))
    error = refuse(server, worker.send(T.PLAN, b"another plan"))
    assert isinstance(error, RemotePlanError)
    with pytest.raises(RemotePlanError, match=r"PLAN has digest \w{16}, its header says \w{16}"):
        worker.receive(answered(server, error))


def test_messages_that_name_another_plan_are_refused(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server)
    worker.plan += 1
    assert isinstance(refuse(server, worker.send(T.PULL)), RemotePlanError)
    with pytest.raises(RemotePlanError, match="names plan"):
        worker.receive(server.send(T.STATUS, Status(0, 0)))


# ---- before joining: the job, and the link


def cookied(worker: WorkerSession, server: ServerSession) -> None:
    server.receive(worker.send(T.HELLO, Hello(1)))
    worker.receive(server.send_cookie(4))


@pytest.mark.parametrize("plan_body", [b"", b"a guess"])
def test_a_worker_that_does_not_know_the_job_is_told_and_then_joins(
    server: ServerSession, join: Joiner, plan_body: bytes
) -> None:
    asking = WorkerSession(rank=1, plan_body=plan_body)
    cookied(asking, server)
    assert bytes(server.receive(asking.send(T.PLAN, b"")).body) == b""
    assert (server.plan, server.plan_body) == (0, b"")
    assert (asking.state, server.state) == (State.COOKIED, State.COOKIED)
    header, body = asking.receive(server.send_job(b"the job"))
    assert (header.plan, bytes(body), asking.state) == (
        *(digest64(b"the job"), b"the job"),
        State.COOKIED,
    )
    joining = WorkerSession(rank=1, plan_body=bytes(body))
    join(joining, server)
    assert joining.joined
    assert server.plan_body == b"the job"


def test_asking_again_is_no_fault_and_a_late_answer_is_dropped(server: ServerSession) -> None:
    worker = WorkerSession(rank=1, plan_body=b"")
    cookied(worker, server)
    for _ in range(3):
        server.receive(worker.send(T.PLAN, b""))
    late = server.send_job(b"the job")
    knowing = WorkerSession(rank=1, plan_body=b"the job")
    cookied(knowing, server)
    server.receive(knowing.send(T.PLAN, knowing.plan_body))
    assert server.state is State.PLANNED
    with pytest.raises(StaleFrameError):
        knowing.receive(late)
    assert knowing.state is State.PLANNED
    with pytest.raises(UsageError, match="a server that is planned may send"):
        server.send_job(b"the job")


def test_a_job_is_sent_by_send_job_alone(worker: WorkerSession, server: ServerSession) -> None:
    cookied(worker, server)
    with pytest.raises(UsageError, match="use send_job"):
        server.send(T.JOB, b"the job")


def test_a_job_whose_digest_is_not_its_headers_is_refused(
    worker: WorkerSession, server: ServerSession
) -> None:
    cookied(worker, server)
    claims = {name: getattr(worker, name) for name in ("run_id", "epoch", "incarnation", "rank")}
    lie = encode_frame(Header(T.JOB, plan=digest64(b"another job"), **claims), b"the job")
    with pytest.raises(RemotePlanError, match="which its body is not"):
        worker.receive(lie)
    assert worker.state is State.COOKIED


def test_a_join_without_a_plan_is_refused_even_after_asking_for_one(server: ServerSession) -> None:
    worker = WorkerSession(rank=1, plan_body=b"")
    cookied(worker, server)
    server.receive(worker.send(T.PLAN, b""))
    with pytest.raises(UsageError, match="a worker that is cookied may send"):
        worker.send(T.JOIN, Join(1))
    claims = {name: getattr(server, name) for name in ("run_id", "epoch", "incarnation", "rank")}
    forged = encode_control(Header(T.JOIN, **claims), Join(1))
    assert isinstance(refuse(server, forged), RemoteProtocolError)
    assert server.join is None


def test_a_worker_whose_plan_was_damaged_on_the_way_joins_again(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    cookied(worker, server)
    damaged = bytearray(worker.send(T.PLAN, worker.plan_body))
    damaged[-1] ^= 1
    assert isinstance(refuse(server, damaged), RemoteWireError)
    worker.receive(server.answer(refuse(server, worker.send(T.JOIN, Join(1)))))
    assert worker.state is State.IDLE
    join(worker, server)
    assert worker.joined


def test_both_ends_have_the_same_name_for_a_residual_that_begins_with_a_conversation(
    worker: WorkerSession, server: ServerSession
) -> None:
    cookied(worker, server)
    assert worker.fresh_lineage == server.fresh_lineage == (server.epoch << 32) + 4


@pytest.mark.parametrize("back", [0, 2, 5])
def test_a_probe_comes_back_as_far_as_it_asked(
    worker: WorkerSession, server: ServerSession, back: int
) -> None:
    cookied(worker, server)
    probe = server.receive(worker.send(T.PROBE, b"12345", part=back, seq=8))
    header, body = worker.receive(server.send_echo(probe))
    assert (header.type, header.seq, header.part) == (T.ECHO, 8, 0)
    assert body == b"12345"[:back]
    assert (worker.state, server.state) == (State.COOKIED, State.COOKIED)


def test_a_joined_worker_may_measure_too_and_one_that_leaves_may_not(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server)
    probe = server.receive(worker.send(T.PROBE))
    assert worker.receive(server.send_echo(probe)).body == b""
    late = server.send_echo(probe)
    worker.send(T.LEAVE, Leave("done"))
    with pytest.raises(UsageError, match="leaving may send"):
        worker.send(T.PROBE)
    with pytest.raises(StaleFrameError):
        worker.receive(late)


def test_nobody_measures_the_link_before_the_cookie(
    worker: WorkerSession, server: ServerSession
) -> None:
    server.receive(worker.send(T.HELLO, Hello(1)))
    probe = encode_frame(Header(T.PROBE, rank=1, part=4), b"1234")
    assert isinstance(refuse(server, probe), StaleFrameError)


def test_only_a_probe_is_echoed(worker: WorkerSession, server: ServerSession) -> None:
    hello = server.receive(worker.send(T.HELLO, Hello(1)))
    with pytest.raises(UsageError, match="only a PROBE has an ECHO, not HELLO"):
        server.send_echo(hello)


def test_a_plan_sealed_in_place_counts_as_one(worker: WorkerSession, server: ServerSession) -> None:
    cookied(worker, server)
    frame = bytearray(HEADER_BYTES) + worker.plan_body
    worker.seal(frame, T.PLAN)
    server.receive(frame)
    assert (worker.state, server.state) == (State.PLANNED, State.PLANNED)


def test_a_refused_plan_reaches_the_worker_with_its_text(
    worker: WorkerSession, server: ServerSession
) -> None:
    server.receive(worker.send(T.HELLO, Hello(1)))
    worker.receive(server.send_cookie(1))
    server.receive(worker.send(T.PLAN, worker.plan_body))
    frame = answered(server, RemotePlanError("tensor 3: the job has 'a' [2], it says 'a' [3]"))
    with pytest.raises(RemotePlanError, match="tensor 3"):
        worker.receive(frame)
    assert not worker.may_send(T.JOIN)


# ---- rounds


def test_a_round_goes_there_and_back(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server)
    push = bytearray(HEADER_BYTES) + b"payload"
    worker.seal(push, T.PUSH, codec=257, shard=2, seq=5, round=5, version=5, rate=1e-3)
    header, body = server.receive(push)
    assert (header.shard, header.seq, header.rate, header.incarnation) == (2, 5, 1e-3, 7)
    assert isinstance(body, memoryview)
    assert body == b"payload"
    verdict = server.send(T.VERDICT, Verdict("applied"), seq=5, round=5, version=6)
    assert worker.receive(verdict).body == Verdict("applied")
    weights = server.send(T.WEIGHTS, b"delta", codec=257, shard=2, version=6, flags=Flags.DELTA)
    assert worker.receive(weights).body == b"delta"


def test_a_rank_that_sits_a_round_out_says_skip(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server)
    skip = worker.send(T.PUSH, flags=Flags.SKIP, shard=NO_SHARD, seq=5, round=5)
    assert server.receive(skip).header.flags == Flags.SKIP


def test_a_rank_may_sit_out_one_shard(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server)
    header, _ = server.receive(worker.send(T.PUSH, flags=Flags.SKIP, shard=3, seq=5, round=5))
    assert (header.flags, header.shard) == (Flags.SKIP, 3)


def test_a_verdict_names_the_shards_that_do_not_count(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server)
    verdict = Verdict("applied", "shard 3: a scale is NaN", 0.5, (3, 9))
    assert worker.receive(server.send(T.VERDICT, verdict, seq=5)).body == verdict


def test_one_weights_frame_serves_every_worker(join: Joiner, server: ServerSession) -> None:
    workers = [WorkerSession(rank=rank, plan_body=b"plan") for rank in range(3)]
    for rank, worker in enumerate(workers):
        session = ServerSession(run_id=server.run_id, epoch=server.epoch)
        join(worker, session, incarnation=rank + 1)
    frame = session.send(T.WEIGHTS, b"bits", codec=1, version=1, flags=Flags.FULL)
    assert [worker.receive(frame).body for worker in workers] == [b"bits"] * 3


def test_a_worker_hears_the_end_of_its_last_round_after_it_left(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server)
    server.receive(worker.send(T.LEAVE, Leave("done")))
    worker.receive(server.send(T.VERDICT, Verdict("applied")))
    server.receive(worker.send(T.HEARTBEAT, Heartbeat()))
    assert worker.receive(server.send(T.BYE, Bye("done"))).body == Bye("done")
    assert (worker.state, server.state) == (State.CLOSED, State.CLOSED)
    assert server.answer(refuse(server, encode_control(Header(T.LEAVE), Leave("done")))) is None


# ---- who may say what


@pytest.mark.parametrize("kind", [T.PLAN, T.JOIN, T.PUSH, T.PULL, T.HEARTBEAT, T.LEAVE, T.COOKIE])
def test_an_idle_worker_may_only_say_hello(worker: WorkerSession, kind: MessageType) -> None:
    assert not worker.may_send(kind)
    with pytest.raises(UsageError, match=f"a worker that is idle may send HELLO, not {kind.name}"):
        worker.send(kind, b"")


def test_an_illegal_or_impossible_send_changes_nothing(
    worker: WorkerSession, server: ServerSession
) -> None:
    with pytest.raises(UsageError, match="HELLO takes Hello"):
        worker.send(T.HELLO, Cookie(1))
    assert worker.state is State.IDLE
    with pytest.raises(UsageError, match="a server that is idle may send"):
        server.send(T.WELCOME, Welcome("reset", 0, 1, False, 1, False))  # noqa: FBT003
    assert server.state is State.IDLE


@pytest.mark.parametrize("kind", [T.JOIN, T.LEAVE, T.PUSH, T.HEARTBEAT])
def test_a_message_out_of_turn_is_refused(
    worker: WorkerSession, server: ServerSession, kind: MessageType
) -> None:
    server.receive(worker.send(T.HELLO, Hello(1)))
    worker.receive(server.send_cookie(1))
    worker.state = State.PLANNED if kind is T.JOIN else State.JOINED
    server.plan = worker.plan
    bodies: dict[MessageType, Any] = {
        T.JOIN: Join(1),
        T.LEAVE: Leave("done"),
        T.PUSH: b"x",
        T.HEARTBEAT: Heartbeat(),
    }
    codec = 1 if kind is T.PUSH else 0
    error = refuse(server, worker.send(kind, bodies[kind], codec=codec))
    assert type(error) is RemoteProtocolError
    assert f"{kind.name} of rank 1 incarnation 1 of epoch 4 came while this end is cookied" in str(
        error
    )
    with pytest.raises(RemoteProtocolError):
        worker.receive(answered(server, error))


def test_a_message_from_the_wrong_role_is_refused(
    worker: WorkerSession, server: ServerSession
) -> None:
    with pytest.raises(RemoteProtocolError, match="only workers send it"):
        worker.receive(encode_control(Header(T.HELLO), Hello(1)))
    with pytest.raises(RemoteProtocolError, match="only servers send it"):
        server.receive(encode_control(Header(T.BYE), Bye("x")))


def test_a_rank_other_than_the_one_that_joined_is_refused(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server)
    worker.rank = 0
    assert "said HELLO as rank 1" in str(refuse(server, worker.send(T.PULL)))


def test_a_damaged_frame_is_answered_without_ending_anything(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server)
    push = worker.send(T.PUSH, b"payload", codec=1)
    push[-1] ^= 1
    error = refuse(server, push)
    assert isinstance(error, RemoteWireError)
    reply = worker.receive(answered(server, error)).body
    assert isinstance(reply, Error)
    assert (reply.code, reply.fatal) == ("wire", False)
    assert worker.joined
    assert server.joined


@pytest.mark.parametrize(
    ("code", "raised"),
    [
        ("version", RemoteVersionError),
        ("plan", RemotePlanError),
        ("payload", RemotePayloadError),
        ("wire", RemoteProtocolError),
        ("protocol", RemoteProtocolError),
        ("rank", RefusedError),
        ("a code of the future", RefusedError),
    ],
)
def test_a_fatal_error_raises_what_its_code_says(
    worker: WorkerSession, server: ServerSession, join: Joiner, code: str, raised: type[Exception]
) -> None:
    join(worker, server)
    with pytest.raises(raised, match=f"refused this worker .{code}.: because"):
        worker.receive(server.send(T.ERROR, Error(code, "because", fatal=True)))
    assert (worker.state, server.state) == (State.CLOSED, State.CLOSED)


@pytest.mark.parametrize(
    ("error", "code", "fatal"),
    [
        (RemoteVersionError("x"), "version", True),
        (RemotePlanError("x"), "plan", True),
        (RefusedError("x"), "refused", True),
        (RemoteWireError("x"), "wire", False),
        (RemotePayloadError("x"), "payload", False),
        (RemoteProtocolError("x"), "protocol", True),
        (RemoteError("é" * 4096), "protocol", True),
    ],
)
def test_every_remote_error_has_an_answer(
    server: ServerSession,
    error: RemoteError,
    code: str,
    fatal: bool,  # noqa: FBT001
) -> None:
    reply = control(server.answer(error))
    assert isinstance(reply, Error)
    assert (reply.code, reply.fatal) == (code, fatal)


# ---- staleness and fencing


def test_a_worker_whose_connection_was_replaced_joins_again(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server, incarnation=1)
    fresh = ServerSession(run_id=server.run_id, epoch=server.epoch)
    error = refuse(fresh, worker.send(T.HEARTBEAT, Heartbeat()))
    assert "has not joined on this connection" in str(error)
    assert isinstance(worker.receive(answered(fresh, error)).body, StaleEpoch)
    assert (worker.state, fresh.state) == (State.IDLE, State.IDLE)
    join(worker, fresh, incarnation=2)
    assert worker.incarnation == fresh.incarnation == 2


def test_many_stale_frames_make_a_worker_join_again_once(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server, incarnation=1)
    fresh = ServerSession(run_id=server.run_id, epoch=server.epoch)
    replies = [answered(fresh, refuse(fresh, worker.send(T.PULL))) for _ in range(3)]
    worker.receive(replies[0])
    hello = worker.send(T.HELLO, Hello(5))
    for late in replies[1:]:
        with pytest.raises(StaleFrameError):
            worker.receive(late)
    fresh.receive(hello)
    worker.receive(fresh.send_cookie(2))
    with pytest.raises(StaleFrameError):
        worker.receive(replies[2])
    assert worker.state is State.COOKIED


def test_a_server_of_the_next_epoch_tells_its_old_workers(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server)
    restarted = ServerSession(run_id=server.run_id, epoch=server.epoch + 1)
    worker.receive(answered(restarted, refuse(restarted, worker.send(T.PULL))))
    join(worker, restarted, incarnation=1)
    assert worker.epoch == server.epoch + 1


def test_frames_of_an_earlier_incarnation_are_stale_on_the_same_connection(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server, incarnation=1)
    late = worker.send(T.PULL)
    join(worker, server, incarnation=2)
    error = refuse(server, late)
    assert isinstance(error, StaleFrameError)
    assert error.incarnation == 1
    with pytest.raises(StaleFrameError):
        worker.receive(answered(server, error))
    assert worker.joined
    assert server.joined


def test_what_the_server_had_under_way_when_a_worker_rejoins_is_dropped(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server, incarnation=1)
    late = [
        server.send(T.WEIGHTS, b"x", codec=1, flags=Flags.FULL),
        server.send(T.VERDICT, Verdict("applied")),
        server.send(T.FENCED, Fenced()),
    ]
    worker.send(T.HELLO, Hello(9))
    for frame in late:
        with pytest.raises(StaleFrameError):
            worker.receive(frame)
    assert worker.state is State.GREETED


def test_a_server_that_lost_its_state_is_not_joined_again(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server)
    other = ServerSession(run_id=bytes(15) + b"\x01", epoch=1)
    worker.receive(answered(other, refuse(other, worker.send(T.PULL))))
    other.receive(worker.send(T.HELLO, Hello(3)))
    with pytest.raises(
        RemoteProtocolError, match="came back without its state; start the job again"
    ):
        worker.receive(other.send_cookie(1))
    assert worker.state is State.CLOSED


def test_a_server_that_went_back_in_time_is_not_joined_again(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server)
    older = ServerSession(run_id=server.run_id, epoch=server.epoch - 1)
    worker.receive(answered(older, refuse(older, worker.send(T.PULL))))
    older.receive(worker.send(T.HELLO, Hello(3)))
    with pytest.raises(RemoteProtocolError, match=r"has seen epoch 4: .* older state"):
        worker.receive(older.send_cookie(1))


@pytest.mark.parametrize("fields", [{"incarnation": 0}, {"run_id": bytes(16)}])
def test_a_cookie_without_an_identity_is_refused(
    worker: WorkerSession, fields: dict[str, Any]
) -> None:
    worker.send(T.HELLO, Hello(1))
    identity: dict[str, Any] = {"run_id": b"r" * 16, "epoch": 1, "incarnation": 1, "rank": 1}
    with pytest.raises(RemoteProtocolError, match="must hand out an incarnation"):
        worker.receive(encode_control(Header(T.COOKIE, **(identity | fields)), Cookie(1)))


def test_a_fenced_worker_hears_so_and_says_no_more(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server)
    with pytest.raises(FencedError, match="another process holds rank 1 now: pid 5 on host h"):
        worker.receive(server.send(T.FENCED, Fenced("pid 5 on host h")))
    assert (worker.state, server.state) == (State.FENCED, State.FENCED)
    with pytest.raises(UsageError, match="a worker that is fenced may send nothing, not HELLO"):
        worker.send(T.HELLO, Hello(2))


def test_a_fenced_connection_is_answered_with_fenced_whatever_it_says(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server)
    server.send(T.FENCED, Fenced())
    for frame in (worker.send(T.PULL), worker.send(T.HELLO, Hello(2)), bytearray(b"rubbish")):
        error = refuse(server, frame)
        assert isinstance(control(server.answer(error)), Fenced)
    assert server.state is State.FENCED


def test_a_fence_for_another_incarnation_is_stale(
    worker: WorkerSession, server: ServerSession, join: Joiner
) -> None:
    join(worker, server, incarnation=1)
    fenced = server.send(T.FENCED, Fenced())
    other = ServerSession(run_id=server.run_id, epoch=server.epoch)
    join(worker, other, incarnation=2)
    with pytest.raises(StaleFrameError):
        worker.receive(fenced)
    assert worker.joined


# ---- the table


def test_the_table_has_a_row_for_every_state_and_nothing_leads_out_of_closed() -> None:
    assert set(TRANSITIONS) == set(State)
    assert TRANSITIONS[State.CLOSED] == {}
    assert set(TRANSITIONS[State.FENCED].values()) == {State.FENCED, State.CLOSED}


def test_the_only_way_into_joined_is_welcome() -> None:
    ways = {
        (state, kind)
        for state, row in TRANSITIONS.items()
        for kind, after in row.items()
        if after is State.JOINED and state is not State.JOINED
    }
    assert ways == {(State.JOINING, T.WELCOME)}

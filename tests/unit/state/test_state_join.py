from __future__ import annotations

import pytest

from psq import plan as plans
from psq.errors import FencedError, RefusedError, RemotePlanError, RemoteVersionError
from psq.presets import preset
from psq_proto.frames import digest64
from psq_proto.messages import (
    NONE,
    U32_MAX,
    Cookie,
    Error,
    Heartbeat,
    Hello,
    Join,
    MessageType,
    StaleEpoch,
    Status,
    Verdict,
    Welcome,
)
from psq_proto.session import WorkerSession
from psq_server.state import Adopt, Send


def test_a_join_takes_three_messages_and_ends_in_welcome(cluster):
    job = cluster()
    worker = job.connect(0)
    worker.hello()
    assert worker.take(Cookie)
    assert not job.world.members, "a HELLO binds nobody"
    worker.send(MessageType.PLAN, worker.plan.body)
    worker.send(MessageType.JOIN, Join(7))
    (welcome,) = worker.take(Welcome)
    assert welcome == Welcome(
        "continue", NONE, lease_s=10.0, init_wanted=True, world_size=2, has_weights=False
    )
    assert worker.session.joined


def test_the_first_join_makes_its_plan_the_job(cluster):
    job = cluster()
    job.connect(1).join()
    (adopt,) = job.of(Adopt)
    assert adopt.plan == job.plan


def test_only_rank_0_is_asked_for_initial_weights(cluster):
    job = cluster()
    second = job.connect(1).join()
    first = job.connect(0).join()
    assert [w.take(Welcome)[0].init_wanted for w in (first, second)] == [True, False]


def test_a_repeated_hello_gets_the_same_incarnation_again(cluster):
    job = cluster()
    worker = job.connect(0)
    worker.hello(nonce=5)
    before = worker.session.incarnation
    worker.hello(nonce=5)
    assert worker.session.incarnation == before


def test_incarnations_grow(cluster):
    job = cluster()
    first, second = job.connect(0).join(), job.connect(1).join()
    assert second.session.incarnation > first.session.incarnation


def test_a_server_that_ran_out_of_incarnations_says_so(cluster):
    job = cluster()
    job.world.incarnation = U32_MAX
    worker = job.connect(0)
    worker.hello()
    assert "no incarnation left" in str(worker.errors[0])


def test_a_rank_beyond_the_world_size_is_refused_at_hello(cluster):
    for job in (cluster(), cluster(world_size=2)):
        if job.world.world_size is None:
            job.connect(0).join()
        stranger = job.connect(2)
        stranger.hello()
        (error,) = stranger.errors
        assert isinstance(error, RefusedError)
        assert "rank 2 does not exist: this job has ranks 0..1" in str(error)


def test_a_rank_beyond_its_own_plan_is_refused_at_join(cluster):
    job = cluster()
    stranger = job.connect(5).join()
    (error,) = stranger.errors
    assert isinstance(error, RefusedError)
    assert "ranks 0..1" in str(error)
    assert not job.of(Adopt), "a job is not defined by somebody who is not in it"


def test_another_plan_is_refused_and_the_first_difference_named(cluster, plan_of):
    job = cluster()
    job.connect(0).join()
    other = job.connect(1, plan_of(specs=[("big", (1 << 20,)), ("little", (10,))])).join()
    (error,) = other.errors
    assert isinstance(error, RemotePlanError)
    assert "'small' [10]" in str(error)
    assert "'little' [10]" in str(error)


def test_another_recipe_is_refused_by_name(cluster, plan_of):
    job = cluster()
    job.connect(0).join()
    other = job.connect(1, plan_of(recipe=preset("fp32"))).join()
    (error,) = other.errors
    assert "recipe" in str(error)


def test_two_plans_offered_before_any_join_make_one_job(cluster, plan_of):
    job = cluster()
    first = job.connect(0)
    second = job.connect(1, plan_of(specs=[("other", (3,))]))
    for worker in (first, second):
        worker.hello()
        worker.send(MessageType.PLAN, worker.plan.body)
    second.send(MessageType.JOIN, Join(1))
    first.send(MessageType.JOIN, Join(1))
    assert second.session.joined
    assert isinstance(first.errors[0], RemotePlanError)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"recipe": "fp32"}, "recipe: this server was started for 'fp32'"),
        ({"world_size": 3}, "world_size: this server was started for 3 workers, the plan says 2"),
        ({"memory_bytes": 1 << 20}, "a model of 1048586 values takes 0.0 GiB on the server"),
        ({"disk_bytes": 4_194_343}, "take 4194344 bytes, and the server's disk had 4194343 left"),
    ],
)
def test_a_plan_that_this_server_was_not_started_for_is_refused(cluster, settings, words):
    job = cluster(**settings)
    worker = job.connect(0).join()
    (error,) = worker.errors
    assert isinstance(error, RemotePlanError)
    assert words in str(error)


def test_a_plan_that_is_no_plan_is_refused(cluster):
    job = cluster()
    worker = job.connect(0)
    worker.hello()
    body = b"\x81\xa1a\x01"
    worker.session.plan = digest64(body)
    worker.send(MessageType.PLAN, body)
    assert isinstance(worker.errors[0], RemotePlanError)


def test_another_protocol_version_is_refused_in_words(cluster):
    job = cluster()
    worker = job.connect(0)
    worker.send(MessageType.HELLO, Hello(1, majors=(2, 3), software="psq 9"))
    (error,) = worker.errors
    assert isinstance(error, RemoteVersionError)
    assert "psq 9" in str(error)
    assert "speaks protocol version 2, 3" in str(error)


def test_a_newer_process_takes_the_rank_over_and_the_older_one_is_fenced(cluster):
    job = cluster()
    old = job.connect(0).join(lineage=1)
    new = job.connect(0).join(lineage=2)
    assert isinstance(old.errors[0], FencedError)
    assert job.world.members[0].peer == new.name
    assert job.state.counts.fenced == 1


def test_a_fenced_process_hears_it_again_when_it_speaks(cluster):
    job = cluster()
    old = job.connect(0).join()
    frame = old.session.send(MessageType.PULL, version=0)
    job.connect(0).join()
    old.errors.clear()
    answer = job.frame(old.name, frame)
    assert any(isinstance(a, Send) and a.peer == old.name for a in answer)


def test_a_delayed_join_of_an_older_incarnation_does_not_fence_the_newer_one(cluster):
    job = cluster()
    slow, fast = job.connect(0), job.connect(0)
    slow.hello()
    slow.send(MessageType.PLAN, slow.plan.body)
    fast.join()
    slow.send(MessageType.JOIN, Join(1))
    assert isinstance(slow.errors[0], FencedError)
    assert not fast.errors
    assert job.world.members[0].peer == fast.name


def test_a_worker_may_join_again_on_the_same_connection_without_being_fenced(cluster):
    job = cluster()
    worker = job.connect(0).join(lineage=4)
    worker.join(lineage=4)
    assert not worker.errors
    assert worker.session.joined
    assert job.state.counts.fenced == 0


def test_frames_of_a_connection_that_has_not_joined_are_answered_with_stale_epoch(cluster):
    job = cluster()
    worker = job.started()[0]
    moved = job.connect(0)
    moved.session = worker.session
    moved.send(MessageType.HEARTBEAT, Heartbeat(0))
    assert moved.take(StaleEpoch)
    assert job.world.members[0].peer == worker.name


def test_staged_shards_survive_a_rejoin_of_the_same_lineage_with_that_round_pending(cluster):
    job = cluster()
    worker, _ = job.started()
    worker.push(0)
    again = job.connect(0).join(lineage=10, pending=0)
    assert again.take(Welcome)[0].mode == "continue"
    assert again.beat(0).missing == (1,)


@pytest.mark.parametrize("claim", [{"lineage": 10}, {"lineage": 99}, {"lineage": 99, "pending": 0}])
def test_staged_shards_are_dropped_when_the_joiner_does_not_claim_them(cluster, claim):
    job = cluster()
    worker, _ = job.started()
    worker.push(0)
    again = job.connect(0).join(**claim)
    assert again.beat(0).missing == (0, 1)
    assert job.logged("dropped") == [{"rank": 0, "round": 0}]


def test_a_residual_that_knows_the_last_applied_seq_continues(cluster):
    job = cluster()
    first, second = job.started()
    first.push_all()
    second.push_all()
    again = job.connect(0).join(lineage=10, last_resolved=-1, pending=0)
    (welcome,) = again.take(Welcome)
    assert (welcome.mode, welcome.last_applied) == ("continue", 0)


@pytest.mark.parametrize(
    ("claim", "mode"),
    [
        ({"lineage": 10, "last_resolved": 0}, "continue"),
        ({"lineage": 10, "last_resolved": -1}, "reset"),
        ({"lineage": 11, "last_resolved": 0}, "reset"),
        ({"lineage": 12}, "continue"),
    ],
)
def test_a_residual_that_is_not_of_this_history_is_reset(cluster, claim, mode):
    job = cluster()
    for worker in job.started():
        worker.push_all()
    (welcome,) = job.connect(0).join(**claim).take(Welcome)
    assert welcome.mode == mode
    assert job.state.counts.resets == (mode == "reset")


def test_after_a_reset_the_next_join_of_the_same_process_continues(cluster):
    job = cluster()
    for worker in job.started():
        worker.push_all()
    claim = {"lineage": 99, "last_resolved": 0}
    reset = job.connect(0).join(**claim)
    assert reset.take(Welcome)[0].mode == "reset"
    claim["lineage"] = reset.session.fresh_lineage
    assert job.connect(0).join(**claim).take(Welcome)[0].mode == "continue"


def test_after_a_reset_another_process_does_not_continue_in_its_place(cluster):
    job = cluster()
    for worker in job.started():
        worker.push_all()
    claim = {"lineage": 99, "last_resolved": 0}
    assert job.connect(0).join(**claim).take(Welcome)[0].mode == "reset"
    assert job.connect(0).join(**claim | {"lineage": 98}).take(Welcome)[0].mode == "reset"
    assert job.connect(0).join(**claim).take(Welcome)[0].mode == "reset"


def test_a_process_that_began_after_a_reset_is_not_held_to_what_was_said_before(cluster):
    job = cluster()
    first, second = job.started()
    for worker in (first, second):
        worker.push_all()
    again = job.connect(1).join(lineage=99, last_resolved=0)
    assert again.take(Welcome)[0].mode == "reset"
    first.push(0)
    again.push(0, variant=1)  # counts at once
    fresh = job.connect(1).join(lineage=50)
    fresh.push(0, variant=2)
    fresh.push(1)
    first.push(1)
    assert not fresh.errors
    assert [body.rejected for body in fresh.take(Verdict)] == [(0,)]


def test_strangers_are_bounded_and_the_oldest_is_forgotten(cluster):
    job = cluster()
    for _ in range(300):
        job.connect(0).hello()
    assert len(job.world.peers) == 256


def test_silent_strangers_are_forgotten(cluster):
    job = cluster()
    job.connect(0).hello()
    job.tick(31)
    assert len(job.world.peers) == 0


def test_offered_plans_are_bounded(cluster, plan_of):
    job = cluster()
    workers = [job.connect(0, plan_of(specs=[(f"w{i}", (3,))])) for i in range(9)]
    for worker in workers:
        worker.hello()
        worker.send(MessageType.PLAN, worker.plan.body)
    assert len(job.world.offers) == 8
    workers[0].send(MessageType.JOIN, Join(1))
    assert "join again" in str(workers[0].errors[0])


def test_garbage_from_a_stranger_is_answered_a_few_times_and_then_only_counted(cluster):
    job = cluster()
    name = b"who"
    answers = [len([a for a in job.frame(name, b"junk") if isinstance(a, Send)]) for _ in range(20)]
    assert sum(answers) == 8
    assert job.state.counts.refused["RemoteWireError"] == 20


def test_garbage_from_a_joined_worker_leaves_it_joined(cluster):
    job = cluster()
    worker, _ = job.started()
    job.frame(worker.name, b"PSQW" + bytes(200))
    (error,) = worker.take(Error)
    assert error.code == "wire"
    assert not error.fatal
    assert isinstance(worker.beat(0), Status)


def test_another_plan_is_refused_without_being_cut(cluster, plan_of, monkeypatch):
    """A plan of 400 bytes can ask for 65,536 shards: the job that runs must not wait for that."""
    job = cluster()
    job.started()
    cuts = []
    monkeypatch.setattr(plans, "_cut", cuts.append)
    worker = job.connect(1, plan_of(specs=[("huge", (1 << 36,))]))
    worker.join()
    assert "brings another plan: tensor 0" in str(worker.errors[0])
    assert not cuts


# ---- what is the job?


def wish(job, rank=1):
    """A connection that asks for the job's plan."""
    worker = job.connect(rank)
    worker.session = WorkerSession(rank=rank, plan_body=b"")
    worker.hello()
    worker.send(MessageType.PLAN)
    return worker


def jobs(worker):
    return [bytes(m.body) for m in worker.heard if m.header.type is MessageType.JOB]


def test_who_asks_for_the_job_gets_its_plan(cluster):
    job = cluster()
    job.connect(0).join()
    assert jobs(wish(job)) == [job.plan.body]


def test_who_asks_before_there_is_a_job_gets_it_once_when_there_is_one(cluster):
    job = cluster()
    early = wish(job)
    early.send(MessageType.PLAN)
    assert jobs(early) == []
    job.connect(0).join()
    assert jobs(early) == [job.plan.body]


def test_who_asked_for_the_job_and_joined_meanwhile_is_not_told_any_more(cluster):
    job = cluster()
    early = wish(job)
    early.session = WorkerSession(rank=1, plan_body=job.plan.body)
    early.join()
    assert jobs(early) == []
    assert not early.errors


def test_what_strangers_hear_is_marked_as_theirs(cluster):
    job = cluster()
    first = job.connect(0).join()
    asks, wrong = job.connect(1), job.connect(5)
    asks.hello()
    asks.send(MessageType.PLAN, b"")
    wrong.hello()  # there is no such rank
    marks = {
        worker: [(s.early, s.stranger) for s in job.of(Send) if s.peer == worker.name]
        for worker in (first, asks, wrong)
    }
    assert marks[first] == [(True, True), (False, False)], "COOKIE, WELCOME"
    assert marks[asks] == [(True, True), (True, True)], "COOKIE, JOB"
    assert marks[wrong] == [(False, True)], "ERROR"


def test_who_begins_before_what_counts_already_begins_anew(cluster):
    job = cluster()
    first, second = job.started()
    first.push(0)
    second.push(0)  # reduced at once
    first.push(1)
    again = job.connect(1).join(lineage=11, last_resolved=-1, pending=-1)
    assert again.take(Welcome)[-1].mode == "reset", "a copy from before that would say it again"


def test_who_knows_of_what_counts_already_goes_on(cluster):
    job = cluster()
    first, second = job.started()
    first.push(0)
    second.push(0)
    again = job.connect(1).join(lineage=11, last_resolved=-1, pending=0)
    assert again.take(Welcome)[-1].mode == "continue"

from __future__ import annotations

import pytest

from psq_proto.messages import Verdict
from psq_server.state import Committed, PeerGone, Reduce


def outcomes(worker):
    return [(v.outcome, v.rejected) for v in worker.take(Verdict)]


def contributors(job):
    """How many payloads each round's first shard was reduced from."""
    return [len(a.payloads) for a in job.of(Reduce) if a.shard == 0]


def settle(job, workers, rounds=4, step_s=1.0):
    """Rounds in which everybody takes `step_s`, so that there is a deadline."""
    for _ in range(rounds):
        number = job.version
        job.now_s += step_s
        for worker in workers:
            worker.push_all(number)
            worker.take(Verdict)
    return job.version


# ---- asp


def test_without_a_bound_every_contribution_makes_a_version(cluster, plan_of):
    job = cluster(plan_of(3, consistency="asp"))
    first, second, _ = job.started()
    first.push_all()
    first.push_all()
    second.push_all(0)
    assert job.version == 3
    assert [a.staleness for a in job.of(Committed)] == [(0,), (0,), (2,)]
    assert outcomes(second) == [("applied", ())]


def test_what_was_said_of_an_older_version_is_kept_until_it_is_complete(cluster, plan_of):
    job = cluster(plan_of(2, consistency="asp"))
    first, second = job.started()
    second.push(0, 0, variant=2)
    first.push_all(variant=1)
    assert second.beat(0).missing == (1,)
    second.push(1, 0, variant=2)
    reduced = [[p[-1] for p in a.payloads] for a in job.of(Reduce)]
    assert reduced == [[1], [1], [2], [2]]
    assert job.version == 2


def test_the_verdict_names_the_version_that_took_the_contribution(cluster, plan_of):
    job = cluster(plan_of(2, consistency="asp"))
    first, second = job.started()
    first.push_all()
    second.push_all(0)
    versions = [m.header.version for m in second.heard if isinstance(m.body, Verdict)]
    assert versions == [2]
    assert job.world.members[1].base == 2


def test_the_rate_of_the_newest_base_counts(cluster, plan_of):
    job = cluster(plan_of(3, consistency="ssp:2,quorum=2"))
    first, second, third = job.started()
    job.hold_reductions = True
    for worker, rate in ((third, 0.9), (second, 0.2), (first, 0.1)):
        worker.push_all(0, rate=rate)
    assert {a.rate for a in job.held} == {0.1}, "of equals, the lowest rank's"
    third.push_all(0)
    for action in list(job.held):
        job.reduce(action)


def test_one_rank_may_not_change_its_rate_within_a_contribution(cluster, plan_of):
    job = cluster(plan_of(2, consistency="asp"))
    first, _ = job.started()
    first.push(0, rate=0.1)
    first.push(1, rate=0.2)
    assert "learning rate 0.2, but rank 0 pushes with 0.1" in str(first.errors[0])


# ---- ssp


def test_a_straggler_is_left_behind_up_to_the_bound_and_then_waited_for(cluster, plan_of):
    job = cluster(plan_of(3, consistency="ssp:2,quorum=2"))
    workers = job.started()
    start = settle(job, workers)
    for _ in range(5):
        number = job.version
        for worker in workers[:2]:
            worker.push_all(number)
        job.tick(2.0)  # past the deadline of whoever is missing
    assert job.version == start + 2, "one more, and the straggler's push would be too stale"
    workers[2].push_all(start)
    assert job.version == start + 3
    assert max(s for a in job.of(Committed) for s in a.staleness) == 2
    assert outcomes(workers[2])[-1] == ("applied", ())


def test_a_rank_that_waits_for_another_server_is_not_waited_for(cluster, plan_of):
    job = cluster(plan_of(3, consistency="ssp:2,quorum=2", servers=2).for_server(1))
    first, second, third = job.started()
    third.leave()
    first.push_all()
    second.beat()
    assert job.version == 0, "the second may yet say something"
    second.beat(held=True)
    assert job.version == 1
    assert outcomes(first) == [("applied", ())]
    second.push_all(0)
    assert outcomes(second) == [], "it is not held any more, and the first is waited for again"
    first.push_all(1)
    assert job.version == 2
    assert outcomes(first) == outcomes(second) == [("applied", ())]


def test_a_rank_that_is_held_and_lost_is_waited_for(cluster, plan_of):
    job = cluster(plan_of(2, consistency="ssp:2,quorum=2", servers=2).for_server(1))
    first, second = job.started()
    second.beat(held=True)
    job.handle(PeerGone(second.name))
    first.push_all()
    job.tick(1.0)
    assert job.version == 0, "another process will speak for it"


def test_who_started_from_the_newest_version_is_waited_for_until_the_deadline(cluster, plan_of):
    job = cluster(plan_of(3, consistency="ssp:4"))
    workers = job.started()
    start = settle(job, workers)
    job.now_s += 1.0
    for worker in workers[:2]:
        worker.push_all(start)
    assert job.version == start
    due_s = job.state.wake_s
    assert due_s == pytest.approx(job.world.round.opened_s + 1.0 * (1 + 6 * 0.02))
    job.tick(due_s - job.now_s - 0.001)
    assert job.version == start
    job.tick(0.002)
    assert job.version == start + 1
    assert contributors(job)[-1] == 2
    assert job.state.wake_s is None


def test_a_deadline_that_concerns_nobody_any_more_wakes_nobody(cluster, plan_of):
    job = cluster(plan_of(2, consistency="ssp:4"))
    first, second = job.started()
    settle(job, [first, second])
    first.push_all()
    assert job.state.wake_s is not None
    job.connect(0).join(lineage=77)
    job.tick(100.0)
    assert job.state.wake_s is None


def test_a_rank_that_was_late_is_not_waited_for_until_it_is_in_time_again(cluster, plan_of):
    job = cluster(plan_of(3, consistency="ssp:4"))
    workers = job.started()
    start = settle(job, workers)
    for number in (start, start + 1):
        for worker in workers[:2]:
            worker.push_all(number)
        job.tick(2.0 if number == start else 0.0)
    workers[2].push_all(start)
    for worker in workers[:2]:
        worker.push_all(start + 2)
    assert job.version == start + 3
    for worker in workers[:2]:
        worker.push_all(start + 3)
    assert job.version == start + 4, "it started from the newest weights, and is late as ever"
    workers[2].push_all(start + 3)
    workers[0].push_all(start + 4)
    workers[1].push_all(start + 4)
    assert job.version > start + 4
    for worker in workers[:2]:
        worker.push_all()
    assert job.state.wake_s is not None, "it was fast this time, and is waited for"


def test_before_there_are_samples_everybody_is_waited_for(cluster, plan_of):
    job = cluster(plan_of(2, consistency="ssp:4"))
    first, second = job.started()
    first.push_all()
    job.tick(100.0)
    assert (job.version, job.state.wake_s) == (0, None)
    second.push_all(0)
    assert job.version == 1


def test_a_quorum_that_is_not_there_is_waited_for_past_the_deadline(cluster, plan_of):
    job = cluster(plan_of(3, consistency="ssp:4,quorum=2"))
    workers = job.started()
    start = settle(job, workers)
    workers[0].push_all(start)
    job.tick(100.0)
    assert job.version == start
    workers[1].push_all(start)
    assert job.version == start + 1


def test_a_rank_that_left_in_trouble_is_not_waited_for_past_the_deadline(cluster, plan_of):
    job = cluster(plan_of(2, consistency="ssp:1"))
    first, second = job.started()
    settle(job, [first, second])
    second.leave("error", "out of memory")
    for _ in range(5):
        first.push_all()
        job.tick(100.0)
    assert job.version == 9


# ---- bsp with a quorum


def test_with_a_quorum_late_pushes_are_rejected_when_their_round_closes(cluster, plan_of):
    job = cluster(plan_of(3, consistency="bsp,quorum=2"))
    workers = job.started()
    start = settle(job, workers)
    job.now_s += 1.0
    for worker in workers[:2]:
        worker.push_all(start)
    workers[2].push(0, start)
    job.tick(1.0)
    assert job.version == start + 1
    ((outcome, rejected),) = outcomes(workers[2])
    assert (outcome, rejected) == ("rejected", ())
    workers[2].push(1, start)
    assert outcomes(workers[2]) == [("rejected", ())], "what comes later is told the same"
    assert job.state.counts.pushes["late"] == 2
    workers[2].push_all(start + 1)
    assert workers[2].beat(start + 1).missing == ()


def test_a_push_of_a_closed_round_that_nothing_was_heard_of_is_rejected_at_once(cluster, plan_of):
    job = cluster(plan_of(3, consistency="bsp,quorum=2"))
    workers = job.started()
    start = settle(job, workers)
    for worker in workers[:2]:
        worker.push_all(start)
    job.tick(2.0)
    workers[2].push(0, start)
    (verdict,) = workers[2].take(Verdict)
    assert verdict.outcome == "rejected"
    assert f"rank 2 pushed round {start}, which was closed without it" in verdict.reason


def test_with_a_quorum_no_shard_is_reduced_before_the_round_closes(cluster, plan_of):
    job = cluster(plan_of(2, consistency="bsp,quorum=2"))
    first, second = job.started()
    first.push(0)
    second.push_all()
    assert not job.of(Reduce)
    first.push(1)
    assert job.version == 1


# ---- while a round is being reduced


def test_what_comes_while_a_round_is_reduced_waits_for_the_next(cluster, plan_of):
    job = cluster(plan_of(2, consistency="asp"))
    job.hold_reductions = True
    first, second = job.started()
    first.push_all()
    second.push_all()
    first.push(0, 0)
    assert job.state.counts.pushes["duplicate"] == 1
    assert len(job.held) == 2
    for action in list(job.held):
        job.reduce(action)
    assert [(a.round, a.shard) for a in job.held[2:]] == [(1, 0), (1, 1)]


def test_a_process_that_takes_over_a_rank_has_no_verdict_of_its_predecessor(cluster, plan_of):
    job = cluster(plan_of(2, consistency="asp"))
    job.hold_reductions = True
    first, _ = job.started()
    first.push_all()
    again = job.connect(0).join(lineage=77)
    for action in list(job.held):
        job.reduce(action)
    assert job.version == 1
    assert outcomes(again) == []
    assert again.beat(1).resolved == -1


# ---- being told to stop within a round


def test_told_to_stop_within_a_round_it_waits_for_the_rest(cluster):
    job = cluster()
    first, second = job.started()
    for worker in (first, second):
        worker.push(0)
    job.stop()
    assert job.stop_action is None
    assert job.state.wake_s == job.now_s + 2.0
    assert job.state.snapshot(job.now_s).status == "stopping"
    first.push(1)
    second.push(1)
    assert (job.stop_action.exit_code, job.version) == (0, 1)
    assert outcomes(first) == [("applied", ())]


def test_a_round_that_does_not_end_in_time_counts_as_far_as_it_came(cluster):
    job = cluster()
    first, second = job.started()
    for worker in (first, second):
        worker.push(0)
    first.push(1)
    job.stop()
    job.tick(2.0)
    assert job.stop_action.reason == "stopped"
    assert outcomes(first) == [("applied", (1,))]
    assert job.logged("half-round") == [{"version": 0, "shards_ahead": 1}]

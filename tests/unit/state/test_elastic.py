"""Rounds that go on without ranks that are lost, and what becomes of those that come back."""

from __future__ import annotations

import pytest

from psq.presets import preset
from psq_proto.messages import Heartbeat, MessageType, Verdict, Welcome
from psq_server.state import Committed, PeerGone, Reduce, Save
from psq_server.state.elastic import RECONNECT_S

LEASE_S = 10.0
RULES = ["bsp", "bsp,quorum=2", "ssp:2", "asp"]


@pytest.fixture
def elastic(cluster, plan_of):
    """Make a job of three, with weights in everybody's hands, that goes on with `least`."""

    def make(least=1, consistency="bsp", size=3, **settings):
        plan = plan_of(size, consistency=consistency)
        job = cluster(plan, min_workers=least, lease_s=LEASE_S, **settings)
        return job, job.started()

    return make


def kill(job, worker):
    """Its process is dead, and the system has ended its connection."""
    job.handle(PeerGone(worker.name))


def beat_all(workers):
    for worker in workers:
        worker.beat(0)


def pass_s(job, seconds, alive):
    """Time passes, and these are heard."""
    for _ in range(round(seconds / 0.5)):
        beat_all(alive)
        job.tick(0.5)


def verdict(worker):
    [only] = worker.take(Verdict)
    return only


# ---- who is given up, and when


@pytest.mark.parametrize("consistency", RULES)
def test_a_killed_rank_is_given_up_soon_and_the_round_closes(elastic, consistency):
    job, (first, second, third) = elastic(consistency=consistency)
    kill(job, third)
    for worker in (first, second):
        worker.push_all(0)
    job.tick(RECONNECT_S - 0.1)
    if consistency == "bsp":
        assert job.version == 0, "its connection may come back"
    job.tick(0.2)
    assert job.version >= 1
    assert [fields["rank"] for fields in job.logged("evicted")] == [2]
    assert job.state.counts.evicted == 1
    assert job.state.snapshot(job.now_s).workers["lost"] == 1


def test_the_machine_says_when_it_has_to_look_at_a_rank_that_was_cut_off(elastic):
    job, (_, _, third) = elastic()
    assert job.state.wake_s is None
    kill(job, third)
    assert job.state.wake_s == job.now_s + RECONNECT_S
    job.now_s = job.state.wake_s
    job.tick()
    assert job.logged("evicted")
    assert job.state.wake_s is None


def test_a_silent_rank_is_given_up_after_a_lease(elastic):
    job, (first, second, third) = elastic()
    for worker in (first, second):
        worker.push_all()
    pass_s(job, LEASE_S, (first, second))
    assert job.version == 0
    pass_s(job, 0.5, (first, second))
    assert job.version == 1
    [fields] = job.logged("evicted")
    assert (fields["rank"], fields["connected"], fields["staged"]) == (2, 1, "nothing")
    assert third.take(Verdict) == []


def test_without_min_workers_everybody_is_waited_for(cluster, plan_of):
    job = cluster(plan_of(3), lease_s=LEASE_S)
    first, second, third = job.started()
    kill(job, third)
    for worker in (first, second):
        worker.push_all()
    pass_s(job, 5 * LEASE_S, (first, second))
    assert job.version == 0
    snapshot = job.state.snapshot(job.now_s)
    assert snapshot.status == "stalled"
    assert "waiting for rank 2 of 3" in snapshot.text


def test_too_few_workers_wait_and_say_so(elastic):
    job, (first, second, third) = elastic(least=2)
    kill(job, second)
    kill(job, third)
    first.push_all()
    pass_s(job, 3, [first])
    assert job.version == 0
    snapshot = job.state.snapshot(job.now_s)
    assert "ranks 1, 2 of 3" in snapshot.text
    assert "(to join: 1 there, --min-workers 2)" in snapshot.text
    newcomer = job.connect(1).join(lineage=77)
    newcomer.pull()
    newcomer.push_all()
    assert job.version == 1


def test_a_connection_that_is_made_anew_in_time_is_no_death(elastic):
    job, (first, second, third) = elastic()
    kill(job, third)
    job.tick(RECONNECT_S - 0.1)
    again = job.connect(2).join(lineage=12)
    assert again.take(Welcome)[0].mode == "continue"
    job.tick(1)
    assert not job.logged("evicted")
    for worker in (first, second):
        worker.push_all()
    assert job.version == 0, "it is needed"
    again.push_all()
    assert job.version == 1


def test_a_process_that_computes_and_has_not_seen_that_its_connection_broke_is_not_given_up(
    elastic,
):
    job, (first, second, third) = elastic()
    kill(job, third)
    for _ in range(10):
        job.tick(RECONNECT_S / 2)
        beat_all((first, second))
        # The same process over another connection: stale, but alive.
        job.frame(b"another", third.session.send(MessageType.HEARTBEAT, Heartbeat(0)))
    assert not job.logged("evicted")
    job.tick(RECONNECT_S + 0.1)
    assert job.logged("evicted"), "then it falls silent"


def test_who_leaves_frees_its_place_at_once(elastic):
    job, (first, second, third) = elastic()
    for worker in (first, second):
        worker.push_all()
    third.leave("interrupted", "SIGTERM")
    assert job.version == 1
    newcomer = job.connect(2).join(lineage=99)
    newcomer.pull()
    for worker in (first, second):
        worker.push_all()
    assert job.version == 1, "a newcomer is needed from the open round on"
    newcomer.push_all()
    assert job.version == 2


# ---- what was said before


def test_a_complete_contribution_of_a_rank_that_is_given_up_counts(elastic):
    job, (first, second, third) = elastic(consistency="bsp,quorum=3")
    third.push_all()
    kill(job, third)
    job.tick(RECONNECT_S)
    assert job.logged("evicted")[0]["staged"] == "complete"
    for worker in (first, second):
        worker.push_all()
    assert job.version == 1
    reduced = job.of(Reduce)
    assert all([one.rank for one in action.said] == [0, 1, 2] for action in reduced)
    assert job.world.members[2].last_applied == 0


@pytest.mark.parametrize("consistency", ["bsp", "bsp,quorum=3"])
def test_a_partial_one_is_freed_and_its_verdict_says_which_shards_count(elastic, consistency):
    job, (first, second, third) = elastic(consistency=consistency)
    third.push(0)
    first.push_all()
    second.push(0)  # with bsp shard 0 is reduced now
    kill(job, third)
    job.tick(RECONNECT_S)
    assert job.logged("evicted")[0]["staged"] == ("nothing" if consistency == "bsp" else "partial")
    second.push(1)
    assert job.version == 1
    by_shard = {action.shard: [one.rank for one in action.said] for action in job.of(Reduce)}
    assert by_shard[1] == [0, 1]
    assert by_shard[0] == ([0, 1, 2] if consistency == "bsp" else [0, 1])
    again = job.connect(2).join(lineage=12, last_resolved=-1, pending=0)
    again.pull()
    again.push(0, 0)
    told = verdict(again)
    expected = ("applied", (1,)) if consistency == "bsp" else ("rejected", ())
    assert (told.outcome, told.rejected) == expected


def test_a_hung_rank_that_wakes_is_told_that_it_is_late_and_takes_part_again(elastic):
    job, (first, second, third) = elastic()
    for worker in (first, second):
        worker.push_all()
    pass_s(job, LEASE_S + 1, (first, second))
    assert job.version == 1
    third.push(0, 0)  # what it was at when it was stopped
    assert job.logged("returned")[0]["rank"] == 2
    assert verdict(third).outcome == "rejected"
    third.pull(0)
    for worker in (first, second):
        worker.push_all()
    assert job.version == 1, "it is needed again"
    third.push_all()
    assert job.version == 2


def test_who_comes_amid_a_round_that_is_partly_reduced_is_needed_from_the_next(elastic):
    job, (first, second, third) = elastic()
    third.leave("interrupted")
    for worker in (first, second):
        worker.push(0)
    newcomer = job.connect(2).join(lineage=5)
    newcomer.pull()
    for worker in (first, second):
        worker.push(1)
    assert job.version == 1
    for worker in (first, second):
        worker.push_all()
    assert job.version == 1
    newcomer.push_all()
    assert job.version == 2


def test_an_evicted_rank_does_not_hold_others_to_its_old_weights(elastic):
    job, (first, second, third) = elastic(consistency="ssp:1")
    for _ in range(2):
        for worker in (first, second):
            worker.push_all()
        pass_s(job, 0.5, (first, second, third))
    held_up = job.version
    for worker in (first, second):
        worker.push_all()
    assert job.version == held_up <= 1 + 1, "one more and what the third is at could not count"
    kill(job, third)
    job.tick(RECONNECT_S)
    assert job.version > held_up


# ---- the beginning and the end


def test_places_nobody_takes_are_waited_for_a_while_and_then_not(cluster, plan_of):
    job = cluster(plan_of(3), min_workers=1, grace_s=4.0)
    first = job.connect(0).join(lineage=1)
    first.init()
    first.pull()
    first.push_all()
    pass_s(job, 3.5, [first])
    assert job.version == 0
    assert "ranks 1, 2 of 3" in job.state.snapshot(job.now_s).text
    pass_s(job, 1, [first])
    assert job.version == 1
    assert job.logged("gathered") == [{"missing": "1,2", "grace_s": 4.0}]


def test_rounds_that_need_not_all_do_not_end_the_job_before_others_had_time_to_come(
    cluster, plan_of
):
    plan = plan_of(3, recipe=preset("server-adam"), consistency="asp")
    job = cluster(plan, min_workers=1, grace_s=4.0)
    first = job.connect(0).join(lineage=1)
    first.init()
    first.pull()
    first.push_all()
    assert job.version == 1
    first.leave("done")
    pass_s(job, 3, [])
    assert job.stop_action is None, "two have not come yet"
    second = job.connect(1).join(lineage=2)
    pass_s(job, 2, [second])
    assert job.stop_action is None, "one of them has"
    assert job.logged("gathered") == [{"missing": "2", "grace_s": 4.0}]
    second.leave("done")
    assert job.stop_action.reason == "done"


def test_before_rank_0_brings_the_weights_it_is_waited_for(cluster, plan_of):
    job = cluster(plan_of(3), min_workers=1, grace_s=0.0)
    second = job.connect(1).join(lineage=1)
    pass_s(job, 3, [second])
    assert "rank 0 of 3" in job.state.snapshot(job.now_s).text


def test_the_job_ends_when_somebody_is_done_and_nobody_else_is_there(elastic):
    job, (first, second, third) = elastic()
    kill(job, third)
    first.leave("done")
    second.leave("done")
    assert job.stop_action is None, "rank 2 may come back"
    job.tick(RECONNECT_S)
    assert job.stop_action.reason == "done"
    assert "1 did not come back" in job.stop_action.text
    assert job.of(Save)


def test_the_job_does_not_end_because_everybody_was_interrupted(elastic):
    job, workers = elastic()
    for worker in workers:
        worker.leave("interrupted")
    job.tick(1)
    assert job.stop_action is None
    assert "(to join: 0 there, --min-workers 1)" in job.state.snapshot(job.now_s).text


def test_whoever_is_done_is_not_missed(elastic):
    job, (first, second, third) = elastic(least=3)
    first.leave("done")
    for worker in (second, third):
        worker.push_all()
    assert job.version == 1


# ---- what cannot be


@pytest.mark.parametrize(
    ("least", "settings", "words"),
    [
        (4, {}, "the job has 3 workers"),
        (1, {"aggregate": "trimmed-mean", "f": 1}, "fewer than 2 of 3 workers"),
        (1, {"coded": True}, "stand in for each other already"),
        (1, {"servers": 2, "consistency": "ssp:2"}, "may come to wait for each other"),
    ],
)
def test_a_job_that_cannot_run_with_so_few_is_refused_by_name(
    cluster, plan_of, least, settings, words
):
    recipe = preset("server-adam").with_codecs(uplink="sign")
    size = 3
    if "aggregate" in settings:
        recipe = recipe.with_options("aggregate=trimmed-mean", f"aggregate.f={settings['f']}")
    if settings.get("coded"):
        recipe, size = preset("coded"), 4
    shape = {name: settings[name] for name in ("servers", "consistency") if name in settings}
    job = cluster(plan_of(size, recipe=recipe, **shape), min_workers=least)
    worker = job.connect(0)
    worker.join()
    [error] = worker.errors
    assert words in str(error)
    assert "--min-workers" in str(error)


def test_with_enough_left_a_robust_mean_goes_on_without_a_lost_rank(cluster, plan_of):
    recipe = preset("server-adam").with_codecs(uplink="sign")
    recipe = recipe.with_options("aggregate=trimmed-mean", "aggregate.f=1")
    job = cluster(plan_of(3, recipe=recipe), min_workers=2, lease_s=LEASE_S)
    first, second, third = job.started()
    kill(job, third)
    for worker in (first, second):
        worker.push_all()
    job.tick(RECONNECT_S)
    assert [committed.version for committed in job.of(Committed)] == [1]

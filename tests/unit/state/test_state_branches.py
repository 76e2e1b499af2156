"""Servers of a tree: who may join, who is waited for, and what the loss of an aggregator means."""

from __future__ import annotations

import pytest

from psq.errors import ConfigError, RefusedError, RemotePlanError
from psq_proto.messages import Bye
from psq_server.state import (
    Broadcast,
    EndedAbove,
    PeerGone,
    SendFull,
    ShardReduced,
    Stop,
    WaitsAbove,
    WeightsAbove,
)
from psq_server.state.branches import parse_branches


@pytest.mark.parametrize(
    ("text", "ranks"), [("0-3,4-7", (0, 4)), ("0,1,2", (0, 1, 2)), ("4-5, 6", (4, 6))]
)
def test_branches_are_read_as_they_are_written(text, ranks):
    assert parse_branches(text).ranks == ranks
    assert parse_branches(text).text == text.replace(" ", "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected ranks"),
        ("0-", "expected ranks"),
        ("3-1", "wrong way round"),
        ("0,2", "expected rank 1"),
        ("0-3,3-5", "expected rank 4"),
        ("1,0", "expected rank 2"),
    ],
)
def test_branches_with_a_gap_or_an_overlap_are_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_branches(text)


def test_a_root_needs_all_ranks_below_it_and_an_aggregator_only_its_own():
    assert "has 0 to 7" in parse_branches("0-3").misfit(8, is_root=True)
    assert not parse_branches("4-7").misfit(8, is_root=False)
    assert "has 6 workers" in parse_branches("4-7").misfit(6, is_root=False)


def tree(cluster, plan_of, branches="0-1,2-3", **settings):
    return cluster(plan_of(4), branches=parse_branches(branches), **settings)


def started(made, *ranks):
    workers = [made.connect(rank) for rank in ranks]
    for worker in workers:
        worker.join(lineage=10 + worker.rank)
    if workers[0].rank == 0:
        workers[0].init()
    for worker in workers:
        worker.pull()
    return workers


def test_a_round_closes_when_every_branch_has_spoken(cluster, plan_of):
    made = tree(cluster, plan_of)
    first, third = started(made, 0, 2)
    first.push_all()
    assert made.version == 0
    third.push_all()
    assert made.version == 1


def test_a_rank_of_another_branch_is_refused(cluster, plan_of):
    made = tree(cluster, plan_of)
    stranger = made.connect(1).join()
    [error] = stranger.errors
    assert isinstance(error, RefusedError)
    assert "--children are 0-1,2-3" in str(error)


def test_a_plan_with_more_workers_than_the_branches_is_refused(cluster, plan_of):
    made = tree(cluster, plan_of)
    stranger = made.connect(0, plan_of(5)).join()
    [error] = stranger.errors
    assert isinstance(error, RemotePlanError)
    assert "the job has 0 to 4" in str(error)


def test_a_wait_says_whose_aggregator_it_is_for(cluster, plan_of):
    made = tree(cluster, plan_of)
    first, _ = started(made, 0, 2)
    first.push_all()
    made.tick(1.0)
    text = made.state.snapshot(made.now_s).text
    assert "waiting for rank 2 (the aggregator of 2-3) of 4" in text


def test_the_job_ends_when_all_branches_are_done(cluster, plan_of):
    made = tree(cluster, plan_of)
    for worker in started(made, 0, 2):
        worker.leave()
    assert made.stop_action.reason == "done"


def test_a_silent_aggregator_ends_the_job_by_name_and_a_silent_leaf_does_not(cluster, plan_of):
    for branches, ends in (("0-1,2-3", True), ("0-1,2,3", False)):
        made = tree(cluster, plan_of, branches, lease_s=5.0)
        workers = started(made, *parse_branches(branches).ranks)
        made.tick(4.0)
        workers[0].beat()
        assert not made.of(Stop)
        made.tick(4.0)
        assert bool(made.of(Stop)) is ends
    made = tree(cluster, plan_of, lease_s=5.0)
    first, _ = started(made, 0, 2)
    made.tick(4.0)
    first.beat()
    made.tick(4.0)
    assert made.stop_action.exit_code == 75
    assert "rank 2, the aggregator of ranks 2-3, was last seen 8.0 s ago" in made.stop_action.text


def test_an_aggregator_whose_connection_broke_may_come_back_within_a_lease(cluster, plan_of):
    made = tree(cluster, plan_of, lease_s=5.0)
    first, third = started(made, 0, 2)
    made.handle(PeerGone(third.name))
    made.tick(4.0)
    first.beat()
    assert not made.of(Stop)
    made.connect(2).join(lineage=12)
    made.tick(4.0)
    assert not made.of(Stop)


def test_an_aggregator_that_leaves_with_an_error_ends_the_job(cluster, plan_of):
    made = tree(cluster, plan_of)
    started(made, 0, 2)[1].leave("error", "no room")
    assert "left (error: no room)" in made.stop_action.text


# ---- what comes from the server above


def aggregator(cluster, plan_of, branches="2,3", **settings):
    return tree(cluster, plan_of, branches, is_root=False, **settings)


def test_an_aggregator_takes_a_part_of_the_jobs_ranks(cluster, plan_of):
    made = aggregator(cluster, plan_of)
    assert not made.connect(3).join().errors
    assert made.connect(1).join().errors


def test_whoever_pulled_gets_weights_once_the_server_above_has_some(cluster, plan_of):
    made = aggregator(cluster, plan_of)
    made.connect(2).join().pull()
    assert not made.of(SendFull)
    made.handle(WeightsAbove())
    made.handle(WeightsAbove())
    assert [action.peers for action in made.of(SendFull)] == [(made.world.members[2].peer,)]
    assert made.state.snapshot(made.now_s).status == "running"


def held(cluster, plan_of):
    """An aggregator whose children have said all of round 0; nothing has come from above."""
    made = aggregator(cluster, plan_of)
    children = [made.connect(rank).join(lineage=rank) for rank in (2, 3)]
    for child in children:
        child.pull()
    made.handle(WeightsAbove())
    made.hold_reductions = True
    for child in children:
        child.push_all()
    return made, children


def test_children_hear_what_the_servers_above_wait_for(cluster, plan_of):
    made, children = held(cluster, plan_of)
    made.handle(WaitsAbove("waiting above for rank 0"))
    assert made.state.snapshot(made.now_s).text == "waiting above for rank 0"
    assert children[0].beat().text == "waiting above for rank 0"


def test_a_shard_that_comes_whole_goes_on_whole_and_is_repeated_whole(cluster, plan_of):
    made, children = held(cluster, plan_of)
    for action in made.held:
        event = ShardReduced(action.round, action.shard, b"first", 0.0, (b"second", b"third"))
        made.handle(event)
    assert made.version == 1
    news = made.of(Broadcast)
    assert [one.frames for one in news] == [(b"first", b"second", b"third")] * 2
    assert [one.shards for one in news] == [(0, 0, 0), (1, 1, 1)]
    before = len(news)
    children[0].pull(0)
    [again] = made.of(Broadcast)[before:]
    assert again.shards == (0, 0, 0, 1, 1, 1)


def test_the_end_above_ends_an_aggregator(cluster, plan_of):
    made, children = held(cluster, plan_of)
    made.handle(EndedAbove(75, "the server ended the job"))
    assert made.stop_action.exit_code == 75
    assert children[0].take(Bye)[0].text == "the server ended the job"

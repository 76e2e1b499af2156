"""Ranks that compute the same: who speaks for whom, who is late, who is cold."""

from __future__ import annotations

import pytest

from psq.presets import preset
from psq_proto.messages import Bye, Leave, MessageType, Verdict
from psq_server.state import Reduce, Stop, WeightsAbove
from psq_server.state.branches import parse_branches
from psq_server.state.replicas import MAX_LAG

RECIPE = preset("coded").with_codecs(uplink="sign")


@pytest.fixture
def made(cluster, plan_of):
    """Four ranks in groups 0, 1 and 2, 3, with weights."""
    made = cluster(plan_of(4, recipe=RECIPE), lease_s=5.0)
    made.ranks = made.started()
    return made


def verdicts(worker):
    return [(one.outcome, one.rejected) for one in worker.take(Verdict)]


def round_of(made, *speakers, number=None):
    number = made.version if number is None else number
    for rank in speakers:
        made.ranks[rank].push_all(number)


def reduced(made):
    """Of each shard of each round that was reduced: whose payload counted."""
    return [tuple(one.rank for one in action.said) for action in made.of(Reduce)]


def cold(made):
    return sorted(fields["rank"] for fields in made.logged("cold"))


def test_a_round_needs_one_of_each_group_and_counts_one(made):
    round_of(made, 1, 2)
    assert made.version == 1
    assert set(reduced(made)) == {(1, 2)}
    round_of(made, 0, 3, number=0)
    for worker in made.ranks:
        assert verdicts(worker) == [("applied", ())]
    round_of(made, 3)
    assert made.version == 1
    round_of(made, 0)
    assert made.version == 2
    assert reduced(made)[-1] == (0, 3)
    assert not cold(made)


def test_the_first_round_waits_until_every_rank_has_come(cluster, plan_of):
    made = cluster(plan_of(4, recipe=RECIPE))
    workers = [made.connect(rank).join(lineage=rank) for rank in (0, 2)]
    workers[0].init()
    for worker in workers:
        worker.pull()
        worker.push_all(0)
    assert made.version == 0
    for rank in (1, 3):
        made.connect(rank).join(lineage=rank)
    made.tick(0.1)
    assert made.version == 1


def test_a_late_replica_goes_on_in_order_and_covers_again(made):
    for _ in range(4):
        round_of(made, 0, 2, 3)
    assert made.version == 4
    for number in range(4):
        round_of(made, 1, number=number)
        [verdict] = made.ranks[1].take(Verdict)
        assert (verdict.outcome, verdict.rejected) == ("applied", ())
        assert made.world.members[1].resolved.version == number + 1
    round_of(made, 1, 2)  # now it is in time, and its twin is not
    assert made.version == 5
    assert reduced(made)[-1] == (1, 2)
    assert not cold(made)


def test_a_verdict_of_a_late_replica_names_the_version_after_its_own_round(made):
    for _ in range(3):
        round_of(made, 0, 2)
    round_of(made, 1, number=0)
    heard = [m for m in made.ranks[1].heard if m.header.type is MessageType.VERDICT]
    assert [(m.header.seq, m.header.version) for m in heard] == [(0, 1)]


def test_a_shard_that_comes_after_its_twins_but_within_the_round_counts_as_said(made):
    first, second, third, _ = made.ranks
    first.push(0, 0)
    third.push(0, 0)
    second.push(0, 0)
    assert made.version == 0
    second.push(1, 0)
    third.push(1, 0)
    assert made.version == 1
    assert reduced(made) == [(0, 2), (1, 2)]
    assert verdicts(second) == [("applied", ())]
    assert verdicts(first) == []
    first.push(1, 0)
    assert verdicts(first) == [("applied", ())]
    assert not cold(made)


def test_other_bytes_than_the_twins_make_a_rank_cold_and_it_covers_nothing(made):
    made.ranks[1].push_all(0, variant=7)
    round_of(made, 0, 2)
    assert cold(made) == [1]
    assert verdicts(made.ranks[1]) == [("applied", ())]
    round_of(made, 1, 2)
    assert made.version == 1, "a cold rank is no cover"
    round_of(made, 0)
    assert made.version == 2
    assert reduced(made)[-1] == (0, 2)


def test_bytes_that_differ_later_make_a_late_rank_cold(made):
    round_of(made, 0, 2)
    made.ranks[1].push_all(0, variant=7)
    assert cold(made) == [1]
    assert verdicts(made.ranks[1]) == [("applied", ())]


def test_who_is_too_late_is_rejected_and_cold(made):
    made.ranks[1].push(0, 0)
    for _ in range(MAX_LAG):
        round_of(made, 0, 2)
    assert not cold(made)
    round_of(made, 0, 2)
    assert cold(made) == [1, 3]
    assert verdicts(made.ranks[1]) == [("rejected", ())]
    made.ranks[3].push(0, 0)
    assert verdicts(made.ranks[3]) == [("rejected", ())]


def test_a_new_process_is_cold_until_no_warm_one_is_left(made):
    round_of(made, 0, 1, 2, 3)
    again = made.connect(1).join(lineage=99)
    again.pull()
    assert cold(made) == [1]
    again.push_all(1)
    round_of(made, 2)
    assert made.version == 1
    made.tick(4.0)
    for worker in (again, made.ranks[2], made.ranks[3]):
        worker.beat()
    made.tick(4.0)  # rank 0 was silent for longer than a lease
    assert made.version == 2
    assert reduced(made)[-1] == (1, 2)
    assert [fields["rank"] for fields in made.logged("cold-cover")] == [1]
    assert cold(made) == [0, 1]


def test_a_replica_that_leaves_with_an_error_is_covered_by_its_twin(made):
    made.ranks[0].send(MessageType.LEAVE, Leave("error", "out of memory"))
    round_of(made, 1, 2)
    assert made.version == 1
    assert not made.of(Stop)


def test_the_loss_of_a_whole_group_ends_the_job_by_name(made):
    round_of(made, 0, 1, 2, 3)
    for _ in range(2):
        made.tick(2.0)
        for rank in (0, 1):
            made.ranks[rank].beat()
    assert not made.of(Stop)
    made.tick(2.0)
    assert made.stop_action.exit_code == 75
    assert "ranks 2 and 3 compute the same" in made.stop_action.text
    assert "start the job again" in made.ranks[0].take(Bye)[0].text


def test_the_job_is_done_when_a_silent_rank_is_all_that_is_left(made):
    round_of(made, 0, 2, 3)
    for rank in (0, 2, 3):
        made.ranks[rank].leave()
    assert not made.of(Stop)
    made.tick(6.0)
    assert made.stop_action.reason == "done"
    assert made.stop_action.exit_code == 0


def test_a_late_replica_may_end_its_rounds_after_the_others_are_done(made):
    for _ in range(2):
        round_of(made, 0, 2, 3)
    for rank in (0, 2, 3):
        made.ranks[rank].leave()
    for number in range(2):
        round_of(made, 1, number=number)
        assert verdicts(made.ranks[1]) == [("applied", ())]
    made.ranks[1].leave()
    assert made.stop_action.reason == "done"


def test_a_late_rank_is_told_what_it_owes_of_its_own_round(made):
    for _ in range(2):
        round_of(made, 0, 2)
    made.ranks[1].push(0, 0)
    assert made.ranks[1].beat().missing == (1,)
    assert made.ranks[3].beat().missing == (0, 1)


def test_a_wait_names_only_groups_without_a_word(made):
    made.ranks[0].push_all(0)
    made.tick(1.0)
    text = made.state.snapshot(made.now_s).text
    assert "ranks 2, 3 of 4" in text


# ---- in a tree


def in_tree(cluster, plan_of, children, *, is_root, world_size=8, **settings):
    """A server of a tree, its children, and weights."""
    branches = parse_branches(children)
    made = cluster(
        plan_of(world_size, recipe=RECIPE), branches=branches, is_root=is_root, **settings
    )
    made.ranks = {rank: made.connect(rank).join(lineage=10 + rank) for rank in branches.ranks}
    if 0 in made.ranks:
        made.ranks[0].init()
    made.handle(WeightsAbove())
    for worker in made.ranks.values():
        worker.pull()
    return made


def test_an_aggregator_hands_on_one_message_of_each_group_below_it(cluster, plan_of):
    made = in_tree(cluster, plan_of, "4,5,6,7", is_root=False)
    round_of(made, 5)
    assert not made.of(Reduce)
    round_of(made, 6)
    assert made.version == 1
    assert set(reduced(made)) == {(5, 6)}
    round_of(made, 4, 7, number=0)
    assert all(verdicts(worker) == [("applied", ())] for worker in made.ranks.values())
    assert not cold(made)


def test_a_server_needs_every_aggregator_below_it_and_one_of_each_group_of_its_own(
    cluster, plan_of
):
    made = in_tree(cluster, plan_of, "0-3,4,5,6-7", is_root=True)
    round_of(made, 5, 6)
    assert made.version == 0
    made.tick(1.0)
    text = made.state.snapshot(made.now_s).text
    assert "rank 0 (the aggregator of 0-3)" in text
    round_of(made, 0)
    assert made.version == 1
    assert set(reduced(made)) == {(0, 5, 6)}
    assert not cold(made)


def test_the_first_round_below_an_aggregator_waits_for_all_of_its_ranks_only(cluster, plan_of):
    branches = parse_branches("4,5,6,7")
    made = cluster(plan_of(8, recipe=RECIPE), branches=branches, is_root=False)
    workers = {rank: made.connect(rank).join(lineage=rank) for rank in (4, 6, 7)}
    made.handle(WeightsAbove())
    for rank in (4, 6):
        workers[rank].pull()
        workers[rank].push_all(0)
    assert made.version == 0
    made.connect(5).join(lineage=5)
    made.tick(0.1)
    assert made.version == 1


@pytest.mark.parametrize(
    ("children", "is_root", "ranks"),
    [("0-2,3-7", True, "2 to 3"), ("4,5,6", False, "6 to 7"), ("3,4,5", False, "2 to 3")],
)
def test_a_tree_that_parts_ranks_that_compute_the_same_is_refused_in_words(
    cluster, plan_of, children, is_root, ranks
):
    branches = parse_branches(children)
    made = cluster(plan_of(8, recipe=RECIPE), branches=branches, is_root=is_root)
    [error] = made.connect(branches.first).join().errors
    assert f"part the ranks {ranks}, which compute the same" in str(error)
    assert "connect to one server of the tree" in str(error)

"""Which data a contribution is computed from: every index of an epoch once, whoever comes and goes.

The machine's invariants, the ledger's among them, are checked after every event by `cluster`.
"""

from __future__ import annotations

import pytest

from psq.errors import RemoteError
from psq.presets import preset
from psq_proto.messages import Verdict
from psq_server.state import PeerGone, ServerState, Tick, parse_branches
from psq_server.state.elastic import RECONNECT_S
from psq_server.state.ledger import MAX_SPANS, Ledger, Terms, count, merge, take

LEASE_S = 10.0


@pytest.fixture
def elastic(cluster, plan_of):
    def make(least=1, consistency="bsp", size=3, **settings):
        plan = plan_of(size, consistency=consistency)
        job = cluster(plan, min_workers=least, lease_s=LEASE_S, **settings)
        return job, job.started()

    return make


def push_all(workers, *args):
    for worker in workers:
        worker.push_all(*args)


def lose(job, worker):
    job.handle(PeerGone(worker.name))
    job.now_s += RECONNECT_S
    job.handle(Tick())


# ---- ranges


def test_each_rank_gets_its_own_part_whoever_asks_first(elastic):
    job, (first, second, third) = elastic()
    ranges = {worker.rank: worker.draw().ranges for worker in (third, first, second)}
    assert ranges == {0: ((0, 10),), 1: ((10, 20),), 2: ((20, 30),)}
    assert third.draw().ranges == ((20, 30),), "the same DRAW gets the same range"
    push_all((first, second, third))
    assert job.world.ledger.visited == ((0, 30),)
    assert first.draw().left == 70


def test_who_joins_late_finds_its_own_part_uncut_by_those_who_were_faster(cluster, plan_of):
    job = cluster(plan_of(3))
    first = job.connect(0).join(lineage=1)
    first.init()
    first.pull()
    assert first.draw().ranges == ((0, 10),)
    third, second = (job.connect(rank).join(lineage=rank) for rank in (2, 1))
    for worker in (third, second):
        worker.pull()
    assert third.draw().ranges == ((20, 30),)
    assert second.draw().ranges == ((10, 20),)


def test_what_is_rejected_is_handed_out_again(cluster, plan_of):
    recipe = preset("server-adam").with_codecs(uplink="sign").with_options("aggregate=clip")
    job = cluster(plan_of(3, recipe=recipe))
    first, second, third = job.started()
    for worker in (first, second, third):
        worker.draw()
    job.judgement = ({}, {2: "krum: rank 2 is far"})
    push_all((first, second, third))
    assert [worker.take(Verdict)[0].outcome for worker in (second, third)] == [
        "applied",
        "rejected",
    ]
    assert job.world.ledger.visited == ((0, 20),)
    assert first.draw().ranges == ((20, 30),)


def test_what_was_skipped_as_a_whole_is_visited_too(elastic):
    job, (first, second, third) = elastic()
    first.draw()
    first.skip()
    push_all((second, third))
    assert first.take(Verdict)[0].outcome == "applied"
    assert job.world.ledger.visited == ((0, 10),)


def test_a_killed_rank_gives_its_range_back(elastic):
    job, (first, second, third) = elastic()
    assert third.draw().ranges == ((20, 30),)
    push_all((first, second))
    lose(job, third)
    assert job.version == 1
    assert job.world.ledger.visited == ()
    # The other two had not drawn for round 0, so nothing of it was visited.
    assert first.draw().ranges == ((0, 10),)


def test_what_a_rank_computes_from_data_that_were_given_to_others_is_rejected(elastic):
    job, (first, second, third) = elastic()
    for worker in (first, second, third):
        worker.draw()
    first.push_all()
    lose(job, third)
    assert job.version == 0
    again = job.connect(2).join(lineage=12, pending=0)
    again.push(0, 0)
    [verdict] = again.take(Verdict)
    assert verdict.outcome == "rejected"
    assert "held data for round 0 and was given up" in verdict.reason
    second.push_all()
    assert job.version == 1, "it is not waited for in a round that it was refused in"
    assert first.draw(1).ranges == ((20, 30),), "what came back is handed out first"


def test_a_complete_contribution_of_a_rank_that_is_lost_has_visited_its_range(elastic):
    job, (first, second, third) = elastic(consistency="bsp,quorum=3")
    for worker in (first, second, third):
        worker.draw()
    third.push_all()
    lose(job, third)
    push_all((first, second))
    assert job.world.ledger.visited == ((0, 30),)


@pytest.mark.parametrize("consistency", ["bsp", "bsp,quorum=2", "ssp:2"])
def test_a_round_in_which_nobody_may_say_anything_any_more_ends_with_nothing(elastic, consistency):
    job, workers = elastic(consistency=consistency)
    for worker in workers:
        assert worker.draw().state == "drawn"
    for worker in workers:
        lose(job, worker)
    assert job.version == 0, "nobody is there"
    back = [job.connect(w.rank).join(lineage=10 + w.rank, pending=0) for w in workers[:2]]
    job.tick(0.1)
    assert job.version == 1
    assert [worker.draw(0).state for worker in back] == ["late", "late"]
    for worker in back:
        worker.pull(0)
    push_all(back, 1)
    job.tick(0.1)
    assert job.version == 2


def test_who_gave_its_data_back_is_not_waited_for_in_that_round(cluster, plan_of):
    job = cluster(plan_of(2))
    first, second = job.started()
    assert second.draw().state == "drawn"
    second.leave("error")
    again = job.connect(1).join(lineage=11, pending=0)
    assert again.draw(0).state == "late"
    first.push_all()
    assert job.version == 1, "its word of this round is resolved already"


def test_what_a_lost_rank_had_said_is_gone_with_the_server_and_its_range_goes_back(elastic):
    job, (first, second, third) = elastic(durability="journal")
    first.draw()
    second.draw()
    second.push_all()
    lose(job, second)
    assert 1 in job.world.ledger.held
    captured = job.state.capture()
    frames = dict.fromkeys(job.world.versions, (b"",))
    settings = job.state.settings
    state = ServerState.restore(settings, captured, 0.0, shards=job.world.versions, frames=frames)
    state.validate()
    assert 1 not in state._world.ledger.held
    assert state._world.members[1].resolved.verdict.outcome == "rejected"
    assert 0 in state._world.ledger.held, "who is there says it again"
    del third


def test_another_process_in_a_ranks_place_frees_the_range_unless_something_of_it_counts(elastic):
    job, (first, second, third) = elastic()
    for worker in (first, second, third):
        worker.draw()
    third.push(0)
    push_all((first, second))  # shard 0 is reduced with rank 2's word
    job.connect(2).join(lineage=500)
    assert [held.spans for held in job.world.ledger.nobodys] == [((20, 30),)]
    newcomer = job.peers[list(job.peers)[-1]]
    newcomer.pull()
    assert newcomer.draw(0).ranges == ((30, 40),)
    newcomer.push(1, 0)
    newcomer.push(0, 0)
    assert job.version == 1
    assert job.world.ledger.visited == ((0, 40),)


def test_a_range_that_was_cut_and_not_drawn_goes_back_with_the_round(elastic):
    job, (first, second, third) = elastic()
    first.draw()
    push_all((first, second, third))
    assert job.world.ledger.visited == ((0, 10),)
    assert not job.world.ledger.held
    assert third.draw().ranges == ((30, 40),)
    assert second.draw().ranges == ((20, 30),)


def test_who_leaves_frees_its_range_at_once(elastic):
    job, (_, _, third) = elastic()
    third.draw()
    third.leave("interrupted")
    newcomer = job.connect(2).join(lineage=500)
    newcomer.pull()
    assert newcomer.draw().ranges == ((20, 30),)


# ---- epochs


def test_an_epoch_ends_when_everything_is_visited_and_the_next_one_begins(elastic):
    _, (first, second, third) = elastic()
    seen = []
    for _ in range(10):
        answers = [worker.draw(size=50) for worker in (first, second, third)]
        seen += [span for answer in answers for span in answer.ranges]
        states = [answer.state for answer in answers]
        if "end" in states:
            break
        push_all((first, second, third))
    assert states == ["end"] * 3
    assert merge(seen, ()) == ((0, 50),)
    assert count(seen) == 50
    assert [answer.epoch for answer in answers] == [1, 1, 1]
    assert first.draw(epoch=1, size=50).ranges == ((0, 10),)


def test_who_finds_nothing_left_waits_and_gets_what_a_lost_rank_gives_back(elastic):
    job, (first, second, third) = elastic(size=3)
    assert first.draw(size=10).state == "drawn"
    assert second.draw(size=10).state == "wait"
    second.skip()
    third.skip()
    lose(job, first)
    assert job.version == 1
    answer = second.draw(size=10)
    assert (answer.state, answer.ranges, answer.epoch) == ("drawn", ((0, 10),), 0)


def test_a_newcomer_that_is_at_an_earlier_epoch_is_told_the_present_one(elastic):
    job, (first, second, third) = elastic()
    for worker in (first, second, third):
        worker.draw(size=30)
    push_all((first, second, third))
    assert third.draw(size=30, epoch=0).epoch == 1
    assert third.draw(size=30, epoch=2).state == "wait", "epoch 1 is not over"
    assert job.world.ledger.held == {}


def test_a_contribution_that_cannot_count_gets_no_data(elastic):
    job, (first, second, third) = elastic()
    third.leave("interrupted")
    push_all((first, second))
    late = job.connect(2).join(lineage=9)
    assert late.draw(0).state == "late"
    assert late.draw(1).state == "drawn"


# ---- refusals


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"size": 99}, "all ranks must name the same"),
        ({"batch": 11}, "all ranks must name the same"),
        ({"seed": 4}, "all ranks must name the same"),
        ({"seq": 1}, "this server is at round 0"),
    ],
)
def test_a_draw_that_does_not_fit_the_job_is_refused_by_name(elastic, wish, words):
    _, (first, second, _) = elastic()
    first.draw()
    assert second.draw(**wish) is None
    [error] = second.errors
    assert isinstance(error, RemoteError)
    assert words in str(error)


# ---- the books


def test_spans_are_taken_from_the_front_in_as_many_pieces_as_a_message_holds():
    holes = tuple((2 * n, 2 * n + 1) for n in range(MAX_SPANS + 5))
    taken, rest = take(holes, 1000)
    assert len(taken) == MAX_SPANS
    assert merge(taken, rest) == holes
    assert take(((0, 10), (20, 30)), 15) == (((0, 10), (20, 25)), ((25, 30),))


def test_the_books_come_back_as_they_were_but_for_what_was_nobodys():
    books = Ledger()
    books.begin(Terms(100, 10, 1))
    for rank in range(4):
        books.draw(rank, 5)
    books.settle(0, 5, applied=True)
    books.settle(1, 5, applied=False)
    books.disown(2)
    again = Ledger()
    again.restore(books.capture())
    again.check()
    assert (again.terms, again.epoch, again.visited) == (books.terms, 0, ((0, 10),))
    assert again.held == books.held
    assert again.pool == merge(books.pool, ((20, 30),))
    empty = Ledger()
    empty.restore(Ledger().capture())
    assert empty == Ledger()


def test_ranks_that_compute_the_same_and_a_second_server_hand_out_nothing(cluster, plan_of):
    coded = cluster(plan_of(2, recipe=preset("coded"))).started()[0]
    assert coded.draw() is None
    assert "aggregate=coded" in str(coded.errors[0])
    specs = [(f"t{n}", (8192,)) for n in range(40)]
    second = cluster(plan_of(1, specs=specs, servers=2).for_server(1)).started()[0]
    assert second.draw() is None
    assert "server 0 hands out the data" in str(second.errors[0])


def test_in_a_tree_nothing_is_handed_out(cluster, plan_of):
    job = cluster(plan_of(2), branches=parse_branches("0,1"))
    worker = job.started()[0]
    assert worker.draw() is None
    assert "in a tree" in str(worker.errors[0])

"""Rounds that are judged as a whole, weights, codecs by push, and who counts."""

import dataclasses

import pytest

from psq import layout
from psq.codec import ShardCodec, get_codec
from psq.groups import DEFAULT_GROUP, Group
from psq.parts import register
from psq.presets import preset
from psq.recipe import Apply, Choice
from psq.rules import ApplyRule
from psq.slots import Part
from psq_proto.messages import Verdict
from psq_server.state import Judge, Pushed, Reduce

SPECS = [("big", (layout.SPLIT_NUMEL,)), ("small", (10,))]
KARDAM = preset("kardam").with_codecs(uplink="sign")
PLAIN = preset("server-adam").with_codecs(uplink="sign")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(layout, "MAX_SHARD_NUMEL", layout.SPLIT_NUMEL)


@pytest.fixture
def judged(cluster, plan_of):
    def begin(world_size=4, recipe=KARDAM, **settings):
        consistency = settings.pop("consistency", "bsp")
        plan = plan_of(world_size, specs=SPECS, recipe=recipe, consistency=consistency)
        job = cluster(plan, **settings)
        return job, job.started()

    return begin


def ranks_of(job, shard=0):
    return [[one.rank for one in a.said] for a in job.of(Reduce) if a.shard == shard]


# ---- judging


def test_nothing_is_reduced_before_the_round_is_said_and_judged(judged):
    job, workers = judged()
    job.hold_judgements = True
    for worker in workers[:3]:
        worker.push_all()
    workers[3].push(0)
    assert not job.of(Judge)
    workers[3].push(1)
    (judge,) = job.of(Judge)
    assert {shard: [one.rank for one in said] for shard, said in judge.said.items()} == {
        0: [0, 1, 2, 3],
        1: [0, 1, 2, 3],
    }
    assert (judge.round, judge.rate) == (0, 0.1)
    assert not job.of(Reduce)
    job.judge(judge)
    assert ranks_of(job) == [[0, 1, 2, 3]]
    assert job.version == 1
    assert [v.outcome for w in workers for v in w.take(Verdict)] == ["applied"] * 4


def test_a_refused_rank_has_said_nothing_and_is_told_why(judged):
    job, workers = judged()
    job.judgement = ({}, {2: "lipschitz: 9 is over 3"})
    for worker in workers:
        worker.push_all()
    assert ranks_of(job) == ranks_of(job, 1) == [[0, 1, 3]]
    (verdict,) = workers[2].take(Verdict)
    assert (verdict.outcome, verdict.reason) == ("rejected", "lipschitz: 9 is over 3")
    assert [v.outcome for w in (0, 1, 3) for v in workers[w].take(Verdict)] == ["applied"] * 3
    assert job.state.counts.rejected == {(2, "lipschitz"): 1}
    assert [line["rank"] for line in job.logged("rejected")] == [2]


def test_a_rank_that_is_refused_in_every_round_is_logged_now_and_then_with_a_total(judged):
    job, workers = judged()
    job.judgement = ({}, {2: "krum: far", 3: "krum: far"})
    for _ in range(40):
        job.now_s += 0.5
        for worker in workers:
            worker.push_all()
    assert job.state.counts.rejected == {(2, "krum"): 40, (3, "krum"): 40}
    for rank in (2, 3):
        lines = [line for line in job.logged("rejected") if line["rank"] == rank]
        counts = [(line.get("since_last"), line.get("total")) for line in lines]
        assert counts == [(None, None), (20, 21)]


def test_a_refused_rank_goes_on_in_the_next_round(judged):
    job, workers = judged()
    for refused in ({2: "krum: far"}, {}, {2: "krum: far"}):
        job.judgement = ({}, refused)
        for worker in workers:
            worker.push_all()
    assert job.version == 3
    assert [v.outcome for v in workers[2].take(Verdict)] == ["rejected", "applied", "rejected"]
    assert job.state.counts.rejected == {(2, "krum"): 2}


def test_what_a_refused_rank_skipped_is_refused_with_the_rest(judged):
    job, workers = judged()
    job.judgement = ({}, {1: "krum: far"})
    workers[1].push(0)
    workers[1].skip()
    for worker in (workers[0], *workers[2:]):
        worker.push_all()
    (verdict,) = workers[1].take(Verdict)
    assert (verdict.outcome, verdict.rejected) == ("rejected", ())


def test_a_round_in_which_everybody_is_refused_moves_nothing_and_ends(judged):
    job, workers = judged()
    job.judgement = ({}, dict.fromkeys(range(4), "too-few: 4 of 5"))
    for worker in workers:
        worker.push_all()
    assert ranks_of(job) == ranks_of(job, 1) == [[]]
    assert job.version == 1
    assert {v.outcome for w in workers for v in w.take(Verdict)} == {"rejected"}


def test_what_is_judged_takes_the_place_of_the_weight_that_was_pushed(judged):
    job, workers = judged()
    job.judgement = ({0: 0.25, 1: 1.0}, {})
    for worker in workers:
        worker.push_all(part=7)
    for action in job.of(Reduce):
        assert [one.weight for one in action.said] == [0.25, 1.0, 7, 7]


def test_whoever_comes_while_a_round_is_judged_is_heard(judged):
    job, workers = judged()
    job.hold_judgements = True
    for worker in workers:
        worker.push_all()
    workers[0].push_all()
    assert job.state.counts.pushes["duplicate"] == 2
    assert workers[0].beat().missing == ()
    job.tick(1.0)
    job.judge(job.unjudged.pop())
    assert job.version == 1


def test_a_rank_that_is_taken_over_while_it_is_judged_does_not_count(judged):
    job, workers = judged()
    job.hold_judgements = True
    for worker in workers:
        worker.push_all()
    newer = job.connect(1).join(lineage=99)
    newer.pull()
    job.judge(job.unjudged.pop())
    assert ranks_of(job) == [[0, 2, 3]]
    assert newer.take(Verdict) == []
    assert job.version == 1


def test_a_server_that_is_told_to_stop_does_not_wait_for_a_judgement(judged):
    job, workers = judged()
    job.hold_judgements = True
    for worker in workers:
        worker.push_all()
    job.stop()
    assert job.stop_action is not None
    assert {v.outcome for w in workers for v in w.take(Verdict)} == {"rejected"}
    job.judge(job.unjudged.pop())
    assert not job.of(Reduce)


@pytest.mark.parametrize(("consistency", "expected"), [("asp", [[0], [1]]), ("bsp", [])])
def test_who_is_judged_is_who_the_consistency_takes(judged, consistency, expected):
    job, workers = judged(consistency=consistency)
    for worker in workers[:2]:
        worker.push_all()
    assert [[one.rank for one in judge.said[0]] for judge in job.of(Judge)] == expected


def test_how_late_a_contribution_is_goes_with_it(judged):
    job, workers = judged(consistency="asp")
    workers[0].push_all()
    workers[0].push_all()
    workers[1].push_all(0)
    assert [judge.said[0][0].staleness for judge in job.of(Judge)] == [0, 0, 2]
    assert [action.said[0].staleness for action in job.of(Reduce) if action.shard == 0] == [0, 0, 2]


def test_reasons_of_any_kind_are_counted_under_a_bounded_number_of_words(judged):
    job, workers = judged(world_size=4)
    for number in range(50):
        job.judgement = ({}, {0: f"kind-{number}: x", 1: "no word at all: " * 3, 2: ": odd"})
        for worker in workers:
            worker.push_all()
    kinds = {kind for _, kind in job.state.counts.rejected}
    assert len(kinds) <= 33
    assert {"other", "judged"} <= kinds
    assert sum(job.state.counts.rejected.values()) == 150


# ---- what is refused one by one


def test_a_late_and_an_illegible_shard_are_counted_by_rank(judged):
    job, workers = judged(world_size=2, recipe=PLAIN)
    workers[0].push(0, body=b"short")
    workers[0].push(1)
    workers[1].push_all()
    (verdict,) = workers[0].take(Verdict)
    assert verdict.rejected == (0,)
    assert job.state.counts.rejected == {(0, "payload"): 1}


def test_a_push_says_how_often_it_counts(judged):
    job, workers = judged(world_size=2, recipe=PLAIN)
    workers[0].push_all(part=640)
    workers[1].push_all()
    assert [[one.weight for one in a.said] for a in job.of(Reduce)] == [[640, 1], [640, 1]]


def two_codecs():
    uplink = dataclasses.replace(
        PLAIN.uplink, choice=Choice("first", (("steps", 3), ("codec", "fp32")))
    )
    return dataclasses.replace(PLAIN, uplink=uplink)


def test_a_push_may_come_in_any_codec_of_the_plan(judged):
    job, workers = judged(world_size=2, recipe=two_codecs())
    dense, sign = (get_codec(name).wire_id for name in ("fp32", "sign"))
    for shard in job.plan.layout.shards:
        body = bytearray(4 * shard.numel)
        workers[0].push(shard.index, codec=dense, body=body)
    workers[1].push_all()
    for action in job.of(Reduce):
        assert [one.codec for one in action.said] == [dense, sign]
        shard = job.plan.layout.shards[action.shard]
        sizes = [ShardCodec(get_codec(name), shard).nbytes for name in ("fp32", "sign")]
        assert [one.payload.nbytes for one in action.said] == sizes


def test_a_push_in_a_codec_that_the_plan_does_not_have_is_refused(judged):
    job, workers = judged(world_size=2, recipe=two_codecs())
    workers[0].push(0, codec=get_codec("bf16").wire_id)
    workers[0].push(0, codec=get_codec("bf16").wire_id)
    workers[0].push(1)
    workers[1].push_all()
    (verdict,) = workers[0].take(Verdict)
    assert "expected codec 0x0131 (sign) or 0x0700 (fp32) by the plan, got 0x0600" in verdict.reason
    assert not [one for a in job.of(Reduce) if a.shard == 0 for one in a.said if one.rank == 0]


# ---- weights that only the workers have


def test_a_newcomer_is_refused_where_only_the_workers_have_weights(judged):
    job, workers = judged(world_size=2, recipe=preset("average").with_codecs(uplink="sign"))
    for worker in workers:
        worker.push_all()
    newer = job.connect(1).join(lineage=99)
    (error,) = map(str, newer.errors)
    assert "this server has no weights to give" in error
    assert "start the job again from what rank 0 saved" in error
    workers[0].push_all()
    workers[1].push_all()
    assert job.version == 2, "the process that was there goes on"


def test_a_worker_that_fell_too_far_behind_is_refused_there(judged):
    _, workers = judged(world_size=2, recipe=preset("average").with_codecs(uplink="sign"))
    for _ in range(3):
        for worker in workers:
            worker.push_all()
    workers[1].pull(2)
    assert workers[1].weights[-1] == ("round", 3, 1)
    workers[1].pull(1)
    (error,) = map(str, workers[1].errors)
    assert "rank 1 needs weights, and this server has none" in error


def test_before_the_first_round_everybody_gets_what_rank_0_gave(judged):
    job, _ = judged(world_size=2, recipe=preset("average").with_codecs(uplink="sign"))
    newer = job.connect(1).join(lineage=99)
    newer.pull()
    assert [told[:2] for told in newer.weights] == [("full", 0), ("full", 0)]


def test_a_server_that_is_to_save_refuses_a_recipe_without_weights_of_its_own(cluster, plan_of):
    recipe = preset("average").with_codecs(uplink="sign")
    job = cluster(plan_of(1, specs=SPECS, recipe=recipe), saves=True)
    (error,) = map(str, job.connect(0).join().errors)
    assert "started with --save, but the weights are the workers' own" in error
    assert "rank 0 saves them" in error


# ---- tensors that only the server moves


class _Own(ApplyRule):
    whole = True

    """Never asked: the reducer is a stand-in."""


def own_plan(plan_of, **recipe):
    register("apply", Part("own", rule=_Own, takes=("gradient",), whole=True))
    groups = [DEFAULT_GROUP, Group("own", pushed=False)]
    made = dataclasses.replace(PLAIN, apply=Apply("own"), **recipe)
    return plan_of(2, specs=SPECS, recipe=made, groups=groups, members=(0, 1))


def test_a_shard_of_the_servers_own_is_owed_by_nobody_and_moved_all_the_same(cluster, plan_of):
    job = cluster(own_plan(plan_of))
    workers = job.started()
    assert workers[0].beat().missing == (0,)
    workers[0].push(0)
    assert workers[0].beat().missing == ()
    workers[1].skip()
    (judge,) = job.of(Judge)
    assert {shard: len(said) for shard, said in judge.said.items()} == {0: 1, 1: 0}
    assert [(a.shard, len(a.said)) for a in job.of(Reduce)] == [(0, 1), (1, 0)]
    assert job.version == 1
    assert [v.rejected for w in workers for v in w.take(Verdict)] == [(), ()]


def test_a_push_of_a_shard_of_the_servers_own_is_an_error(cluster, plan_of):
    job = cluster(own_plan(plan_of))
    workers = job.started()
    workers[0].push(1)
    (error,) = map(str, workers[0].errors)
    assert "nobody pushes it by the plan" in error


def test_what_was_said_is_told_apart_by_rank():
    one = Pushed(3, memoryview(b"x"), 0x101)
    assert (one.weight, one.staleness) == (1, 0)


@pytest.mark.parametrize(
    ("recipe", "workers", "bytes_per_value"),
    [("shared-direction", 1, 20), ("kardam", 4, 4 * (3 + 3 * 4 + 2))],
)
def test_the_vectors_of_a_recipes_rules_need_memory(
    cluster, plan_of, recipe, workers, bytes_per_value
):
    plan = plan_of(workers, specs=SPECS, recipe=preset(recipe))
    enough = bytes_per_value * plan.layout.numel
    for memory_bytes, fits in ((enough, True), (enough - 1, False)):
        job = cluster(plan, memory_bytes=memory_bytes)
        assert bool(job.connect(0).join().errors) != fits

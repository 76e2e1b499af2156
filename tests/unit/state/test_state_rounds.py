from __future__ import annotations

import struct

import pytest

from psq.codec import get_codec
from psq.errors import RemotePayloadError, RemoteProtocolError
from psq.presets import preset
from psq_proto.frames import HEADER_BYTES
from psq_proto.messages import NO_VERSION, MessageType, Status, Verdict
from psq_server.state import Broadcast, Committed, Initialize, PeerBehind, Reduce, SendFull

NAN = struct.pack("<f", float("nan"))
HUGE = struct.pack("<f", 3e38)


def verdicts(worker):
    return [(v.outcome, v.reason) for v in worker.take(Verdict)]


def named(worker):
    """Which shards the verdicts name as not counted."""
    return [v.rejected for v in worker.take(Verdict)]


def counted(job, shard):
    """The last bytes of the payloads that this shard was reduced from, by round."""
    return [[p[-1] for p in a.payloads] for a in job.of(Reduce) if a.shard == shard]


def news(*, version):
    """What a worker of the two shards is told of a new version."""
    return [("round", version, 0), ("round", version, 1)]


# ---- initial weights


def test_pulls_are_parked_until_the_last_initial_part_is_there(cluster):
    job = cluster()
    first, second = job.connect(0).join(), job.connect(1).join()
    first.pull()
    second.pull()
    assert not job.of(SendFull)
    first.init()
    assert [a.versions for a in job.of(SendFull)] == [{0: 0, 1: 0}]
    assert sorted(job.of(SendFull)[0].peers) == sorted([first.name, second.name])


def test_every_initial_part_is_passed_on_once(cluster):
    job = cluster()
    worker = job.connect(0).join()
    worker.init()
    worker.init()
    assert [(a.shard, a.part) for a in job.of(Initialize)] == [(0, p) for p in range(4)] + [(1, 0)]


def test_initial_weights_from_another_rank_are_refused(cluster):
    job = cluster()
    job.connect(0).join()
    other = job.connect(1).join()
    other.send(MessageType.INIT, bytes(40), shard=1, part=0)
    (error,) = other.errors
    assert isinstance(error, RemoteProtocolError)
    assert "rank 1 sent initial weights: only rank 0" in str(error)


@pytest.mark.parametrize(
    ("body", "fields", "words"),
    [
        (bytes(44), {"shard": 1}, "expected 40 bytes by the plan, got 44"),
        (bytes(40), {"shard": 1, "part": 1}, "expected part 0..0 by the plan, got part 1"),
        (bytes(40), {"shard": 2}, "expected one of shards 0, 1 by the plan, got shard 2"),
        (NAN * 10, {"shard": 1}, "NaN"),
    ],
)
def test_initial_weights_that_do_not_fit_are_refused_by_name(cluster, body, fields, words):
    job = cluster()
    worker = job.connect(0).join()
    worker.send(MessageType.INIT, body, **fields)
    (error,) = worker.errors
    assert isinstance(error, RemotePayloadError)
    assert "initial weights" in str(error)
    assert words in str(error)
    assert not job.of(Initialize)


def test_another_process_for_rank_0_gives_all_initial_weights_anew(cluster):
    job = cluster()
    worker = job.connect(0).join()
    worker.send(MessageType.INIT, bytes(40), shard=1, part=0)
    again = job.connect(0).join()
    again.init()
    assert len(job.of(Initialize)) == 1 + 5
    assert job.world.has_weights


# ---- a round


def test_a_shard_is_reduced_as_soon_as_every_rank_has_pushed_it(cluster):
    job = cluster()
    first, second = job.started()
    first.push_all()
    assert not job.of(Reduce)
    second.push(1)
    assert [(a.round, a.shard, a.rate) for a in job.of(Reduce)] == [(0, 1, 0.1)]
    assert first.weights[-1] == ("round", 1, 1), "its weights are sent before the round is over"
    assert job.version == 0
    second.push(0)
    assert [(a.round, a.shard, a.rate) for a in job.of(Reduce)] == [(0, 1, 0.1), (0, 0, 0.1)]
    assert job.version == 1
    assert job.world.versions == {0: 1, 1: 1}


def test_a_reduced_shard_holds_no_payload_any_more(cluster):
    job = cluster()
    job.hold_reductions = True
    first, second = job.started()
    first.push_all()
    both = job.world.round.staged_bytes
    second.push(0)
    assert job.world.round.staged_bytes == len(first.payload(1)) < both


def test_payloads_are_reduced_in_rank_order_whoever_came_first(cluster):
    job = cluster()
    first, second = job.started()
    second.push_all(variant=2)
    first.push_all(variant=1)
    for action in job.of(Reduce):
        assert [payload[-1] for payload in action.payloads] == [1, 2]


def test_nobody_has_a_verdict_before_the_round_is_committed(cluster):
    job = cluster()
    job.hold_reductions = True
    workers = job.started()
    for worker in workers:
        worker.push_all()
    job.reduce(job.held[0])
    assert [verdicts(worker) for worker in workers] == [[], []]
    assert job.version == 0
    job.reduce(job.held[1])
    assert [verdicts(worker) for worker in workers] == [[("applied", "")]] * 2
    assert job.version == 1


def test_a_verdict_says_what_the_servers_work_took(cluster):
    job = cluster()
    workers = job.started()
    for worker in workers:
        worker.push_all()
    assert [v.server_s for v in workers[0].take(Verdict)] == [0.5]


def test_the_same_frames_go_to_everybody_who_has_weights(cluster):
    job = cluster()
    workers = job.started()
    for worker in workers:
        worker.push_all()
    assert [(b.shards, b.frames) for b in job.of(Broadcast)] == [((0,), (b"w",)), ((1,), (b"w",))]
    for broadcast in job.of(Broadcast):
        assert sorted(broadcast.peers) == sorted(worker.name for worker in workers)


def test_shards_sent_again_are_counted_once(cluster):
    job = cluster()
    first, second = job.started()
    for _ in range(3):
        first.push(0)
    first.push(1)
    second.push_all()
    assert job.version == 1
    assert job.state.counts.pushes["duplicate"] == 2


def test_a_push_of_the_committed_round_gets_its_verdict_again(cluster):
    job = cluster()
    workers = job.started()
    for worker in workers:
        worker.push_all()
    workers[0].take(Verdict)
    workers[0].push(0, 0)
    assert verdicts(workers[0]) == [("applied", "")]
    assert job.version == 1


def test_a_late_push_that_never_counted_is_rejected(cluster):
    job = cluster()
    for worker in job.started():
        worker.push_all()
    newcomer = job.connect(0).join(lineage=77)
    newcomer.push(0, 0)
    ((outcome, reason),) = verdicts(newcomer)
    assert outcome == "rejected"
    assert "rank 0 pushed round 0, which was closed without it" in reason


def test_rounds_follow_one_another(cluster):
    job = cluster()
    workers = job.started()
    for number in range(5):
        for worker in workers:
            worker.push_all(number)
    assert job.version == 5
    assert [a.version for a in job.of(Committed)] == [1, 2, 3, 4, 5]
    assert {a.staleness for a in job.of(Committed)} == {(0, 0)}


# ---- skipping


def test_a_rank_that_skips_contributes_nothing_and_holds_up_nobody(cluster):
    job = cluster()
    first, second = job.started()
    first.push_all()
    second.skip()
    assert [len(a.payloads) for a in job.of(Reduce)] == [1, 1]
    assert verdicts(second) == [("applied", "")]
    assert job.state.counts.skipped == 1


def test_a_round_that_all_ranks_skip_still_makes_a_version(cluster):
    job = cluster()
    for worker in job.started():
        worker.skip()
    assert [(a.payloads, a.rate) for a in job.of(Reduce)] == [((), 0.0), ((), 0.0)]
    assert job.version == 1
    assert job.state.counts.skipped == 2


def test_a_skip_speaks_for_every_shard_not_said_before(cluster):
    job = cluster()
    first, second = job.started()
    first.push(0, variant=1)
    first.skip()
    second.push_all(variant=2)
    assert (counted(job, 0), counted(job, 1)) == ([[1, 2]], [[2]])
    assert named(first) == [()], "what it skipped it did not mean to count"


def test_one_shard_can_be_skipped_alone(cluster):
    job = cluster()
    first, second = job.started()
    first.skip(shard=0)
    first.skip(shard=0)
    second.push_all(variant=2)
    assert job.version == 0
    first.push(1, variant=1)
    assert (counted(job, 0), counted(job, 1)) == ([[2]], [[1, 2]])
    assert job.state.counts.pushes["duplicate"] == 1
    assert job.state.counts.skipped == 0


def test_a_skip_after_a_whole_contribution_changes_nothing(cluster):
    job = cluster()
    first, second = job.started()
    first.push_all(variant=1)
    first.skip()
    second.push_all(variant=2)
    assert [[p[-1] for p in a.payloads] for a in job.of(Reduce)] == [[1, 2], [1, 2]]


# ---- what does not fit


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"body": bytes(7)}, "rank 0 shard 0 of round 0: expected 135168 bytes by the plan, got 7"),
        ({"codec": get_codec("bf16").wire_id}, "expected codec 0x"),
        ({"body": NAN * 33792}, "rank 0 shard 0 of round 0: "),
        ({"body": HUGE * 33792}, "has a scale of 3e+38, the limit is 7.21e+16"),
    ],
)
def test_a_shard_that_does_not_fit_is_refused_alone_and_named_in_the_verdict(
    cluster, fields, words
):
    job = cluster()
    first, second = job.started()
    first.push(1, variant=1)
    first.push(0, **fields)
    assert not verdicts(first), "there is one verdict of a contribution, at its end"
    assert first.beat(0).missing == (), "a refused shard is said"
    second.push_all(variant=2)
    (verdict,) = first.take(Verdict)
    assert (verdict.outcome, verdict.rejected) == ("applied", (0,))
    assert words in verdict.reason
    assert named(second) == [()]
    assert (counted(job, 0), counted(job, 1)) == ([[2]], [[1, 2]])
    assert not first.errors


def test_a_contribution_that_was_refused_altogether_is_rejected(cluster):
    job = cluster()
    first, second = job.started()
    for shard in (0, 1):
        first.push(shard, body=bytes(7))
    second.push_all()
    (verdict,) = first.take(Verdict)
    assert (verdict.outcome, verdict.rejected) == ("rejected", ())
    assert job.world.members[0].last_applied == -1
    assert job.version == 1


def test_a_refused_shard_is_refused_once_however_often_it_comes(cluster):
    job = cluster()
    first, second = job.started()
    first.push(0, body=bytes(7))
    first.push(0)
    first.push(1)
    second.push_all()
    assert named(first) == [(0,)]
    assert job.state.counts.pushes["rejected"] == 1
    assert job.state.counts.pushes["duplicate"] == 1


def test_other_bytes_for_a_staged_shard_take_it_back(cluster):
    job = cluster()
    first, second = job.started()
    first.push(0, variant=1)
    first.push(0, variant=3)
    first.push(1, variant=1)
    second.push_all(variant=2)
    (verdict,) = first.take(Verdict)
    assert verdict.rejected == (0,)
    assert "a worker encodes a shard once a round" in verdict.reason
    assert counted(job, 0) == [[2]]


def test_other_bytes_for_a_shard_that_counts_already_end_the_conversation(cluster):
    job = cluster()
    first, second = job.started()
    for worker in (first, second):
        worker.push(0, variant=1)
    first.push(0, variant=3)
    assert "and those count already" in str(first.errors[0])


def test_a_payload_for_a_shard_that_was_skipped_is_refused(cluster):
    job = cluster()
    first, second = job.started()
    first.skip(shard=0)
    first.push_all()
    second.push_all(variant=2)
    (verdict,) = first.take(Verdict)
    assert verdict.rejected == (0,)
    assert "expected nothing more after SKIP" in verdict.reason
    assert counted(job, 0) == [[2]]


@pytest.mark.parametrize("skip", [False, True])
def test_a_shard_that_the_server_does_not_have_ends_the_conversation(cluster, skip):
    job = cluster()
    first, _ = job.started()
    if skip:
        first.skip(shard=9)
    else:
        first.push(9, body=bytes(8))
    assert "expected one of shards 0, 1 by the plan, got shard 9" in str(first.errors[0])


# ---- a rank changes hands within a round


def test_what_was_reduced_of_a_rank_stays_and_its_successor_is_refused_that_shard(cluster):
    job = cluster()
    first, second = job.started()
    first.push(0, variant=1)
    second.push_all(variant=2)
    assert counted(job, 0) == [[1, 2]]
    again = job.connect(0).join(lineage=77)
    assert again.beat(0).missing == (1,), "a shard that is reduced is owed by nobody"
    again.push_all(variant=3)
    assert (counted(job, 0), counted(job, 1)) == ([[1, 2]], [[3, 2]])
    (verdict,) = again.take(Verdict)
    assert (verdict.outcome, verdict.rejected) == ("applied", (0,))
    assert "reduced before it came" in verdict.reason
    assert job.version == 1


def test_a_verdict_names_also_the_shards_that_came_too_late_to_be_refused(cluster):
    job = cluster()
    first, second = job.started()
    first.push(0, variant=1)
    second.push_all(variant=2)
    again = job.connect(0).join(lineage=77)
    again.push(1, variant=3)
    (verdict,) = again.take(Verdict)
    assert verdict.rejected == (0,)
    again.push(0, 0, variant=3)
    assert again.take(Verdict) == [verdict], "a late push is told the same again"


def test_the_same_process_on_a_new_connection_goes_on_where_it_was(cluster):
    job = cluster()
    first, second = job.started()
    first.push(0, variant=1)
    second.push_all(variant=2)
    again = job.connect(0).join(lineage=10, pending=0)
    again.push_all(variant=1)
    assert (counted(job, 0), counted(job, 1)) == ([[1, 2]], [[1, 2]])
    assert named(again) == [()]
    assert job.state.counts.pushes["duplicate"] == 1


def test_a_verdict_that_was_lost_with_its_connection_is_had_by_pushing_again(cluster):
    job = cluster()
    first, second = job.started()
    first.push(0, body=bytes(7))
    first.push(1)
    second.push_all()
    again = job.connect(0).join(lineage=10, pending=0)
    assert again.beat(1).resolved == 0
    again.push(1, 0)
    assert named(again) == [(0,)]
    assert second.beat(1).resolved == 0


def test_a_rank_that_leaves_within_a_round_takes_back_what_is_not_reduced(cluster, plan_of):
    job = cluster(plan_of(3))
    first, second, third = job.started()
    first.push(0, variant=1)
    for worker in (second, third):
        worker.push(0, variant=2)
    second.push(1, variant=2)
    third.push(1, variant=2)
    second.leave()
    first.leave()
    assert (counted(job, 0), counted(job, 1)) == ([[1, 2, 2]], [[2, 2]])
    assert named(first) == [(1,)]
    assert job.version == 1


@pytest.mark.parametrize(
    ("round_", "fields", "words"),
    [
        (7, {}, "rank 1 shard 0 of round 7: this server is at round 0"),
        (0, {"seq": 3}, "names a contribution), got seq 3, version 0"),
        (0, {"version": 3}, "names a contribution), got seq 0, version 3"),
        (0, {"rate": 0.5}, "learning rate 0.5, but rank 0 pushes with 0.1"),
        (0, {"rate": 1e7}, "learning rate 10000000.0, expected 1e+06 or less"),
    ],
)
def test_a_push_that_shows_a_broken_job_ends_the_conversation(cluster, round_, fields, words):
    job = cluster()
    first, second = job.started()
    first.push_all()
    second.push(0, round_, **fields)
    (error,) = second.errors
    assert isinstance(error, RemoteProtocolError)
    assert words in str(error)
    assert job.world.round.get(1) is None
    assert job.world.members[1].peer is None


def test_the_rank_whose_rate_was_refused_can_be_replaced(cluster):
    job = cluster()
    first, second = job.started()
    first.push_all()
    second.push(0, rate=0.5)
    job.connect(1).join().push_all()
    assert job.version == 1


def test_a_push_before_there_are_weights_is_refused(cluster):
    job = cluster()
    worker = job.connect(0).join()
    worker.push(0)
    assert "no weights yet" in str(worker.errors[0])


def test_damaged_bytes_are_dropped_and_the_shard_stays_missing(cluster):
    job = cluster()
    worker, _ = job.started()
    frame = worker.session.send(
        MessageType.PUSH,
        worker.payload(0),
        codec=get_codec(job.plan.recipe.uplink.codec).wire_id,
    )
    frame[HEADER_BYTES + 5] ^= 1
    job.frame(worker.name, frame)
    assert job.state.counts.refused["RemoteWireError"] == 1
    assert 0 in worker.beat(0).missing
    worker.push_all()
    assert worker.beat(0).missing == ()


# ---- pull


def test_a_worker_one_version_behind_gets_the_last_round_again(cluster):
    job = cluster()
    workers = job.started()
    for worker in workers:
        worker.push_all()
    workers[0].weights.clear()
    workers[0].pull(0)
    assert workers[0].weights == news(version=1)


def test_a_worker_further_behind_gets_everything(cluster):
    job = cluster()
    workers = job.started()
    for number in range(2):
        for worker in workers:
            worker.push_all(number)
    for have in (0, NO_VERSION):
        workers[0].weights.clear()
        workers[0].pull(have)
        assert workers[0].weights == [("full", 2, 0), ("full", 2, 1)]


def test_where_a_round_replaces_the_weights_its_frames_serve_everybody(cluster, plan_of):
    job = cluster(plan_of(recipe=preset("qadam").with_codecs(uplink="sign")))
    for worker in job.started():
        worker.push_all()
    newcomer = job.connect(0).join()
    newcomer.pull()
    assert newcomer.weights == news(version=1)


def test_within_a_round_a_puller_gets_each_shard_at_its_own_version(cluster):
    job = cluster()
    first, second = job.started()
    for worker in (first, second):
        worker.push(1)
    first.weights.clear()
    first.pull(0)
    assert first.weights == [("round", 1, 1)], "version 0 of the other shard it has"
    first.pull()
    assert first.weights[1:] == [("full", 0, 0), ("full", 1, 1)]


def test_a_worker_that_has_the_newest_weights_gets_nothing(cluster):
    job = cluster()
    worker, _ = job.started()
    worker.weights.clear()
    worker.pull(0)
    assert worker.weights == []


def test_a_worker_ahead_of_the_server_is_told_of_the_rollback(cluster):
    job = cluster()
    worker, _ = job.started()
    worker.pull(9)
    assert "rank 0 has version 9, this server is at 0" in str(worker.errors[0])


def test_a_slow_reader_gets_no_more_broadcasts_before_it_pulls(cluster):
    job = cluster()
    workers = job.started()
    job.handle(PeerBehind(workers[1].name))
    for worker in workers:
        worker.push_all()
    # A push shows that the worker has the newest weights after all: it follows again.
    assert workers[1].weights[-2:] == news(version=1)
    job.handle(PeerBehind(workers[1].name))
    assert workers[1].name not in {m.peer for m in job.world.members.values() if m.synced}
    workers[1].pull(0)
    assert workers[1].weights[-2:] == news(version=1)


@pytest.mark.parametrize("pulls", [False, True])
def test_a_worker_that_came_back_follows_the_rounds_once_it_has_pulled(cluster, pulls):
    job = cluster()
    first, second = job.started()
    second.push_all()
    again = job.connect(1).join(lineage=11, pending=0)
    if pulls:
        again.pull()
    first.push_all()
    assert job.version == 1
    whole = [("full", 0, 0), ("full", 0, 1)]
    assert again.weights == (whole + news(version=1) if pulls else [])


# ---- status


def test_status_names_the_missing_shards_of_the_asker_and_who_is_waited_for(cluster):
    job = cluster()
    first, second = job.started()
    first.push_all()
    second.push(1)
    job.now_s += 3
    status = first.beat(0)
    assert isinstance(status, Status)
    assert (status.round, status.version, status.missing) == (0, 0, ())
    assert status.waiting == ((1, 3.0),)
    assert second.beat(0).missing == (0,)


def test_a_push_of_an_older_round_than_the_one_begun_ends_the_conversation_alone(cluster):
    job = cluster()
    first, second = job.started()
    for worker in (first, second):
        worker.push_all()
    fresh = job.connect(1).join(lineage=99)
    fresh.push(0, 1)
    fresh.push(1, 0)
    assert "expected round 1, which this rank has begun" in str(fresh.errors[0])
    again = job.connect(1).join(lineage=77)
    again.push_all(1)
    first.push_all(1)
    assert job.version == 2

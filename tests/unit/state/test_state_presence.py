from __future__ import annotations

import pytest

from psq.errors import EXIT_GAVE_UP
from psq_proto.messages import Bye, MessageType, Verdict
from psq_server.state import PeerGone, Save, Stop, Tick
from psq_server.state.waits import Wait, describe


def beat_all(workers):
    for worker in workers:
        worker.beat(0)


# ---- the words


@pytest.mark.parametrize(
    ("need", "ranks", "seen", "words"),
    [
        ("push", (1,), {1: 87.7}, "waiting for rank 1 of 2 for 12 s, last seen 12.3 s ago"),
        ("push", (0, 1), {0: 99.0, 1: 98.0}, "ranks 0, 1 of 2 for 12 s, last seen 1.0 s ago, 2.0"),
        ("join", (1,), {}, "waiting for rank 1 of 2 for 12 s, never seen (to join)"),
        ("join", (0, 1), {0: 90.0}, "last seen 10.0 s ago, never (to join)"),
        ("weights", (0,), {0: 100.0}, "last seen 0.0 s ago (to send the initial weights)"),
    ],
)
def test_a_wait_says_who_how_long_and_what_for(need, ranks, seen, words):
    wait = Wait(need, ranks, 7, 88.0)
    assert words in describe(wait, world_size=2, now_s=100.0, seen_s=seen)


def test_a_wait_for_many_ranks_names_the_first_ones():
    wait = Wait("join", tuple(range(20)), 0, 0.0)
    text = describe(wait, world_size=20, now_s=1.0, seen_s={})
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more of 20" in text


def test_before_anybody_has_said_how_many_the_first_worker_is_waited_for():
    text = describe(Wait("join", (), 0, 0.0), world_size=None, now_s=4.0, seen_s={})
    assert text == "waiting for the first worker for 4 s"


# ---- waits as they come


def test_each_stage_of_a_job_has_its_wait(cluster):
    job = cluster()
    snapshots = [job.state.snapshot(job.now_s)]
    first, second = job.connect(0), job.connect(1)
    second.join()
    snapshots.append(job.state.snapshot(job.now_s))
    first.join()
    snapshots.append(job.state.snapshot(job.now_s))
    first.init()
    first.push_all()
    snapshots.append(job.state.snapshot(job.now_s))
    first.leave()
    snapshots.append(job.state.snapshot(job.now_s))
    assert [snapshot.text.partition(" for 0 s")[0] for snapshot in snapshots] == [
        "waiting for the first worker",
        "waiting for rank 0 of 2",
        "waiting for rank 0 of 2",
        "waiting for rank 1 of 2",
        "waiting for rank 1 of 2",
    ]
    assert "(to join)" in snapshots[1].text
    assert "(to send the initial weights)" in snapshots[2].text
    assert "(to push round 0)" in snapshots[3].text
    assert "(to push round 0 or leave)" in snapshots[4].text
    assert [snapshot.version for snapshot in snapshots] == [-1, -1, -1, 0, 0]


def test_the_age_of_a_wait_starts_anew_with_everything_that_comes_nearer(cluster):
    job = cluster()
    first, second = job.started()
    job.now_s += 20
    first.push(0)
    assert job.state.snapshot(job.now_s).waiting_s == 0
    job.now_s += 3
    second.beat(0)
    assert job.state.snapshot(job.now_s).waiting_s == 3


def test_a_long_wait_is_logged_every_five_seconds(cluster):
    job = cluster()
    workers = job.started()
    workers[0].push_all()
    for _ in range(26):
        beat_all(workers)
        job.tick(0.5)
    texts = [fields["text"] for fields in job.logged("waiting")]
    assert [text.partition(",")[0] for text in texts] == [
        "waiting for rank 1 of 2 for 5 s",
        "waiting for rank 1 of 2 for 10 s",
    ]


def test_workers_that_compute_for_long_and_say_so_are_not_logged(cluster):
    job = cluster()
    workers = job.started()
    for _ in range(60):
        beat_all(workers)
        job.tick(1)
    assert not job.logged("waiting")
    assert job.state.snapshot(job.now_s).status == "running"


def test_silence_is_logged_once_and_so_is_its_end(cluster):
    job = cluster()
    _, second = job.started()
    for _ in range(5):
        job.tick(4)
    assert [fields["rank"] for fields in job.logged("silent")] == [0, 1]
    second.beat(0)
    assert job.logged("heard-again") == [{"rank": 1}]


def test_a_job_held_up_by_a_silent_rank_is_stalled_after_a_lease(cluster):
    job = cluster()
    workers = job.started()
    workers[0].push_all()
    statuses = []
    for _ in range(12):
        workers[0].beat(0)
        job.tick(1)
        statuses.append(job.state.snapshot(job.now_s).status)
    assert statuses == ["running"] * 10 + ["stalled"] * 2


def test_a_server_that_nobody_has_joined_is_waiting_and_not_stalled(cluster):
    job = cluster()
    job.tick(600)
    assert job.state.snapshot(job.now_s).status == "waiting"


def test_a_wait_beyond_its_bound_ends_the_server_with_a_code_of_its_own(cluster):
    job = cluster(give_up_after_s=60.0)
    first, _ = job.started()
    first.push_all()
    for _ in range(61):
        first.beat(0)
        job.tick(1)
    assert job.stop_action.exit_code == EXIT_GAVE_UP
    assert job.stop_action.text.startswith("gave up waiting for rank 1 of 2 for 61 s, last seen")
    assert first.take(Bye)[0].reason == "gave-up"
    assert job.of(Save), "what was reached is saved"


def test_nobody_coming_at_all_ends_the_server_too(cluster):
    job = cluster(give_up_after_s=60.0)
    job.tick(61)
    assert job.stop_action.exit_code == EXIT_GAVE_UP
    assert not job.of(Save)


def test_standings_are_counted(cluster):
    job = cluster()
    assert sum(job.state.snapshot(job.now_s).workers.values()) == 0
    first, _ = job.started()
    job.now_s += 11
    first.beat(0)
    workers = job.state.snapshot(job.now_s).workers
    assert workers == {"joined": 1, "silent": 1, "left": 0, "lost": 0, "absent": 0}


# ---- leaving


def test_when_all_have_left_the_weights_are_saved_and_everybody_is_told(cluster):
    job = cluster()
    workers = job.started()
    workers[0].leave()
    assert job.stop_action is None
    workers[1].leave()
    assert [type(a) for a in job.done if isinstance(a, Save | Stop)] == [Save, Stop]
    assert (job.stop_action.exit_code, job.stop_action.reason) == (0, "done")
    assert [worker.take(Bye)[0].reason for worker in workers] == ["done", "done"]
    assert job.stop_action.byes == (), "who has left need not be waited for"


def test_a_rank_that_is_done_is_not_waited_for_by_later_rounds(cluster):
    job = cluster()
    first, second = job.started()
    first.push_all()
    second.leave()
    assert job.version == 1


def test_a_partial_contribution_leaves_with_its_rank(cluster):
    job = cluster()
    first, second = job.started()
    second.push(0)
    second.leave()
    first.push_all()
    assert job.version == 1
    assert job.world.members[1].last_applied == -1


def test_a_rank_that_left_with_an_error_is_waited_for_and_may_come_back(cluster):
    job = cluster()
    first, second = job.started()
    first.push_all()
    second.leave("error", "out of memory")
    assert job.version == 0
    assert "waiting for rank 1 of 2" in job.state.snapshot(job.now_s).text
    assert job.logged("left") == [{"rank": 1, "reason": "error", "text": "out of memory"}]
    job.connect(1).join().push_all()
    assert job.version == 1


def test_leaving_twice_is_leaving_once(cluster):
    job = cluster()
    first, _ = job.started()
    first.leave()
    first.leave()
    assert job.stop_action is None
    assert len(job.logged("left")) == 1


def test_a_worker_that_has_left_may_not_push(cluster):
    job = cluster()
    first, _ = job.started()
    frame = first.session.send(MessageType.PUSH, first.payload(1), codec=0x100, shard=1)
    first.leave()
    job.frame(first.name, frame)
    assert first.errors
    assert job.world.round.get(0) is None


def test_a_vanished_connection_is_waited_for(cluster):
    job = cluster()
    first, second = job.started()
    job.handle(PeerGone(second.name))
    first.push_all()
    assert job.state.snapshot(job.now_s).workers["silent"] == 1
    again = job.connect(1).join(lineage=11)
    again.push_all()
    assert job.version == 1


def test_a_vanished_stranger_is_nothing(cluster):
    job = cluster()
    assert job.handle(PeerGone(b"nobody")) == []


# ---- being told to stop


def test_told_to_stop_it_gives_back_the_open_round_saves_and_says_goodbye(cluster):
    job = cluster()
    first, second = job.started()
    first.push(0)
    job.stop()
    ((verdict,), (bye,)) = first.take(Verdict), first.take(Bye)
    assert verdict.outcome == "rejected"
    assert "told to stop (SIGTERM)" in verdict.reason
    assert bye.reason == "stopped"
    assert second.take(Bye)
    assert not second.take(Verdict)
    assert [a.version for a in job.of(Save)] == [0]
    assert (job.stop_action.exit_code, job.stop_action.reason) == (0, "stopped")
    assert {bye.peer for bye in job.stop_action.byes} == {first.name, second.name}


def test_told_to_stop_before_there_are_weights_it_saves_nothing(cluster):
    job = cluster()
    job.connect(0).join()
    job.stop()
    assert not job.of(Save)
    assert job.stop_action.exit_code == 0


def test_after_the_end_nothing_happens_any_more(cluster):
    job = cluster()
    first, _ = job.started()
    job.stop()
    assert job.frame(first.name, b"anything") == []
    assert job.handle(Tick()) == []
    assert job.state.stopped
    assert job.state.snapshot(job.now_s).status == "stopping"


def test_the_story_tells_what_happened(cluster):
    job = cluster()
    first, _ = job.started()
    first.push(1)
    assert "PUSH rank=0 round=0 shard=1 -> " in job.state.story().splitlines()[-1]
    job.world.version = 7
    with pytest.raises(AssertionError, match="PUSH rank=0 round=0 shard=1"):
        job.state.validate()

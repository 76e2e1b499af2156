"""A server that is killed and comes back: the job ends as if it had been left alone."""

import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from psq.durable.checkpoint import verify

STEPS = 12
JOB = ("--steps", str(STEPS), "--hidden", "24")


def weights(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def same_bytes(a, b):
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


class Run:
    """One job of two workers, and its server, which may be started again on the same directory."""

    def __init__(
        self, cluster, name, *options, recipe="server-adam", job=None, words=(), **variables
    ):
        self.cluster = cluster
        self.saved = cluster.folder / f"{name}.safetensors"
        self.outs = [cluster.folder / f"{name}.{rank}.npz" for rank in range(2)]
        self.options = ("--save", str(self.saved), *options)
        self.server = cluster.server(*self.options, **variables)
        self.workers = [
            cluster.worker(
                rank,
                self.server.endpoint,
                *JOB,
                *("--out", str(out), *words),
                PSQ_RECIPE=recipe,
                **(job or {}),
            )
            for rank, out in enumerate(self.outs)
        ]

    def again(self, *, ready=True, **variables):
        """Start another server in the place of the one that died."""
        endpoint = self.server.endpoint
        self.server = self.cluster.server(
            "--bind", endpoint, *self.options, ready=ready, **variables
        )
        self.server.endpoint = endpoint

    def end(self):
        """Every process ends well; what the server saved, and what each worker has."""
        assert [worker.wait() for worker in self.workers] == [0, 0]
        assert self.server.wait() == 0
        return [load_file(self.saved), *map(weights, self.outs)]


@pytest.fixture(scope="module")
def plain():
    """What a job comes to that nobody disturbs, by recipe: each is run once."""
    return {}


def undisturbed(cluster, plain, recipe="server-adam"):
    if recipe not in plain:
        plain[recipe] = Run(cluster, "plain", recipe=recipe).end()
    return plain[recipe]


def assert_same(one, other):
    assert all(same_bytes(a, b) for a, b in zip(one, other, strict=True))


def kept(cluster, *options):
    return ("--state-dir", str(cluster.folder / "state"), "--checkpoint-every", "3", *options)


def assert_killed(server):
    assert server.wait() == -signal.SIGKILL


@pytest.mark.parametrize("recipe", ["server-adam", "qadam-1bit", "shared-direction", "onebit-adam"])
def test_a_killed_server_that_comes_back_ends_with_the_same_bytes(cluster, plain, recipe):
    run = Run(cluster, "killed", *kept(cluster), recipe=recipe)
    run.workers[0].wait_line("^step 4")
    run.server.signal(signal.SIGKILL)
    assert_killed(run.server)
    assert all(worker.exit_code() is None for worker in run.workers)
    run.again()
    ended = run.end()
    assert "event=recovered" in run.server.err()
    assert_same(ended, undisturbed(cluster, plain, recipe))


JOBS = {
    "judged": {"PSQ_WITH": "aggregate=clip aggregate.norm=0.5"},
    "overlapped": {"PSQ_OVERLAP": "1"},
    "adam of the workers, few steps pushed": {"recipe": "local-adam", "PSQ_LOCAL_STEPS": "3"},
}


@pytest.mark.parametrize("name", JOBS)
def test_so_does_another_kind_of_job(cluster, name):
    job = dict(JOBS[name])
    recipe = job.pop("recipe", "server-adam")
    plain = Run(cluster, "plain", recipe=recipe, job=job).end()
    point = "commit.durable:6"
    run = Run(cluster, "killed", *kept(cluster), recipe=recipe, job=job, PSQ_FAILPOINT=point)
    assert_killed(run.server)
    run.again()
    assert_same(run.end(), plain)


def test_one_of_two_servers_may_be_killed(cluster):
    """Each keeps its own part; the other one waits with the workers."""
    ended = []
    for killed in (False, True):
        name = "killed" if killed else "plain"
        saves = [cluster.folder / f"{name}.{number}.safetensors" for number in range(2)]
        told = [
            ("--save", str(save), "--state-dir", str(cluster.folder / f"{name}.state.{number}"))
            for number, save in enumerate(saves)
        ]
        first = cluster.server(*told[0])
        point = {"PSQ_FAILPOINT": "commit.durable:6"} if killed else {}
        second = cluster.server(*told[1], **point)
        connect = f"{first.endpoint},{second.endpoint}"
        outs = [cluster.folder / f"{name}.{rank}.npz" for rank in range(2)]
        size = ("--steps", str(STEPS), "--hidden", "256")
        workers = [
            cluster.worker(rank, connect, *size, "--out", str(out)) for rank, out in enumerate(outs)
        ]
        if killed:
            assert_killed(second)
            second = cluster.server(*told[1], "--bind", second.endpoint)
        assert [program.wait() for program in (*workers, first, second)] == [0, 0, 0, 0]
        parts = [load_file(save.with_stem(f"{save.stem}.server{n}-of-2")) for n, save in
                 enumerate(saves)]  # fmt: skip
        ended.append([*parts, *map(weights, outs)])
    assert_same(*ended)


KILLS = [
    *(f"commit.{place}:5" for place in ("record", "sync", "durable", "released")),
    *("commit.keep:1", "commit.kept:1", "commit.keep:3", "commit.kept:3"),
    *("journal.written:4", "journal.synced:4", "journal.segment:2", "journal.prune:2"),
    *("checkpoint.array:1", "checkpoint.rename:3", "checkpoint.current:3", "checkpoint.pruned:1"),
]


@pytest.mark.parametrize("failpoint", KILLS)
def test_a_server_killed_at_any_point_of_writing_comes_back_with_the_same_bytes(
    cluster, plain, failpoint
):
    run = Run(cluster, "killed", *kept(cluster), PSQ_FAILPOINT=failpoint)
    assert_killed(run.server)
    run.again()
    assert_same(run.end(), undisturbed(cluster, plain))


@pytest.mark.parametrize("place", ["loaded", "round", "replayed", "served"])
def test_a_server_killed_while_it_recovers_recovers_the_next_time(cluster, plain, place):
    run = Run(cluster, "killed", *kept(cluster), PSQ_FAILPOINT="commit.durable:6")
    assert_killed(run.server)
    run.again(ready=False, PSQ_FAILPOINT=f"recovery.{place}:1")
    assert_killed(run.server)
    run.again()
    assert_same(run.end(), undisturbed(cluster, plain))


REPLAY = ("--durability", "replay", "--checkpoint-every", "5")


@pytest.mark.parametrize("recipe", ["server-adam", "qadam-1bit", "shared-direction", "onebit-adam"])
def test_at_level_replay_the_workers_say_again_what_a_killed_server_lacks(cluster, plain, recipe):
    run = Run(cluster, "killed", *kept(cluster, *REPLAY), recipe=recipe)
    run.workers[0].wait_line("^step 9")
    run.server.signal(signal.SIGKILL)
    assert_killed(run.server)
    run.again()
    ended = run.end()
    owed = re.search(
        r"event=recovered version=(\d+) checkpoint=(\d+) .*owed=(\d+)", run.server.err()
    )
    assert owed, run.server.err()
    assert int(owed[3]) == int(owed[1]) - int(owed[2])
    assert ("event=replayed" in run.server.err()) == (int(owed[3]) > 0)
    assert_same(ended, undisturbed(cluster, plain, recipe))


@pytest.mark.parametrize("name", JOBS)
def test_so_they_do_in_another_kind_of_job(cluster, name):
    job = dict(JOBS[name])
    recipe = job.pop("recipe", "server-adam")
    plain = Run(cluster, "plain", recipe=recipe, job=job).end()
    point, only = "commit.durable:6", ("--durability", "replay")
    run = Run(cluster, "killed", *kept(cluster, *only), recipe=recipe, job=job, PSQ_FAILPOINT=point)
    assert_killed(run.server)
    run.again()
    assert_same(run.end(), plain)
    assert "event=replayed" in run.server.err()


@pytest.mark.parametrize("failpoint", KILLS[::3])
def test_so_they_do_wherever_it_was_killed(cluster, plain, failpoint):
    """The last of these is the end of the job, when workers have said goodbye."""
    run = Run(cluster, "killed", *kept(cluster, *REPLAY), PSQ_FAILPOINT=failpoint)
    assert_killed(run.server)
    run.again()
    assert_same(run.end(), undisturbed(cluster, plain))


def test_so_they_do_although_it_is_killed_again_while_it_asks(cluster, plain):
    run = Run(
        cluster,
        "killed",
        *kept(cluster, "--durability", "replay"),
        PSQ_FAILPOINT="commit.durable:8",
    )
    assert_killed(run.server)
    for _ in range(2):
        run.again(PSQ_FAILPOINT="commit.released:1")  # the first JOIN is on disk
        assert_killed(run.server)
    run.again()
    assert_same(run.end(), undisturbed(cluster, plain))
    assert "event=replayed" in run.server.err()


def test_if_a_worker_died_with_what_it_said_the_rounds_are_lost_and_named(cluster):
    words, open_gate = gate_before(cluster, 6)
    only = ("--durability", "replay", "--checkpoint-every", "1000")
    run = Run(cluster, "killed", *kept(cluster, *only), words=words)
    for worker in run.workers:
        worker.wait_line("^gate$")
    run.server.signal(signal.SIGKILL)
    assert_killed(run.server)
    run.workers[1].signal(signal.SIGKILL)
    run.workers[1].wait()
    run.again()
    another = cluster.worker(1, run.server.endpoint, *JOB, PSQ_RECIPE="server-adam")
    open_gate()
    assert run.workers[0].wait() == 1
    said = r"ROLLBACK: the server is at round 0, and had told this worker of round (\d+)"
    told = re.search(said, run.workers[0].err())
    assert told, run.workers[0].err()
    lost = re.search(r"event=lost rank=1 first=0 last=(\d+)", run.server.err())
    assert lost, run.server.err()
    assert int(told[1]) >= 4
    assert int(lost[1]) + 1 >= int(told[1])
    run.workers[0] = cluster.worker(0, run.server.endpoint, *JOB, PSQ_RECIPE="server-adam")
    assert [run.workers[0].wait(), another.wait(), run.server.wait()] == [0, 0, 0]


def test_a_rotten_checkpoint_is_passed_over_loudly_and_more_is_replayed(cluster, plain):
    run = Run(cluster, "killed", *kept(cluster), PSQ_FAILPOINT="commit.durable:9")
    assert_killed(run.server)
    newest = max((cluster.folder / "state" / "checkpoints").glob("checkpoint-*"))
    arrays = newest / "arrays-00000.bin"
    data = bytearray(arrays.read_bytes())
    data[100] ^= 1
    arrays.write_bytes(data)
    run.again()
    ended = run.end()
    assert "event=rotten-checkpoint" in run.server.err()
    assert_same(ended, undisturbed(cluster, plain))


def test_where_no_checkpoint_can_be_read_it_refuses_to_start(cluster):
    run = Run(cluster, "killed", *kept(cluster), PSQ_FAILPOINT="commit.durable:9")
    assert_killed(run.server)
    for manifest in (cluster.folder / "state" / "checkpoints").glob("checkpoint-*/manifest*"):
        manifest.write_bytes(b"{}")
    run.again(ready=False)
    assert run.server.wait() == 65
    assert "none can be read" in run.server.err()


def test_two_servers_cannot_have_one_directory(cluster):
    first = cluster.server(*kept(cluster))
    second = cluster.server(*kept(cluster), ready=False)
    assert second.wait() == 65
    assert str(first.pid) in second.err()


def test_an_old_copy_of_the_directory_stops_the_workers_who_name_both_rounds(cluster):
    run = Run(cluster, "killed", *kept(cluster), PSQ_FAILPOINT="commit.durable:4")
    assert_killed(run.server)
    shutil.copytree(cluster.folder / "state", cluster.folder / "copy")
    run.again(PSQ_FAILPOINT="commit.released:8")
    assert_killed(run.server)
    shutil.rmtree(cluster.folder / "state")
    (cluster.folder / "copy").rename(cluster.folder / "state")
    run.again()
    for worker in run.workers:
        assert worker.wait() != 0
        said = re.search(r"ROLLBACK: the server is at round (\d+), .* of round (\d+)", worker.err())
        assert said, worker.err()
        assert int(said[1]) < int(said[2])


def gate_before(cluster, step):
    """Options that hold workers up before a step, and what lets them go on."""
    gate = cluster.folder / "gate"
    os.mkfifo(gate)
    return ("--gate", str(gate), "--gate-step", str(step)), lambda: gate.write_text("")


def test_with_checkpoints_alone_what_came_after_the_last_is_lost_and_said_to_be(cluster):
    only = ("--durability", "checkpoint", "--checkpoint-every", "1000")
    words, open_gate = gate_before(cluster, 6)
    run = Run(cluster, "killed", *kept(cluster, *only), words=words)
    for worker in run.workers:
        worker.wait_line("^gate$")
    run.server.signal(signal.SIGKILL)
    assert_killed(run.server)
    run.again()
    open_gate()
    assert [worker.wait() for worker in run.workers] == [1, 1]
    said = r"ROLLBACK: the server is at round 0, and had told this worker of round (\d+)"
    rounds = [re.search(said, worker.err()) for worker in run.workers]
    assert all(each and int(each[1]) >= 4 for each in rounds)


def test_a_server_that_is_told_to_stop_keeps_its_state_and_goes_on_later(cluster):
    words, open_gate = gate_before(cluster, 6)
    options = kept(cluster, "--checkpoint-every", "1000", "--json")
    run = Run(cluster, "stopped", *options, words=words)
    for worker in run.workers:
        worker.wait_line("^gate$")
    run.server.signal(signal.SIGTERM)
    assert run.server.wait() == 0
    summary = json.loads(run.server.out().splitlines()[-1])
    assert summary["reason"] == "stopped"
    names = {path.name for path in (cluster.folder / "state" / "checkpoints").iterdir()}
    assert f"checkpoint-{summary['version']:020d}-0000" in names
    run.again()
    recovered = re.search(r"event=recovered version=(\d+)", run.server.err())
    assert recovered
    assert int(recovered[1]) == summary["version"] >= 5
    open_gate()
    assert [worker.wait() for worker in run.workers] == [75, 75]  # they were told goodbye


def test_checkpoints_are_copied_and_only_so_many_stay(cluster):
    url = f"file://{cluster.folder / 'copies'}"
    options = ("--keep-checkpoints", "3", "--checkpoint-url", url)
    Run(cluster, "copied", *kept(cluster, "--checkpoint-every", "1", *options)).end()
    stay = list((cluster.folder / "state" / "checkpoints").glob("checkpoint-*"))
    assert len(stay) == 3
    # How many are overtaken by newer ones before their turn is the machine's speed.
    copies = list((cluster.folder / "copies").glob("checkpoint-*/manifest.json"))
    assert copies
    assert all(verify(path.parent) == () for path in copies)


def test_another_job_than_the_one_that_was_asked_for_is_refused(cluster):
    run = Run(cluster, "killed", *kept(cluster), PSQ_FAILPOINT="commit.durable:4")
    assert_killed(run.server)
    run.options = (*run.options, "--recipe", "qadam-1bit")
    run.again(ready=False)
    assert run.server.wait() == 78
    assert "recipe: qadam-1bit was asked for" in run.server.err()


def test_a_tree_is_refused_by_name(cluster):
    server = cluster.server(*kept(cluster), "--children", "0,1", ready=False)
    assert server.wait() == 78
    assert "a tree cannot go on after a crash" in server.err()

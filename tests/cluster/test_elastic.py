"""Real workers that die, hang, leave and come back, while the job goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

SIZE = 3
ENDLESS = 1_000_000
NOTICED_S = 2.1
"""Within so long a killed process is noticed, as docs/reliability.md promises."""
SLACK_S = 1.5
"""What a busy machine may add to a deadline."""


def start(cluster, *options, size=SIZE, steps=ENDLESS, **settings):
    """A server that goes on with one worker, and workers of a job that has no end."""
    host = cluster.server("--world-size", str(size), "--min-workers", "1", "--json", *options)
    workers = [
        worker(cluster, host, rank, size=size, steps=steps, **settings) for rank in range(size)
    ]
    return host, workers


def worker(cluster, host, rank, *, size=SIZE, steps=ENDLESS, **settings):
    sizes = ("--world-size", str(size), "--steps", str(steps), "--hidden", "16")
    named = {"PSQ_RECIPE": "server-adam"} | {
        f"PSQ_{name.upper()}": value for name, value in settings.items()
    }
    return cluster.worker(rank, host.endpoint, *sizes, **named)


def steps_of(program) -> int:
    """How many steps a worker has made."""
    return len(re.findall(r"^step \d+$", program.out(), re.MULTILINE))


def wait_steps(program, count: int, *, timeout_s: float = 60.0) -> float:
    """Wait for so many more steps; returns how long that took, in seconds."""
    began_s, target = time.monotonic(), steps_of(program) + count
    pause = threading.Event()
    while steps_of(program) < target:
        assert program.exit_code() is None, f"{program.name} ended"
        assert time.monotonic() < began_s + timeout_s, f"{program.name} makes no steps"
        pause.wait(0.01)
    return time.monotonic() - began_s


def logged(host, event: str) -> list[str]:
    return re.findall(rf"^.*event={event}\b.*$", host.err(), re.MULTILINE)


def stop(host, workers) -> dict:
    """End the job; what the server says of it."""
    host.signal(signal.SIGTERM)
    assert host.wait() == 0
    for each in workers:
        each.wait()
    return json.loads(host.out().splitlines()[-1])


RULES = ["bsp", "bsp,quorum=2", "ssp:2", "asp"]


@pytest.mark.parametrize("consistency", RULES)
def test_rounds_go_on_without_a_killed_worker_and_with_it_when_it_comes_back(cluster, consistency):
    host, workers = start(cluster, consistency=consistency)
    for each in workers:
        wait_steps(each, 2)
    os.kill(workers[2].pid, signal.SIGKILL)
    assert workers[2].wait() == -signal.SIGKILL
    for each in workers[:2]:
        assert wait_steps(each, 3) < NOTICED_S + SLACK_S
    host.wait_line(r"event=evicted rank=2", err=True)
    workers[2] = worker(cluster, host, 2, consistency=consistency)
    wait_steps(workers[2], 3)
    for each in workers[:2]:
        wait_steps(each, 3)
    said = stop(host, workers)
    assert said["evicted"] == 1
    assert said["joins"] == SIZE + 1


# ---- data that are handed out

TRAIN = Path(__file__).resolve().parents[2] / "examples" / "elastic" / "train.py"


def hand_out(cluster, host, rank, *options, **settings):
    """A worker of the example, which writes down what it has visited."""
    named = {"PSQ_RECIPE": "server-adam"} | {
        f"PSQ_{name.upper()}": value for name, value in settings.items()
    }
    visits = cluster.folder / f"visits.{rank}"
    words = ("--visits", str(visits), *options)
    return cluster.worker(
        rank, host.endpoint, *words, script=TRAIN, PSQ_WORLD_SIZE=str(SIZE), **named
    )


def visited(cluster) -> dict[int, list[int]]:
    """Of each epoch all indices that were computed from and counted, as the workers know it."""
    seen: dict[int, list[int]] = {}
    for path in cluster.folder.glob("visits.*"):
        for line in path.read_text().splitlines():
            epoch, applied, indices = json.loads(line)
            if applied:
                seen.setdefault(epoch, []).extend(indices)
    return seen


@pytest.mark.parametrize("consistency", RULES)
def test_every_index_is_visited_once_an_epoch(cluster, consistency):
    size = 300
    host = cluster.server("--world-size", str(SIZE), "--min-workers", "1")
    words = ("--size", str(size), "--batch", "7", "--epochs", "2")
    workers = [
        hand_out(cluster, host, rank, *words, consistency=consistency) for rank in range(SIZE)
    ]
    assert [each.wait() for each in workers] == [0] * SIZE
    assert host.wait() == 0
    seen = visited(cluster)
    assert {epoch: sorted(indices) for epoch, indices in seen.items()} == {
        epoch: list(range(size)) for epoch in range(2)
    }
    assert seen[0] != seen[1], "each epoch has an order of its own"


# ---- hanging


def test_rounds_go_on_without_a_worker_that_hangs_and_with_it_when_it_wakes(cluster):
    lease_s = 2.0
    host, workers = start(cluster, "--lease", str(lease_s))
    for each in workers:
        wait_steps(each, 2)
    os.kill(workers[1].pid, signal.SIGSTOP)
    try:
        for each in (workers[0], workers[2]):
            assert wait_steps(each, 3) < lease_s + 1.0 + SLACK_S
        host.wait_line(r"event=evicted rank=1 .*connected=1", err=True)
    finally:
        os.kill(workers[1].pid, signal.SIGCONT)
    host.wait_line(r"event=returned rank=1", err=True)
    for each in workers:
        wait_steps(each, 3)
    said = stop(host, workers)
    assert said["evicted"] == 1
    assert said["joins"] == SIZE, "it never joined again: its connection was there all the time"


def test_without_min_workers_a_killed_worker_is_waited_for_by_name(cluster):
    host = cluster.server("--world-size", "2", "--lease", "1")
    workers = [worker(cluster, host, rank, size=2) for rank in range(2)]
    for each in workers:
        wait_steps(each, 2)
    os.kill(workers[1].pid, signal.SIGKILL)
    workers[0].wait_line(r"waiting for rank 1", err=True)
    assert not logged(host, "evicted")
    workers[1] = worker(cluster, host, 1, size=2)
    wait_steps(workers[0], 3)


# ---- leaving


def test_sigterm_lets_a_worker_end_its_step_and_leave(cluster):
    host = cluster.server("--world-size", "2", "--min-workers", "1", "--json")
    script = cluster.folder / "endless.py"
    script.write_text(ENDLESS)
    words = ("--world-size", "2", "--connect", host.endpoint)
    workers = [
        cluster.command(sys.executable, "-m", "psq_worker", "--rank", str(rank), *words, script)
        for rank in range(2)
    ]
    for each in workers:
        each.wait_line("^step 3$")
    workers[1].signal(signal.SIGTERM)
    assert workers[1].wait() == 0
    host.wait_line(r"event=left rank=1 reason=interrupted", err=True)
    begun = re.findall(r"^begin (\d+)$", workers[1].out(), re.MULTILINE)
    [version] = re.findall(r"^version (\d+)$", workers[1].out(), re.MULTILINE)
    assert int(version) == int(begun[-1]) + 1, "the step that it was at is over"
    wait_steps(workers[0], 3)
    said = stop(host, workers[:1])
    assert said["evicted"] == 0


ENDLESS = """
import itertools
import torch
import psq.torch

model = torch.nn.Linear(10, 2)
ps = psq.torch.Worker(model)
try:
    for count in itertools.count():
        print("begin", ps.version, flush=True)
        model(torch.ones(4, 10)).sum().backward()
        torch.sin(torch.ones(1_000_000)).sum()
        ps.step()
        print("step", count, flush=True)
finally:
    print("version", ps.version, flush=True)
"""


def wait_visits(cluster, count: int) -> None:
    """Wait until so many batches have been written down."""
    pause, ends_s = threading.Event(), time.monotonic() + 60.0
    while sum(len(indices) for indices in visited(cluster).values()) < count:
        assert time.monotonic() < ends_s, "nobody visits anything"
        pause.wait(0.01)


def unfinished(cluster) -> set[tuple[int, int]]:
    """What killed workers had begun and not heard of: (epoch, index)."""
    found: set[tuple[int, int]] = set()
    for path in cluster.folder.glob("visits.*"):
        last: list = []
        for line in path.read_text().splitlines():
            epoch, applied, indices = json.loads(line)
            begun = [(epoch, index) for index in indices]
            if applied is None:
                found |= set(last)  # a process before never heard of it
            last = begun if applied is None else []
        found |= set(last)
    return found


def assert_once(cluster, size: int, epochs: int) -> None:
    """Every index was visited once an epoch; what a killed worker never heard of may have been."""
    seen = visited(cluster)
    open_ends = unfinished(cluster)
    for epoch in range(epochs):
        indices = seen.get(epoch, [])
        assert len(indices) == len(set(indices)), f"epoch {epoch}: an index twice"
        missing = set(range(size)) - set(indices)
        assert {(epoch, index) for index in missing} <= open_ends, f"epoch {epoch}: lost {missing}"


@pytest.mark.parametrize("consistency", RULES)
def test_workers_that_are_killed_and_replaced_lose_no_index(cluster, consistency):
    size, batch, epochs = 400, 5, 2
    host = cluster.server("--world-size", str(SIZE), "--min-workers", "1", "--json")
    words = ("--size", str(size), "--batch", str(batch), "--epochs", str(epochs), "--pause-ms", "8")

    def begin(rank):
        return hand_out(cluster, host, rank, *words, consistency=consistency)

    workers = [begin(rank) for rank in range(SIZE)]
    wait_visits(cluster, 60)
    for rank, goal in ((2, 150), (0, 300)):
        os.kill(workers[rank].pid, signal.SIGKILL)
        assert workers[rank].wait() == -signal.SIGKILL
        wait_visits(cluster, goal)
        workers[rank] = begin(rank)
    assert [each.wait() for each in workers] == [0] * SIZE
    assert host.wait() == 0
    assert json.loads(host.out().splitlines()[-1])["joins"] == SIZE + 2
    assert_once(cluster, size, epochs)


def test_a_worker_that_is_told_to_end_loses_no_index_and_nobody_waits(cluster):
    size, epochs = 300, 1
    host = cluster.server("--world-size", str(SIZE), "--min-workers", "1", "--json")
    command = ["--size", str(size), "--batch", "5", "--pause-ms", "8", "--epochs", str(epochs)]
    told = ["--world-size", str(SIZE), "--connect", host.endpoint, "--progress", "none"]
    visits = [cluster.folder / f"visits.{rank}" for rank in range(SIZE)]
    workers = [
        cluster.command(
            *(sys.executable, "-m", "psq_worker", "--rank", str(rank), *told, str(TRAIN), "--"),
            *(*command, "--visits", str(visits[rank])),
        )
        for rank in range(SIZE)
    ]
    wait_visits(cluster, 60)
    workers[1].signal(signal.SIGTERM)
    assert workers[1].wait() == 0
    assert [each.wait() for each in workers] == [0] * SIZE
    assert host.wait() == 0
    assert json.loads(host.out().splitlines()[-1])["evicted"] == 0
    assert_once(cluster, size, epochs)
    assert not logged(host, "evicted")


def test_a_server_that_is_killed_and_comes_back_knows_what_was_visited(cluster):
    size, epochs = 300, 2
    words = ("--size", str(size), "--batch", "5", "--epochs", str(epochs), "--pause-ms", "8")
    kept = ("--state-dir", str(cluster.folder / "state"), "--durability", "journal")
    told = ("--world-size", str(SIZE), "--min-workers", "1", *kept)
    host = cluster.server(*told)
    workers = [hand_out(cluster, host, rank, *words) for rank in range(SIZE)]
    for goal in (60, 350):
        wait_visits(cluster, goal)
        os.kill(host.pid, signal.SIGKILL)
        assert host.wait() == -signal.SIGKILL
        host = cluster.server(*told, "--bind", host.endpoint)
    assert [each.wait() for each in workers] == [0] * SIZE
    assert host.wait() == 0
    assert logged(host, "recovered")
    assert_once(cluster, size, epochs)
    assert not unfinished(cluster), "every worker lived to hear of everything"


def test_of_two_servers_the_first_hands_out_the_data(cluster):
    size, epochs = 200, 1
    hosts = [cluster.server("--world-size", str(SIZE), "--min-workers", "1") for _ in range(2)]
    connect = ",".join(host.endpoint for host in hosts)
    words = ("--size", str(size), "--batch", "7", "--epochs", str(epochs), "--hidden", "8192")
    workers = [
        cluster.worker(
            *(rank, connect, *words, "--visits", str(cluster.folder / f"visits.{rank}")),
            script=TRAIN,
            PSQ_WORLD_SIZE=str(SIZE),
        )
        for rank in range(SIZE)
    ]
    assert [each.wait() for each in workers] == [0] * SIZE
    assert [host.wait() for host in hosts] == [0, 0]
    assert_once(cluster, size, epochs)
    assert [len(logged(host, "data")) for host in hosts] == [1, 0]


def test_in_bsp_a_job_hands_out_the_same_data_again(cluster):
    size, epochs = 120, 2
    runs = []
    for run in range(2):
        host = cluster.server("--world-size", str(SIZE))
        words = ("--size", str(size), "--batch", "7", "--epochs", str(epochs))
        for path in cluster.folder.glob("visits.*"):
            path.unlink()
        ranks = range(SIZE) if run else reversed(range(SIZE))
        workers = [hand_out(cluster, host, rank, *words) for rank in ranks]
        assert [each.wait() for each in workers] == [0] * SIZE
        assert host.wait() == 0
        runs.append({path.name: path.read_text() for path in cluster.folder.glob("visits.*")})
    assert runs[0] == runs[1]


# ---- replicas


@pytest.mark.parametrize(
    ("recipe", "variables"),
    [
        ("server-adam", {}),
        ("shared-adam", {}),
        ("onebit-adam", {}),
        ("ef21", {}),
        ("server-adam", {"PSQ_WITH": "aggregate=clip"}),
        ("server-adam", {"PSQ_WITH": "aggregate=krum aggregate.f=1", "PSQ_MIN": "4", "PSQ_N": "5"}),
        ("server-adam", {"PSQ_EVERY": "2"}),
    ],
    ids=["delta", "mean", "mean-residual", "absent-count", "judged", "krum", "turns"],
)
def test_replicas_are_byte_equal_whoever_is_missing_from_a_round(cluster, recipe, variables):
    variables = dict(variables)
    size, least = int(variables.pop("PSQ_N", SIZE)), variables.pop("PSQ_MIN", "1")
    lost, steps = size - 1, 12
    host = cluster.server("--world-size", str(size), "--min-workers", least, "--json")
    words = ["--world-size", str(size), "--steps", str(steps), "--hidden", "512"]
    gates = {rank: cluster.folder / f"gate{rank}" for rank in (0, lost)}
    for gate in gates.values():
        os.mkfifo(gate)

    def begin(rank, *more):
        out = ("--out", str(cluster.folder / f"replica{rank}.npz"))
        return cluster.worker(rank, host.endpoint, *words, *out, *more, **told)

    told = {"PSQ_RECIPE": recipe, **variables}
    held = {
        0: ("--gate", str(gates[0]), "--gate-step", "7"),
        lost: ("--gate", str(gates[lost]), "--gate-step", "3"),
    }
    workers = [begin(rank, *held.get(rank, ())) for rank in range(size)]
    workers[lost].wait_line("^gate$")
    os.kill(workers[lost].pid, signal.SIGKILL)
    workers[0].wait_line("^gate$")  # four rounds later, without it
    workers[lost] = begin(lost)
    workers[lost].wait_line("^joined version=7$")
    gates[0].write_bytes(b"")
    assert [each.wait() for each in workers] == [0] * size
    assert host.wait() == 0
    assert json.loads(host.out().splitlines()[-1])["evicted"] == 1
    replicas = []
    for rank in range(size):
        with np.load(cluster.folder / f"replica{rank}.npz") as arrays:
            replicas.append({name: arrays[name].tobytes() for name in arrays.files})
    assert all(replica == replicas[0] for replica in replicas)


@pytest.mark.parametrize("elastic", [(), ("--min-workers", "1")], ids=["waits", "elastic"])
def test_a_worker_that_goes_on_from_what_it_kept_computes_from_the_data_it_had(cluster, elastic):
    size, epochs = 300, 1
    host = cluster.server("--world-size", str(SIZE), *elastic, "--json")
    words = ("--size", str(size), "--batch", "5", "--epochs", str(epochs), "--pause-ms", "8")
    kept = {"state_dir": str(cluster.folder / "kept")}
    workers = [hand_out(cluster, host, rank, *words, **kept) for rank in range(SIZE)]
    for goal in (60, 150):
        wait_visits(cluster, goal)
        os.kill(workers[1].pid, signal.SIGKILL)
        assert workers[1].wait() == -signal.SIGKILL
        workers[1] = hand_out(cluster, host, 1, *words, **kept)
    assert [each.wait() for each in workers] == [0] * SIZE
    assert host.wait() == 0
    said = json.loads(host.out().splitlines()[-1])
    assert said["joins"] == SIZE + 2
    assert_once(cluster, size, epochs)
    if not elastic:
        assert said["resets"] == 0

"""Real workers that die, hang, leave and come back, while the job goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time

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
    named = {f"PSQ_{name.upper()}": value for name, value in settings.items()}
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

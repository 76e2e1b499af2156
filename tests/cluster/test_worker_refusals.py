"""Wrong workers and ends that come too early: a clear word, the right exit code, nothing lost."""

import os
import re
import signal
import textwrap

import pytest

from psq.errors import EXIT_CONFIG, EXIT_GAVE_UP, EXIT_REFUSED


@pytest.fixture
def lone(cluster):
    """Start a job of two in which rank 0 waits for the right rank 1; returns (server, rank 0)."""
    server = cluster.server("--world-size", "2")
    first = cluster.worker(0, server.endpoint, "--steps", "2")
    first.wait_line("^joined")
    return server, first


@pytest.mark.parametrize(
    ("wrong", "code", "words"),
    [
        (
            ["1", "--hidden", "33"],
            EXIT_CONFIG,
            r"tensor 0: the job has '0.weight' \[32, 16\], it says '0.weight' \[33, 16\]",
        ),
        (
            ["1", "PSQ_RECIPE=qadam"],
            EXIT_CONFIG,
            r"recipe apply.*the job has .*it says",
        ),
        (
            ["1", "--world-size", "3"],
            EXIT_CONFIG,
            r"world_size: the job has 2, it says 3",
        ),
        (
            ["2", "--world-size", "3"],
            EXIT_REFUSED,
            r"rank 2 does not exist: this job has ranks 0\.\.1",
        ),
        (
            ["1", "--lr", "0.5"],
            1,
            r"rank 1 .*learning rate 0.5, but rank 0 pushes with 0.01",
        ),
    ],
    ids=["model", "recipe", "world size", "rank", "learning rate"],
)
def test_a_worker_that_does_not_belong_is_told_why_and_the_job_goes_on(
    cluster, lone, wrong, code, words
):
    server, first = lone
    rank, *rest = wrong
    variables = dict(each.split("=") for each in rest if "=" in each)
    options = [each for each in rest if "=" not in each]
    stranger = cluster.worker(int(rank), server.endpoint, *options, **variables)
    assert stranger.wait() == code
    assert re.search(words, stranger.err()), stranger.err()
    right = cluster.worker(1, server.endpoint, "--steps", "2")
    assert (first.wait(), right.wait(), server.wait()) == (0, 0, 0)


def test_without_a_server_a_worker_gives_up_and_names_it(cluster):
    worker = cluster.worker(0, "tcp://127.0.0.1:1", PSQ_GIVE_UP_AFTER="0.5")
    assert worker.wait() == EXIT_GAVE_UP
    assert "gave up after" in worker.err()
    assert "waiting for server tcp://127.0.0.1:1" in worker.err()


def test_a_port_in_use_ends_a_server_with_the_address(cluster):
    first = cluster.server()
    second = cluster.server("--bind", first.endpoint, ready=False)
    assert second.wait() == EXIT_CONFIG
    assert f"cannot listen on {first.endpoint}: the address is in use" in second.err()


def test_ctrl_c_ends_a_worker_and_the_server_knows(cluster):
    server = cluster.server("--world-size", "1")
    gate = cluster.folder / "gate"
    os.mkfifo(gate)
    worker = cluster.worker(0, server.endpoint, "--world-size", "1", "--gate", str(gate))
    worker.wait_line("^gate$")
    worker.signal(signal.SIGINT)
    assert worker.wait(timeout_s=5.0) == -signal.SIGINT
    server.wait_line("event=left rank=0 reason=interrupted", err=True)


SCRIPT = """
    import torch
    import psq.torch

    model = torch.nn.Linear(3, 2)
    worker = psq.torch.Worker(model, world_size=1)
    model(torch.ones(1, 3)).sum().backward()
    worker.step()
"""


@pytest.mark.parametrize(
    ("ending", "code", "reason"),
    [
        ("", 0, "done"),
        ("raise SystemExit(0)", 0, "done"),
        ("raise RuntimeError('no more')", 1, 'error text="RuntimeError: no more"'),
        ("raise KeyboardInterrupt", -signal.SIGINT, "interrupted"),
    ],
)
def test_a_script_that_just_ends_leaves_with_its_reason(cluster, ending, code, reason):
    server = cluster.server("--world-size", "1")
    script = cluster.folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT) + ending + "\n")
    worker = cluster.worker(0, server.endpoint, script=script)
    assert worker.wait() == code
    server.wait_line(f"event=left rank=0 reason={reason}", err=True)


def test_a_server_that_comes_back_without_its_state_ends_its_workers(cluster):
    server = cluster.server("--world-size", "1")
    gate = cluster.folder / "gate"
    os.mkfifo(gate)
    worker = cluster.worker(
        0, server.endpoint, "--world-size", "1", "--gate", str(gate), "--gate-step", "1"
    )
    worker.wait_line("^gate$")
    server.signal(signal.SIGKILL)
    server.wait()
    cluster.server("--bind", server.endpoint)
    gate.write_bytes(b"")
    assert worker.wait() == 1
    assert "came back without its state; start the job again" in worker.err()


@pytest.mark.parametrize(
    ("options", "number", "code", "reason"),
    [
        ((), signal.SIGTERM, 0, "stopped"),
        (("--give-up-after", "0.5"), 0, EXIT_GAVE_UP, "gave-up"),
    ],
)
def test_a_worker_that_computes_hears_that_the_server_has_ended(
    cluster, options, number, code, reason
):
    """Its own patience is 15 minutes: without that word it would wait for nobody so long."""
    server = cluster.server("--world-size", "1", *options)
    gate = cluster.folder / "gate"
    os.mkfifo(gate)
    worker = cluster.worker(0, server.endpoint, "--world-size", "1", "--gate", str(gate))
    worker.wait_line("^gate$")
    server.signal(number)
    assert server.wait() == code
    gate.write_bytes(b"")
    assert worker.wait(timeout_s=5.0) == EXIT_GAVE_UP
    assert f"the server ended the job ({reason})" in worker.err()

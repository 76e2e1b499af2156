"""Real processes with keys: who gets in, what those hear who do not, and what is never told."""

import json
import os
import re
import signal
import socket
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from psq.errors import EXIT_CONFIG, EXIT_GAVE_UP, EXIT_REFUSED
from psq.keys import Ranks, read_secret
from psq_worker.keys import add_workers, make_keys, revoke

ANYWHERE = "tcp://0.0.0.0:0"
STEPS = ("--steps", "3")


@pytest.fixture
def keys(cluster):
    """Keys of three ranks; a job here has two."""
    root = cluster.folder / "keys"
    make_keys(root, 3)
    return root


@pytest.fixture
def server(cluster, keys):
    return cluster.server("--world-size", "2", "--json", "--keys", str(keys))


def worker(cluster, server, rank, folder, *options, **variables):
    given = {"PSQ_KEYS": str(folder)} if folder is not None else {}
    return cluster.worker(rank, server.endpoint, *(options or STEPS), **given, **variables)


def secrets_of(root):
    return [read_secret(path).secret for path in sorted(root.rglob("*.secret"))]


def loopback(endpoint):
    return endpoint.replace("0.0.0.0", "127.0.0.1")  # noqa: S104 - no bind


def summary(server):
    return json.loads(server.out().splitlines()[-1])


def test_a_job_with_keys_trains_to_the_same_bytes_as_one_without(cluster, keys):
    weights = []
    for folder in (None, keys):
        words = () if folder is None else ("--keys", str(folder))
        server = cluster.server("--world-size", "2", *words)
        out = cluster.folder / f"{folder is None}.npz"
        pair = [
            worker(cluster, server, rank, folder, *STEPS, *(("--out", str(out)) * (rank == 0)))
            for rank in range(2)
        ]
        assert [each.wait() for each in pair] == [0, 0]
        assert server.wait() == 0
        with np.load(out) as arrays:
            weights.append({name: arrays[name].tobytes() for name in arrays})
    assert weights[0] == weights[1]


def test_with_keys_a_server_may_be_reached_from_anywhere_and_is_not_insecure(cluster, keys):
    server = cluster.server("--bind", ANYWHERE, "--world-size", "1", "--keys", str(keys))
    with urllib.request.urlopen(server.metrics) as page:  # noqa: S310 - loopback
        assert "\npsq_insecure 0.0\n" in page.read().decode()
    assert "event=insecure" not in server.err()
    assert server.metrics.startswith("http://127.0.0.1:")
    mine = {"PSQ_KEYS": str(keys)}
    only = cluster.worker(0, loopback(server.endpoint), *STEPS, "--world-size", "1", **mine)
    assert (only.wait(), server.wait()) == (0, 0)


def test_without_keys_a_server_that_others_could_reach_does_not_start(cluster):
    server = cluster.server("--bind", ANYWHERE, ready=False)
    assert server.wait() == EXIT_CONFIG
    assert "psq keygen" in server.err()
    assert "--insecure-plaintext" in server.err()


def test_metrics_are_told_to_other_machines_by_name_only_and_with_a_warning(cluster):
    server = cluster.server("--metrics-host", "0.0.0.0")  # noqa: S104 - the point of this test
    server.wait_line("warning event=open-metrics", err=True)


@pytest.mark.parametrize(
    ("whose", "words"),
    [
        ("unknown", "refused the key of this worker"),
        ("none", "wants keys and this worker has none: give it its own with --keys"),
    ],
)
def test_a_worker_that_is_not_let_in_ends_with_77_and_says_why(cluster, server, keys, whose, words):
    elsewhere = cluster.folder / "elsewhere"
    make_keys(elsewhere, 2)
    # Its own key, which this server does not know, and this server's: so it talks to it.
    (elsewhere / "rank1" / "server.pub").write_bytes((keys / "rank1" / "server.pub").read_bytes())
    stranger = worker(cluster, server, 1, elsewhere if whose == "unknown" else None)
    assert stranger.wait() == EXIT_REFUSED
    assert words in stranger.err()
    pair = [worker(cluster, server, rank, keys) for rank in range(2)]
    assert [each.wait() for each in pair] == [0, 0]
    assert server.wait() == 0
    assert summary(server)["refused_keys"] == 1 + (whose == "unknown")  # one is the canary's


def test_a_worker_with_keys_does_not_join_a_server_without(cluster, keys):
    server = cluster.server("--world-size", "1")
    it = worker(cluster, server, 0, keys, *STEPS, "--world-size", "1")
    assert it.wait() == EXIT_REFUSED
    assert "speaks plaintext and this worker has keys" in it.err()


def test_a_worker_waits_for_the_server_with_the_right_key_and_gives_up_by_name(cluster, keys):
    other = cluster.folder / "other"
    make_keys(other, 1)
    server = cluster.server("--world-size", "1", "--keys", str(other))
    it = worker(cluster, server, 0, keys, *STEPS, "--world-size", "1", PSQ_GIVE_UP_AFTER="1")
    assert it.wait() == EXIT_GAVE_UP
    assert f"waiting for server {server.endpoint}" in it.err()
    assert "handshake" in it.err()


def test_the_right_key_does_not_open_another_rank(cluster, server, keys):
    # The worker itself would refuse; this one believes that its key is rank 1's.
    path = keys / "rank0" / "worker.secret"
    path.write_text(path.read_text().replace('ranks = "0"', 'ranks = "1"'))
    liar = worker(cluster, server, 1, keys / "rank0")
    assert liar.wait() == EXIT_REFUSED
    assert "the key 'rank0' may speak for rank 0, not for rank 1" in liar.err()
    server.wait_line("warning event=refused", err=True)


def test_the_key_of_another_rank_is_refused_by_the_worker_itself(cluster, server, keys):
    it = worker(cluster, server, 1, keys / "rank0")
    assert it.wait() == EXIT_CONFIG
    assert "is the key of rank 0, and this process speaks for rank 1" in it.err()


def test_who_is_revoked_is_cut_off_while_it_trains_and_its_place_is_free(cluster, server, keys):
    gate = cluster.folder / "gate"
    os.mkfifo(gate)
    held = worker(cluster, server, 0, keys, *STEPS, "--gate", str(gate), "--gate-step", "1")
    revoked = worker(cluster, server, 1, keys)
    held.wait_line("^gate$")
    revoke(keys, ["rank1"])
    server.wait_line("authorized_workers has changed: in none; out rank1", err=True)
    assert revoked.wait() == EXIT_REFUSED
    assert "refused the key of this worker" in revoked.err()
    server.wait_line("event=disconnected rank=1", err=True)
    # A new key for the same rank, made while the server runs.
    (keys / "rank1").rename(keys / "old")
    add_workers(keys, [1])
    again = worker(cluster, server, 1, keys)
    again.wait_line("^joined")
    gate.write_bytes(b"")
    assert (held.wait(), again.wait(), server.wait()) == (0, 0, 0)


def test_secrets_are_in_no_log_no_command_line_and_no_environment(cluster, server, keys):
    gate = cluster.folder / "gate"
    os.mkfifo(gate)
    pair = [
        worker(cluster, server, 0, keys, *STEPS, "--gate", str(gate), PSQ_DEBUG="1"),
        worker(cluster, server, 1, keys, PSQ_DEBUG="1"),
    ]
    elsewhere = cluster.folder / "elsewhere"
    make_keys(elsewhere, 3)
    stranger = worker(cluster, server, 2, elsewhere, *STEPS, "--world-size", "3")
    pair[0].wait_line("^gate$")
    told = b""
    for pid in (server.pid, pair[0].pid, pair[1].pid):
        told += Path(f"/proc/{pid}/cmdline").read_bytes()
        told += Path(f"/proc/{pid}/environ").read_bytes()
    url = server.metrics.removesuffix("metrics")
    for page in ("metrics", "status", "healthz"):
        with urllib.request.urlopen(url + page) as answer:  # noqa: S310 - loopback
            told += answer.read()
    gate.write_bytes(b"")
    assert [each.wait() for each in (*pair, server)] == [0, 0, 0]
    stranger.signal(signal.SIGTERM)
    stranger.wait()
    for program in cluster.programs:
        told += (program.out() + program.err()).encode()
    secrets = secrets_of(keys) + secrets_of(elsewhere)
    assert len(secrets) == 8
    assert not [secret for secret in secrets if secret.encode() in told]
    assert str(keys).encode() in told  # it was the right place to look


def test_a_secret_that_others_can_read_ends_the_process(cluster, keys):
    (keys / "server" / "server.secret").chmod(0o644)
    server = cluster.server("--keys", str(keys), ready=False)
    assert server.wait() == EXIT_CONFIG
    assert re.search(r"others may use it \(mode 0644\): chmod 600", server.err())


OPEN_DOOR = """
import sys
from psq import curve
from psq_server.cli import main

curve.decide = lambda request, known: ([b"1.0", request[1], b"200", b"OK", b"x", b""], "", "")
main()
"""


def test_a_server_whose_door_is_open_does_not_start(cluster, keys):
    script = cluster.folder / "open.py"
    script.write_text(OPEN_DOOR)
    words = ("--bind", "tcp://127.0.0.1:0", "--keys", str(keys))
    it = cluster.command(sys.executable, str(script), *words)
    assert it.wait() == EXIT_CONFIG
    assert "let in a key that was made up" in it.err()
    assert "ready" not in it.out()


def test_a_stranger_that_floods_the_door_does_not_hold_up_the_job(cluster, server, keys):
    host, port = server.endpoint.removeprefix("tcp://").split(":")
    pair = [worker(cluster, server, rank, keys) for rank in range(2)]
    for _ in range(200):
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48))
    assert [each.wait() for each in (*pair, server)] == [0, 0, 0]


def test_an_aggregator_has_keys_for_both_sides(cluster):
    keys = cluster.folder / "keys"
    make_keys(keys, 2, [Ranks(0, 1)])
    told = ("--keys", str(keys), "--world-size", "2")
    root = cluster.server(*told, "--children", "0-1")
    between = cluster.server(*told, "--parent", root.endpoint, "--children", "0,1")
    # A leaf knows the key of its aggregator only: it does not talk to the server above.
    climber = worker(cluster, root, 0, keys, PSQ_GIVE_UP_AFTER="0.5")
    assert climber.wait() == EXIT_GAVE_UP
    # The default recipe does not go through a tree.
    pair = [worker(cluster, between, rank, keys, PSQ_RECIPE="server-adam") for rank in range(2)]
    assert [each.wait() for each in (*pair, between, root)] == [0, 0, 0, 0]


def test_a_launched_job_hands_its_keys_to_every_process(cluster):
    keys = cluster.folder / "keys"
    psq = (sys.executable, "-m", "psq_worker.cli")
    made = cluster.command(*psq, "keygen", "-n", "3", "--tree", "2", "-o", str(keys))
    assert made.wait() == 0
    told = ("--task", "char-lm", "--steps", "2", "--keys", str(keys), "--json")
    told += ("--recipe", "server-adam")
    job = cluster.command(*psq, "launch", "-n", "3", "--tree", "2", *told)
    assert job.wait() == 0
    assert json.loads(job.out())
    # The same with the keys of a job of two: rank 2 has none.
    fewer = cluster.folder / "fewer"
    make_keys(fewer, 2)
    told = ("--task", "char-lm", "--steps", "2", "--keys", str(fewer))
    job = cluster.command(*psq, "launch", "-n", "3", *told)
    assert job.wait() == EXIT_CONFIG
    assert "rank2 has a file worker.secret" in job.err()


def test_a_look_at_a_server_takes_keys_too(cluster, server, keys):
    psq = (sys.executable, "-m", "psq_worker.cli")
    look, mine = ("--connect", server.endpoint), ("--keys", str(keys))
    without = cluster.command(*psq, "doctor", *look, "--json")
    within = cluster.command(*psq, "doctor", *look, "--json", *mine)
    advised = cluster.command(*psq, "advise", *look, *mine)
    without.wait()
    within.wait()
    assert "wants keys and this worker has none" in without.out()
    assert "answers: " in within.out()
    assert advised.wait() == 0

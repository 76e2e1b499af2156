"""psq-server as a process: its start, its end, its pages, its options."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from psq.errors import EXIT_CONFIG, EXIT_GAVE_UP, EXIT_STATE, EXIT_USAGE
from psq_proto.messages import MessageType

START_S = 0.3


def join_all(raw, server, plan):
    workers = [raw(server.endpoint, plan, rank).join() for rank in range(plan.world_size)]
    workers[0].init(np.zeros(plan.layout.numel, np.float32))
    for worker in workers:
        worker.pull().frames(0)
    return workers


# ---- the start


def test_the_ready_line_names_both_addresses_the_kernel_and_the_process(cluster):
    server = cluster.server()
    line = server.wait_line(
        r"^psq-server ready endpoint=tcp://127\.0\.0\.1:(\d+) "
        r"metrics=http://127\.0\.0\.1:(\d+)/metrics kernel=(\S+) pid=(\d+)$"
    )
    assert int(line[1]) > 0
    assert int(line[2]) > 0
    assert line[3] in {"reference", "v2", "v3", "v4", "neon"}
    assert int(line[4]) == server.pid


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_start_takes_less_than_the_stated_time(cluster):
    # Of the processor, so that a busy machine does not decide; the fastest of three.
    ticks = os.sysconf("SC_CLK_TCK")

    def start_s():
        pid = cluster.server().pid
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / ticks

    assert min(start_s() for _ in range(3)) < START_S


def test_torch_is_never_imported(cluster, raw, plan_of):
    code = "import sys, psq_server.cli; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code]) == b"False\n"
    server = cluster.server()
    (worker,) = join_all(raw, server, plan_of())
    worker.push_all(np.ones(worker.plan.layout.numel, np.float32))
    assert worker.verdict().outcome == "applied"
    maps = Path(f"/proc/{server.pid}/maps")
    assert not maps.exists() or "torch" not in maps.read_text()


def test_a_port_in_use_is_named_with_what_to_do(cluster):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        server = cluster.command(sys.executable, "-m", "psq_server", "--bind", address)
        assert server.wait() == EXIT_CONFIG
    assert f"cannot listen on {address}: the address is in use" in server.err()
    assert "choose another port" in server.err()
    assert server.out() == ""


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--bind", "tcp://0.0.0.0:0"], EXIT_CONFIG, "--insecure-plaintext"),
        (["--recipe", "adam"], EXIT_CONFIG, "no recipe 'adam'; there are"),
        (["--world-size", "0"], EXIT_CONFIG, "world_size"),
        (["--save", "/nowhere/at/all/w"], EXIT_STATE, "there is no folder /nowhere/at/all"),
        (["--nonsense"], EXIT_USAGE, "--nonsense"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(cluster, options, code, words):
    server = cluster.server(*options, ready=False)
    assert server.wait() == code
    assert words in server.err()
    assert server.out() == ""


def test_a_forced_kernel_that_cannot_run_is_refused(cluster):
    server = cluster.server(ready=False, PSQ_KERNEL="v9")
    assert server.wait() == EXIT_CONFIG
    assert "v9" in server.err()
    assert server.out() == ""


def test_a_parent_that_is_none_is_refused(cluster):
    server = cluster.server(ready=False, PSQ_PARENT_FD="77")
    assert server.wait() == EXIT_CONFIG
    assert "PSQ_PARENT_FD='77' names no open descriptor" in server.err()


def test_options_come_from_the_environment_and_a_file_too(cluster, raw, plan_of, tmp_path):
    file = tmp_path / "psq.toml"
    file.write_text("[server]\nworld_size = 3\nrecipe = 'server-adam'\nlease = 7\n")
    server = cluster.server(PSQ_WORLD_SIZE="2", PSQ_CONFIG=str(file))
    worker = raw(server.endpoint, plan_of(2)).join()
    assert worker.welcome.world_size == 2, "a variable wins over the file"
    assert worker.welcome.lease_s == 7.0


def test_a_variable_that_means_nothing_is_pointed_out(cluster):
    server = cluster.server(PSQ_WORLDSIZE="2")
    server.wait_line("event=unknown-variable name=PSQ_WORLDSIZE meant=PSQ_WORLD_SIZE", err=True)


def test_serving_other_machines_in_the_clear_is_said_at_every_start(cluster, get):
    server = cluster.server("--bind", "tcp://0.0.0.0:0", "--insecure-plaintext")
    server.wait_line("warning event=insecure", err=True)
    assert "\npsq_insecure 1.0\n" in get(server.metrics)[1]


# ---- the end


def test_told_to_stop_it_saves_says_goodbye_and_ends_well(
    cluster, raw, plan_of, summary_of, tmp_path
):
    path = tmp_path / "w.safetensors"
    server = cluster.server("--json", "--save", str(path))
    first, second = join_all(raw, server, plan_of(2))
    first.push(0, first.encode(np.ones(first.plan.layout.numel, np.float32))[0])
    second.send(MessageType.PULL, version=0)
    server.wait_line("event=weights", err=True)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert first.wait_for(MessageType.BYE).body.reason == "stopped"
    assert second.wait_for(MessageType.BYE).body.reason == "stopped"
    with safe_open(path, "numpy") as saved:
        assert saved.metadata()["version"] == "0"
    assert summary_of(server)["reason"] == "stopped"


def test_ctrl_c_is_an_orderly_end_too(cluster):
    server = cluster.server()
    server.signal(signal.SIGINT)
    assert server.wait() == 0


def test_a_wait_beyond_its_bound_ends_with_a_code_of_its_own(cluster, summary_of):
    server = cluster.server("--give-up-after", "0.3", "--json")
    assert server.wait() == EXIT_GAVE_UP
    assert summary_of(server)["text"].startswith("gave up waiting for the first worker for")
    assert "event=stop reason=gave-up" in server.err()


def test_weights_that_cannot_be_saved_end_it_with_a_code_of_its_own(
    cluster, raw, plan_of, tmp_path
):
    folder = tmp_path / "gone"
    folder.mkdir()
    server = cluster.server("--save", str(folder / "w"))
    (worker,) = join_all(raw, server, plan_of())
    folder.rmdir()
    assert worker.leave().reason == "done", "workers are told all the same"
    assert server.wait() == EXIT_STATE
    assert "event=not-saved" in server.err()


def test_a_killed_parent_takes_its_server_with_it(cluster, until):
    parent = (
        "import os, signal, subprocess, sys\n"
        "reader, writer = os.pipe()\n"
        "env = {**os.environ, 'PSQ_PARENT_FD': str(reader)}\n"
        "command = [sys.executable, '-m', 'psq_server', '--bind', 'tcp://127.0.0.1:0']\n"
        "subprocess.Popen(command, env=env, pass_fds=[reader])\n"
        "signal.pause()\n"
    )
    launcher = cluster.command(sys.executable, "-c", parent, name="launcher")
    pid = int(launcher.wait_line(r"^psq-server ready .* pid=(\d+)$")[1])
    launcher.signal(signal.SIGKILL)
    launcher.wait()
    until(lambda: "event=stop reason=stopped" in launcher.err(), "an orderly end of the server")
    until(lambda: not launcher.orphans(), "the end of the server")
    assert not Path(f"/proc/{pid}").exists()


# ---- the pages


def test_metrics_tell_of_a_round(cluster, raw, plan_of, get):
    server = cluster.server()
    (worker,) = join_all(raw, server, plan_of())
    worker.push_all(np.ones(worker.plan.layout.numel, np.float32))
    worker.frames(1)
    code, text = get(server.metrics)
    assert code == 200
    for line in (
        "psq_rounds_total 1.0",
        'psq_pushes_total{outcome="staged"} 1.0',
        "psq_step_seconds_count 1.0",
        'psq_phase_seconds_count{phase="reduce"} 1.0',
        "psq_insecure 0.0",
    ):
        assert f"\n{line}\n" in text
    assert re.search(r'psq_build_info{kernel="\w+",role="server",version="[\d.]+"} 1.0', text)
    assert float(re.search(r'psq_wire_bytes_total{direction="sent"} (\S+)', text)[1]) > 4000


def health_of(get, server):
    code, text = get(server.metrics.replace("/metrics", "/healthz"))
    return code, json.loads(text)


def test_healthz_tells_who_is_waited_for(cluster, raw, plan_of, get, until):
    server = cluster.server()
    code, health = health_of(get, server)
    assert (code, health["status"], health["version"]) == (200, "waiting", -1)
    assert health["text"].startswith("waiting for the first worker for")
    raw(server.endpoint, plan_of(2)).join()
    words = "never seen (to join)"
    until(lambda: words in health_of(get, server)[1]["text"], "another text, at the next tick")
    assert "rank 1 of 2" in health_of(get, server)[1]["text"]


def test_healthz_goes_bad_when_a_lost_worker_holds_up_the_job(cluster, raw, plan_of, get, until):
    server = cluster.server("--lease", "0.3")
    _, lost = join_all(raw, server, plan_of(2))
    lost.close()
    until(lambda: health_of(get, server)[0] != 200, "a bad health")
    code, health = health_of(get, server)
    assert (code, health["status"]) == (503, "stalled")
    assert health["text"].startswith("waiting for rank")


def test_a_slow_client_of_the_pages_does_not_delay_the_end(cluster):
    server = cluster.server()
    host, port = server.metrics.removeprefix("http://").removesuffix("/metrics").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"GET /met")
        server.signal(signal.SIGTERM)
        assert server.wait(5.0) == 0

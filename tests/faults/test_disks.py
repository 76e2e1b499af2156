"""Disks that are full, that fail, and that spoil: nobody hears of what is not durable."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest
from cluster.conftest import wait_until

from faults.life import SERVER

STEPS = 14
MANY_STEPS = 100
"""So that a job still runs when its disk is full."""
TMPFS_BYTES = 1 << 20


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a megabyte of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = run("mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(place))
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    run("umount", "--lazy", str(place))


def fill(place):
    """Leave no byte free; returns the file to remove."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def health(life):
    """(status, text) of the server's /healthz."""
    found = re.search(r"metrics=(\S+)/metrics", life.programs[SERVER].out())
    try:
        with urllib.request.urlopen(f"{found[1]}/healthz", timeout=10) as answer:  # noqa: S310
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_full_disk_blocks_the_job_until_there_is_room(life_of, undisturbed, small_disk):
    life = life_of("full", MANY_STEPS, state=small_disk / "state").start()
    life.wait_step(0, 4)
    filler = fill(small_disk)
    wait_until(lambda: health(life)[0] == 503, "bad health")
    status, text = health(life)
    life.wait_silence(1.0)
    assert max(life.step(0), life.step(1)) < MANY_STEPS - 1
    assert status == 503
    assert "disk" in text
    filler.unlink()
    assert life.outcome() == undisturbed(MANY_STEPS)
    assert "event=blocked" in life.programs[SERVER].err()


def test_a_disk_that_fails_to_sync_blocks_the_job_until_it_does(life_of, undisturbed, tmp_path):
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    life = life_of("failing", STEPS)
    life.folder.mkdir()
    server = life.fill(SERVER)
    log = tmp_path / "strace.log"
    inject = "inject=fsync,fdatasync:error=EIO:when=8..10"
    argv = ["strace", "-f", "-qq", "-e", "trace=fsync,fdatasync", "-e", inject, "-o", str(log)]
    tracer = subprocess.Popen([*argv, "-p", str(server.pid)], stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: tracer.poll() is not None or _is_traced(server.pid), "the tracer")
        for rank in range(life.world_size):
            life.fill(rank)
        wait_until(
            lambda: (
                tracer.poll() is not None
                or (log.exists() and log.read_text().count("INJECTED") == 3)
            ),
            "three failed syncs",
        )
        if tracer.poll() is not None:
            _, said = tracer.communicate()
            pytest.skip(f"strace may not trace here: {said.strip()}")
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.communicate()
    assert life.outcome() == undisturbed(STEPS)
    assert "event=blocked" in server.err()


def _is_traced(pid):
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()


# ---- what a disk may have done while nobody ran


def dead_job(life_of, **given):
    """A job whose server was killed after some rounds; its workers wait."""
    life = life_of("dead", STEPS, options=("--checkpoint-every", "100"), **given)
    life.start().wait_step(0, 5)
    assert life.kill(SERVER) == (SERVER,)
    (segment,) = sorted((life.folder / "server" / "journal").glob("*.journal"))[-1:]
    return life, segment


def test_a_torn_record_at_the_end_of_the_journal_changes_nothing(life_of, undisturbed):
    life, segment = dead_job(life_of)
    data = segment.read_bytes().rstrip(b"\0")
    segment.write_bytes(data + os.urandom(777))
    life.fill(SERVER)
    assert life.outcome() == undisturbed(STEPS)
    assert re.search("event=torn", life.programs[SERVER].err())


def test_a_journal_that_is_rotten_in_the_middle_is_refused_by_name(life_of):
    life, segment = dead_job(life_of)
    data = bytearray(segment.read_bytes().rstrip(b"\0"))
    data[4096 + (len(data) - 4096) // 3] ^= 0x10
    segment.write_bytes(data)
    server = life.fill(SERVER, ready=False)
    assert server.wait() == 65
    assert segment.name in server.err()

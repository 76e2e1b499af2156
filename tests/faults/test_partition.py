"""A server in a network namespace of its own, and packets that are dropped on the way to it."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from cluster.conftest import wait_until

from faults import FULL
from faults.life import SERVER

STEPS = 100
SHORT_S, LONG_S = 1.5, 25.0
"""The first is within TCP's patience, the second beyond that of its keepalive."""


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.strip()


class Namespace:
    """A namespace with one address, tied to this one's."""

    def __init__(self, number):
        self.name, self.link = f"psq{number}", f"psq{number}a"
        self.here, self.there = f"10.213.{number % 250}.1", f"10.213.{number % 250}.2"

    def make(self):
        """What is not permitted; empty if all is there."""
        inner = f"{self.link}b"
        for command in (
            ["ip", "netns", "add", self.name],
            ["ip", "link", "add", self.link, "type", "veth", "peer", "name", inner],
            ["ip", "link", "set", inner, "netns", self.name],
            ["ip", "addr", "add", f"{self.here}/24", "dev", self.link],
            ["ip", "link", "set", self.link, "up"],
            self.inside("ip", "addr", "add", f"{self.there}/24", "dev", inner),
            self.inside("ip", "link", "set", inner, "up"),
            self.inside("ip", "link", "set", "lo", "up"),
            self.inside("iptables", "-L", "-n"),
        ):
            code, said = run(*command)
            if code:
                return f"{' '.join(command)}: {said}"
        return ""

    def inside(self, *command):
        return ["ip", "netns", "exec", self.name, *command]

    def drop(self, *chains):
        for chain in chains:
            assert run(*self.inside("iptables", "-A", chain, "-p", "tcp", "-j", "DROP"))[0] == 0

    def dropped(self):
        """How many packets were dropped."""
        said = subprocess.run(
            self.inside("iptables", "-L", "-n", "-v", "-x"),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return sum(int(count) for count in re.findall(r"^\s*(\d+)\s+\d+ DROP", said, re.MULTILINE))

    def heal(self):
        assert run(*self.inside("iptables", "-F"))[0] == 0

    def remove(self):
        run("ip", "link", "del", self.link)
        run("ip", "netns", "del", self.name)


@pytest.fixture
def namespace():
    if shutil.which("ip") is None or shutil.which("iptables") is None:
        pytest.skip("ip and iptables are not installed")
    made = Namespace(os.getpid())
    refused = made.make()
    if refused:
        made.remove()
        pytest.skip(f"no network namespace can be made here: {refused}")
    yield made
    made.remove()


@pytest.fixture
def apart(life_of, cluster, namespace):
    """A job whose server is in the namespace."""
    life = life_of("apart", STEPS)
    life.folder.mkdir()
    server = cluster.command(
        *namespace.inside(sys.executable, "-m", "psq_server"),
        *("--bind", f"tcp://{namespace.there}:0", "--insecure-plaintext"),
        *("--state-dir", str(life.folder / "server"), "--save", str(life.saved), *life.options),
        name="server",
    )
    life.endpoint = server.wait_line(r"^psq-server ready endpoint=(\S+)")[1]
    life.programs[SERVER] = server
    for rank in range(life.world_size):
        life.fill(rank)
    return life


@pytest.mark.parametrize("seconds", [SHORT_S, *([LONG_S] if FULL else [])])
@pytest.mark.parametrize("chains", [("INPUT", "OUTPUT"), ("INPUT",), ("OUTPUT",)], ids="+".join)
def test_a_partition_that_heals_changes_nothing(apart, undisturbed, namespace, chains, seconds):
    apart.wait_step(0, 4)
    namespace.drop(*chains)
    wait_until(lambda: namespace.dropped() > 0, "a dropped packet")
    apart.wait_silence(seconds)
    assert max(apart.step(0), apart.step(1)) < STEPS - 1
    namespace.heal()
    assert apart.outcome() == undisturbed(STEPS)

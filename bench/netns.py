"""A star of machines on one: a namespace per machine, joined by links of a stated rate.

    [server]==eth0--v0==[hub: bridge]==v1--eth0==[worker0]
                                     ==v2--eth0==[worker1]     == is a queue shaped by tc tbf

Each machine is a network namespace with a veth pair to a bridge in the hub's namespace. Both ends
are shaped, so that a machine's way up and its way down have the rate each, as with full-duplex
Ethernet; what a machine says to itself goes over its own lo and is not shaped. The MTU is 1500.
Nothing touches the host's own network. Names carry the pid; leaving the context removes it all,
after errors and Ctrl-C too, and what a killed run left behind goes when the next one starts.

The burst is what 1 ms carries, but no less than one segment of offloaded TCP: enough to reach the
rate, and at most 64 KiB or 1 ms that a step gets as a present. The queue is what 50 ms carry.

Run as a script it measures a TCP stream between two machines at each rate. Payload is 1448 of 1514
bytes of every full frame, so 95.6 % of the rate is all that a program can see.

    python bench/netns.py [--rates 100mbit,1gbit,10gbit] [--seconds 2] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
MIN_BURST_BYTES = 64 * 1024
BURST_S = 1e-3
QUEUE_S = 50e-3
FRAME_BYTES, FRAME_PAYLOAD_BYTES = 1514, 1448
PREFIX = "psqbench"
SUBNET = "10.83.0"
RAMP_S = 0.5  # until the burst is used up and TCP has found the rate
READ_BYTES = 1 << 20
TOLERANCE = 0.05


@dataclass(frozen=True)
class Star:
    """Machines that are up: the namespace and the address of each by name."""

    spaces: dict[str, str]
    addresses: dict[str, str]
    hub: str
    rate_bit_s: float

    def argv(self, machine: str, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` on a machine."""
        return ["ip", "netns", "exec", self.spaces[machine], *argv]

    def run(self, machine: str, argv: Sequence[str], **popen: Any) -> subprocess.Popen[str]:
        """Start a process on a machine; whoever starts it ends it before the star goes."""
        return subprocess.Popen(self.argv(machine, argv), text=True, **popen)

    def sent_bytes(self) -> dict[str, tuple[int, int]]:
        """(up, down) of each machine: bytes on its link so far, frame headers included."""
        down = _queue_bytes(self.hub)
        return {
            machine: (_queue_bytes(space)["eth0"], down[f"v{index}"])
            for index, (machine, space) in enumerate(self.spaces.items())
        }


def rate_of(text: str) -> float:
    """Bits per second of a rate as tc writes it: 100mbit, 2.5gbit."""
    match = re.fullmatch(r"([0-9.]+)([kmg]bit)", text.strip().lower())
    if match is None:
        msg = f"the rate {text!r} is not like 100mbit or 2.5gbit"
        raise ValueError(msg)
    return float(match[1]) * UNITS[match[2]]


def unavailable() -> str:
    """Why no namespaces can be made here; empty when they can."""
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"network namespaces need {' and '.join(missing)} (Debian: iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"{PREFIX}{os.getpid()}-probe"
    try:
        _do(f"ip netns add {probe}")
        _do(f"ip netns delete {probe}")
    except subprocess.CalledProcessError as error:
        return f"no network namespace can be made: {error.stderr.strip()}"
    return ""


@contextlib.contextmanager
def star(machines: Sequence[str], rate_bit_s: float) -> Iterator[Star]:
    """Machines of these names, each on a link of this rate; gone when the context is left."""
    _sweep()
    mark = f"{PREFIX}{os.getpid()}"
    hub, spaces = f"{mark}-hub", {machine: f"{mark}-{machine}" for machine in machines}
    addresses = {machine: f"{SUBNET}.{index + 1}" for index, machine in enumerate(machines)}
    try:
        _do(f"ip netns add {hub}")
        _do(f"ip -n {hub} link add br0 type bridge")
        _do(f"ip -n {hub} link set br0 up")
        for index, machine in enumerate(machines):
            _join(hub, f"v{index}", spaces[machine], addresses[machine], rate_bit_s)
        yield Star(spaces, addresses, hub, rate_bit_s)
    finally:
        for space in (hub, *spaces.values()):
            _delete(space)


def _join(hub: str, port: str, space: str, address: str, rate_bit_s: float) -> None:
    _do(f"ip netns add {space}")
    _do(f"ip -n {hub} link add {port} type veth peer name eth0 netns {space}")
    _do(f"ip -n {hub} link set {port} master br0 up")
    _do(f"ip -n {space} link set lo up")
    _do(f"ip -n {space} address add {address}/24 dev eth0")
    _do(f"ip -n {space} link set eth0 up")
    burst = max(MIN_BURST_BYTES, round(rate_bit_s / 8 * BURST_S))
    queue = max(2 * burst, round(rate_bit_s / 8 * QUEUE_S))
    shape = f"tbf rate {round(rate_bit_s)}bit burst {burst} limit {queue}"
    _do(f"tc -n {space} qdisc add dev eth0 root {shape}")
    _do(f"tc -n {hub} qdisc add dev {port} root {shape}")


def _do(command: str) -> str:
    done = subprocess.run(command.split(), check=True, capture_output=True, text=True)
    return done.stdout


def _delete(space: str) -> None:
    with contextlib.suppress(subprocess.CalledProcessError):  # it may not have been made yet
        _do(f"ip netns delete {space}")


def _sweep() -> None:
    """Remove what a run left behind that was killed."""
    for name in re.findall(rf"^({PREFIX}\d+-\w+)", _do("ip netns list"), re.MULTILINE):
        pid = int(name.removeprefix(PREFIX).split("-")[0])
        if not os.path.exists(f"/proc/{pid}"):  # noqa: PTH110 - /proc is no tree of files
            _delete(name)


def _queue_bytes(space: str) -> dict[str, int]:
    queues = json.loads(_do(f"tc -n {space} -s -j qdisc show"))
    return {q["dev"]: int(q["bytes"]) for q in queues if q["kind"] == "tbf"}


# ---- the links themselves, measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", default="100mbit,1gbit,10gbit")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sink", metavar="ADDRESS", help=argparse.SUPPRESS)
    parser.add_argument("--source", metavar="ADDRESS:PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sink:
        sink(options.sink, options.seconds)
    elif options.source:
        source(options.source, options.seconds)
    elif reason := unavailable():
        print(f"skipped: {reason}")
    else:
        rows = [measure(rate, options.seconds) for rate in options.rates.split(",")]
        print(json.dumps(rows) if options.json else table(rows))


def measure(rate: str, seconds: float) -> dict[str, Any]:
    """One stream between two machines."""
    script = [sys.executable, __file__, "--seconds", str(seconds)]
    with star(["a", "b"], rate_of(rate)) as net:
        address = net.addresses["b"]
        taker = net.run("b", [*script, "--sink", address], stdout=subprocess.PIPE)
        giver = None
        try:
            assert taker.stdout is not None  # noqa: S101
            port = taker.stdout.readline().strip()
            giver = net.run("a", [*script, "--source", f"{address}:{port}"])
            got = json.loads(taker.stdout.readline())
        finally:
            for process in (taker, giver):
                if process is not None:
                    process.kill()
                    process.wait()
    wire_bit_s = got["bit_s"] * FRAME_BYTES / FRAME_PAYLOAD_BYTES
    return {"rate": rate, "payload_bit_s": got["bit_s"], "share": wire_bit_s / net.rate_bit_s}


def sink(address: str, seconds: float) -> None:
    with socket.create_server((address, 0)) as server:
        print(server.getsockname()[1], flush=True)
        stream, _ = server.accept()
        with stream:
            buffer = bytearray(READ_BYTES)
            ramp_s = time.perf_counter() + RAMP_S
            while time.perf_counter() < ramp_s and stream.recv_into(buffer):
                pass
            start_s, taken = time.perf_counter(), 0
            while (now_s := time.perf_counter()) < start_s + seconds:
                taken += stream.recv_into(buffer)
            print(json.dumps({"bit_s": taken * 8 / (now_s - start_s)}), flush=True)


def source(target: str, seconds: float) -> None:
    address, port = target.split(":")
    with contextlib.suppress(ConnectionError), socket.create_connection((address, int(port))) as s:
        data, end_s = bytes(READ_BYTES), time.perf_counter() + seconds + 4 * RAMP_S
        while time.perf_counter() < end_s:
            s.sendall(data)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| link | payload, Mbit/s | with frame headers, of the rate | |", "|---|--:|--:|---|"]
    for row in rows:
        holds = abs(row["share"] - 1) <= TOLERANCE
        verdict = "within 5 %" if holds else "outside 5 %: the machine, not the link, is the limit"
        lines.append(
            f"| {row['rate']} | {row['payload_bit_s'] / 1e6:.1f} | {row['share']:.3f} | {verdict} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

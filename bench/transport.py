"""How fast psq.link moves frames, as a share of a plain TCP stream between two processes.

`up` is a worker's DEALER to a server's ROUTER, `down` the other way. The sender pushes so many
bytes and waits until the receiver, a process of its own, says that all have come. The plain stream
is one socket, `sendall` of the same buffer against `recv_into`, nothing else. A round measures each
in turn; `best` compares the best times of all rounds, `median` is the median of the rounds' ratios.
CPU is of both processes, per gigabyte. Frames up to 256 KiB are copied by libzmq, larger ones lent.

    python bench/transport.py [--frames 128,1024] [--megabytes 512] [--rounds 7] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

from psq.link import Sent, ServerLink, WorkerLink

PATIENCE_S = 60.0
POOL = 64  # buffers in turn: as many as a queue holds, so that few are still lent
FULL_S = 0.001
DONE = b"done"
HELLO = b"hello"
CPU_FIELDS = slice(11, 13)
TICKS_S = os.sysconf("SC_CLK_TCK")
PLAIN = "plain TCP"


def main() -> None:
    options = parse()
    if options.sink:
        kind, _, address = options.sink.partition(",")
        {"plain": sink_plain, "up": sink_up, "down": sink_down}[kind](address)
        return
    sizes = [int(kib) * 1024 for kib in options.frames.split(",")]
    total = options.megabytes * 1_000_000
    with ExitStack() as stack:
        paths = {
            "up": Up(stack),
            "down": Down(stack),
            PLAIN: Plain(stack),
        }
        times = measure(paths, sizes, total, options.rounds)
    rows = rows_of(times, total)
    print(json.dumps(rows) if options.json else table(rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", default="128,1024", help="KiB")
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sink", metavar="KIND,ADDRESS", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- the sender's side: push(frame bytes, frames) returns when all have come


class Plain:
    """One TCP socket."""

    def __init__(self, stack: ExitStack) -> None:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.child = start(stack, f"plain,{server.getsockname()[1]}")
        server.settimeout(PATIENCE_S)
        self._stream = stack.enter_context(server.accept()[0])

    def push(self, nbytes: int, count: int) -> None:
        frame = bytes(nbytes)
        self._stream.sendall(announce(nbytes, count))
        for _ in range(count):
            self._stream.sendall(frame)
        if self._stream.recv(len(DONE)) != DONE:
            msg = "the receiver ended"
            raise ConnectionError(msg)


class Up:
    """A worker's link to a server's."""

    def __init__(self, stack: ExitStack) -> None:
        self.child = start(stack, "up,", stdout=subprocess.PIPE)
        assert self.child.stdout is not None  # noqa: S101
        self._link = stack.enter_context(WorkerLink(self.child.stdout.readline().strip()))

    def push(self, nbytes: int, count: int) -> None:
        frames = [bytearray(nbytes) for _ in range(POOL)]
        self._send(bytearray(announce(nbytes, count)))
        for index in range(count):
            self._send(frames[index % POOL])
        answer(self._link)

    def _send(self, frame: bytearray) -> None:
        while self._link.is_lent(frame):
            self._link.wait(FULL_S)
        while not self._link.send(frame):
            self._link.wait_room(PATIENCE_S)


class Down:
    """A server's link to a worker's."""

    def __init__(self, stack: ExitStack) -> None:
        self._link = stack.enter_context(ServerLink("tcp://127.0.0.1:0"))
        self.child = start(stack, f"down,{self._link.endpoint}")
        self._peer = answer(self._link)

    def push(self, nbytes: int, count: int) -> None:
        frames = [bytearray(nbytes) for _ in range(POOL)]
        self._send(bytearray(announce(nbytes, count)))
        for index in range(count):
            self._send(frames[index % POOL])
        answer(self._link)

    def _send(self, frame: bytearray) -> None:
        while self._link.is_lent(frame) or self._link.send(self._peer, frame) is Sent.FULL:
            self._link.wait(FULL_S)


def start(stack: ExitStack, sink: str, **popen: Any) -> subprocess.Popen[str]:
    """The receiver of this path; it is ended with the context."""
    child = subprocess.Popen([sys.executable, __file__, "--sink", sink], text=True, **popen)
    stack.callback(child.wait)
    stack.callback(child.kill)
    return child


def announce(nbytes: int, count: int) -> bytes:
    return nbytes.to_bytes(8, "little") + count.to_bytes(8, "little")


def announced(text: bytes | memoryview) -> tuple[int, int]:
    return int.from_bytes(text[:8], "little"), int.from_bytes(text[8:16], "little")


def answer(link: ServerLink | WorkerLink) -> bytes:
    """Wait for the other side's word; the peer it came from, of a server's link."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        link.wait(PATIENCE_S)
        for came in link.drain():
            return came[0] if isinstance(came, tuple) else b""
    msg = f"the receiver said nothing for {PATIENCE_S:.0f} s"
    raise TimeoutError(msg)


# ---- the receiver's side


def sink_plain(port: str) -> None:
    with socket.create_connection(("127.0.0.1", int(port))) as stream:
        while head := stream.recv(16, socket.MSG_WAITALL):
            nbytes, count = announced(head)
            buffer, left = bytearray(nbytes), nbytes * count
            while left:
                left -= stream.recv_into(buffer, min(left, nbytes))
            stream.sendall(DONE)


def sink_up(_: str) -> None:
    with ServerLink("tcp://127.0.0.1:0") as link:
        print(link.endpoint, flush=True)
        left = 0
        while True:
            link.wait(PATIENCE_S)
            for peer, frame in link.drain():
                left = announced(frame)[1] if not left else left - 1
                if not left:
                    link.send(peer, DONE)


def sink_down(endpoint: str) -> None:
    with WorkerLink(endpoint) as link:
        link.wait_room(PATIENCE_S)
        link.send(HELLO)
        left = 0
        while True:
            link.wait(PATIENCE_S)
            for frame in link.drain():
                left = announced(frame)[1] if not left else left - 1
                if not left:
                    link.send(DONE)


# ---- measuring


def measure(
    paths: dict[str, Any], sizes: list[int], total: int, rounds: int
) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """(wall, CPU) seconds of each path and frame size, by round."""
    times: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for turn in range(rounds + 1):
        for nbytes in sizes:
            for name, path in paths.items():
                before_s, before_cpu_s = time.perf_counter(), cpu_s(path.child.pid)
                path.push(nbytes, total // nbytes)
                done_s, done_cpu_s = time.perf_counter(), cpu_s(path.child.pid)
                if turn:  # the first round warms up
                    spent = (done_s - before_s, done_cpu_s - before_cpu_s)
                    times.setdefault((name, nbytes), []).append(spent)
    return times


def cpu_s(child: int) -> float:
    """Of this process and the receiver."""
    with open(f"/proc/{child}/stat", encoding="ascii") as stat:  # noqa: PTH123 - one line
        fields = stat.read().rpartition(")")[2].split()[CPU_FIELDS]
    return time.process_time() + sum(map(int, fields)) / TICKS_S


def rows_of(
    times: dict[tuple[str, int], list[tuple[float, float]]], total: int
) -> list[dict[str, Any]]:
    rows = []
    for (name, nbytes), spent in times.items():
        plain = [wall_s for wall_s, _ in times[PLAIN, nbytes]]
        walls = [wall_s for wall_s, _ in spent]
        rows.append(
            {
                "path": name,
                "frame_kib": nbytes // 1024,
                "gb_s": total / 1e9 / min(walls),
                "best": min(plain) / min(walls),
                "median": statistics.median(p / w for p, w in zip(plain, walls, strict=True)),
                "cpu_s_gb": statistics.median(cpu for _, cpu in spent) / (total / 1e9),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| path | frame, KiB | GB/s | of plain TCP: best | median | CPU s/GB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['path']} | {row['frame_kib']} | {row['gb_s']:.2f} | {row['best']:.2f} | "
        f"{row['median']:.2f} | {row['cpu_s_gb']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

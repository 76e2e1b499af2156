"""What keys cost: CPU per gigabyte on each side, memory of idle peers, and how fast peers get in.

`cost` sends frames from a worker's link to a server's in another process, in turn with keys and
without, and takes each process's own CPU time; what keys cost is the difference of neighbours.
`peers` connects many workers with keys, which then say nothing, and compares the server's resident
memory before and after; the rate is of the whole handshake, both sides and the door included, on
the cores that both share. `endless` is one peer whose message never ends, in plaintext, which costs
the most memory for each byte sent. `floor` is the cipher alone, of the libsodium that libzmq uses.

    python bench/security.py [cost|peers|endless|floor ...] [--frames 128,1024] [--megabytes 512]
                             [--rounds 7] [--peers 4000] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq

from psq.curve import new_pair, use_worker_keys
from psq.keys import AUTHORIZED, Ranks, ServerKeys, WorkerKeys, write_public
from psq.link import ServerLink, WorkerLink
from psq.process import keep_freed_memory

PATIENCE_S = 120.0
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
SETTLE_TURNS = 120  # a little over 10 s: handshakes' memory is given back
TOGETHER = 64  # peers that knock at the same time


def main() -> None:
    options = parse()
    if options.child:
        {"cost": receive, "peers": crowd}[options.child[0]](options)
        return
    found: dict[str, Any] = {}
    for what in options.what or list(PARTS):
        found[what] = PARTS[what](options)
    print(json.dumps(found, indent=2) if options.json else table(found))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what", nargs="*", default=[], help="cost, peers, endless, floor; none: all"
    )
    parser.add_argument("--frames", default="128,1024", help="KiB")
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", type=int, default=4000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


@contextlib.contextmanager
def keys_of_one() -> Iterator[tuple[ServerKeys, WorkerKeys]]:
    """A server's keys, and those of the one worker that it lets in."""
    folder = Path(tempfile.mkdtemp())
    try:
        authorized = folder / AUTHORIZED
        authorized.mkdir(mode=0o700)
        server, worker = new_pair(), new_pair()
        write_public(authorized / "rank0.pub", worker.public, "rank 0", Ranks(0, 0))
        yield ServerKeys(server, authorized), WorkerKeys(worker, server.public, folder)
    finally:
        shutil.rmtree(folder)


def child(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None  # noqa: S101 - it was asked for
    process.stdin.write(line + "\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None  # noqa: S101 - it was asked for
    return process.stdout.readline().strip()


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# ---- what a gigabyte costs


def cost(options: argparse.Namespace) -> list[dict[str, Any]]:
    keep_freed_memory()
    rows = []
    for kib in map(int, options.frames.split(",")):
        nbytes, count = kib * 1024, options.megabytes * 1_000_000 // (kib * 1024)
        told: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for _ in range(options.rounds):
            for keyed in (False, True):
                told[keyed].append(one_way(nbytes, count, keyed=keyed))
        gigabytes = nbytes * count / 1e9
        for side, name in enumerate(("sender", "receiver")):
            plain = [pair[side] / gigabytes for pair in told[False]]
            keyed_ = [pair[side] / gigabytes for pair in told[True]]
            more = [after - before for before, after in zip(plain, keyed_, strict=True)]
            rows.append(
                {
                    "frame_kib": kib,
                    "side": name,
                    "plain_best": min(plain),
                    "keys_best": min(keyed_),
                    "more_best": min(keyed_) - min(plain),
                    "more_median": statistics.median(more),
                }
            )
    return rows


def one_way(nbytes: int, count: int, *, keyed: bool) -> tuple[float, float]:
    """(the sender's, the receiver's) CPU seconds for so many frames."""
    with keys_of_one() as (server, worker):
        words = [server.own.public, server.own.secret, str(server.authorized)] if keyed else []
        receiver = child("cost", str(count))
        tell(receiver, json.dumps(words))
        with WorkerLink(hear(receiver), keys=worker if keyed else None) as link:
            while not link.send(b"begin"):
                link.wait_room(1.0)
            hear(receiver)
            frames = [bytearray(os.urandom(nbytes)) for _ in range(8)]
            began_s = cpu_s()
            for index in range(count):
                while not link.send(frames[index % 8]):
                    link.wait_room(1.0)
            received_s = float(hear(receiver))
            sent_s = cpu_s() - began_s
        receiver.wait(PATIENCE_S)
    return sent_s, received_s


def receive(options: argparse.Namespace) -> None:
    keep_freed_memory()
    count, words = int(options.child[1]), json.loads(sys.stdin.readline())
    keys = None
    if words:
        own = new_pair()
        own = type(own)(words[0], words[1])
        keys = ServerKeys(own, Path(words[2]))
    with ServerLink("tcp://127.0.0.1:0", keys=keys) as link:
        print(link.endpoint, flush=True)
        wait_frames(link, 1)
        print("begun", flush=True)
        began_s = cpu_s()
        wait_frames(link, 1 + count)
        print(cpu_s() - began_s, flush=True)


def wait_frames(link: ServerLink, count: int) -> None:
    ends_s = time.monotonic() + PATIENCE_S
    while link.received_frames < count and time.monotonic() < ends_s:
        link.wait(1.0)
        for _ in link.drain():
            pass


# ---- many that say nothing


def peers(options: argparse.Namespace) -> dict[str, Any]:
    with (
        keys_of_one() as (server, worker),
        ServerLink("tcp://127.0.0.1:0", keys=server) as link,
    ):
        together = child("peers", str(options.peers))
        tell(together, json.dumps([link.endpoint, server.own.public, *words_of(worker)]))
        hear(together)
        turn(link)
        before, began_s, began_cpu_s = resident_bytes(), time.monotonic(), cpu_s()
        tell(together, "connect")
        os.set_blocking(together.stdout.fileno(), False)
        done = ""
        while not done and time.monotonic() - began_s < PATIENCE_S:
            turn(link)
            done = hear(together) if link.connections >= options.peers else ""
        took_s, cpu = time.monotonic() - began_s, cpu_s() - began_cpu_s
        assert done == "connected"  # noqa: S101 - else nothing was measured
        for _ in range(SETTLE_TURNS):
            turn(link)
        idle_s = cpu_s()
        for _ in range(20):
            turn(link)
        each = (resident_bytes() - before) / options.peers
        found = {
            "peers": link.connections,
            "bytes_each": round(each),
            "handshakes_per_s": round(options.peers / took_s),
            "server_cpu_ms_each": round(1000 * cpu / options.peers, 3),
            "idle_cpu_share": round((cpu_s() - idle_s) / (20 * 0.1), 4),
        }
        tell(together, "end")
        together.wait(PATIENCE_S)
    return found


def words_of(worker: WorkerKeys) -> list[str]:
    return [worker.own.public, worker.own.secret]


def turn(link: ServerLink) -> None:
    link.wait(0.1)
    for _ in link.drain():
        pass


def crowd(options: argparse.Namespace) -> None:
    count = int(options.child[1])
    endpoint, server, public, secret = json.loads(sys.stdin.readline())
    pair = type(new_pair())(public, secret)
    keys = WorkerKeys(pair, server, Path())
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, count + 10)
    sockets = []
    for _ in range(count):
        made = context.socket(zmq.DEALER)
        made.setsockopt(zmq.LINGER, 0)
        made.setsockopt(zmq.IMMEDIATE, 1)
        made.setsockopt(zmq.HANDSHAKE_IVL, 0)
        use_worker_keys(made, keys)
        sockets.append(made)
    print("made", flush=True)
    sys.stdin.readline()
    for begin in range(0, count, TOGETHER):
        few = sockets[begin : begin + TOGETHER]
        for made in few:
            made.connect(endpoint)
        for made in few:
            made.poll(int(PATIENCE_S * 1000), zmq.POLLOUT)  # only once it is let in
    print("connected", flush=True)
    sys.stdin.readline()
    context.destroy(0)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# ---- one that says too much


def endless(options: argparse.Namespace) -> dict[str, Any]:
    del options
    with ServerLink("tcp://127.0.0.1:0") as link:
        port = int(link.endpoint.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as peer:
            peer.sendall(GREETING + bytes([4, len(READY)]) + READY)
            turn(link)
            peer.settimeout(0.0)
            before, most, sent, began_s = resident_bytes(), 0, 0, time.monotonic()
            while not link.hung_up and time.monotonic() - began_s < PATIENCE_S:
                ends_s = time.monotonic() + 0.25  # as often as a server's loop turns
                while time.monotonic() < ends_s:
                    try:
                        sent += peer.send(b"\x01\x00" * 32768)
                    except BlockingIOError:
                        time.sleep(0.0001)
                    except OSError:
                        break
                most = max(most, resident_bytes() - before)
                turn(link)
            took_s = time.monotonic() - began_s
        for _ in range(5):
            turn(link)
        return {
            "seconds": round(took_s, 2),
            "sent_mb": round(sent / 1e6, 1),
            "most_mb": round(most / 1e6, 1),
            "left_mb": round((resident_bytes() - before) / 1e6, 1),
        }


# ---- the cipher alone


def floor(options: argparse.Namespace) -> list[dict[str, Any]]:
    maps = Path("/proc/self/maps").read_text().split()
    sodium = ctypes.CDLL(next(word for word in maps if "libsodium" in word))
    sodium.sodium_init()
    nonce, key, rows = bytes(24), bytes(32), []
    for nbytes in (int(kib) * 1024 for kib in options.frames.split(",")):
        plain, sealed = os.urandom(nbytes), ctypes.create_string_buffer(nbytes + 16)
        opened, size = ctypes.create_string_buffer(nbytes), ctypes.c_ulonglong(nbytes)
        times_s: dict[str, list[float]] = {"seal": [], "open": []}
        for _ in range(200_000_000 // nbytes):
            began_s = time.thread_time()
            sodium.crypto_secretbox_easy(sealed, plain, size, nonce, key)
            sealed_s = time.thread_time()
            sealed_size = ctypes.c_ulonglong(nbytes + 16)
            assert not sodium.crypto_secretbox_open_easy(opened, sealed, sealed_size, nonce, key)  # noqa: S101
            times_s["seal"].append(sealed_s - began_s)
            times_s["open"].append(time.thread_time() - sealed_s)
        each = {name: statistics.median(found) / nbytes * 1e9 for name, found in times_s.items()}
        rows.append({"frame_kib": nbytes // 1024, **each})
    return rows


def table(found: dict[str, Any]) -> str:
    lines = []
    for what, rows in found.items():
        for row in rows if isinstance(rows, list) else [rows]:
            said = (f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
            lines.append(f"{what}: {' '.join(said)}")
    return "\n".join(lines)


PARTS = {"cost": cost, "peers": peers, "endless": endless, "floor": floor}

if __name__ == "__main__":
    main()

"""What a durable server costs: the same job at each level, from nothing kept to a journal.

    python bench/durability.py [--hidden 1448] [--steps 10] [--repeats 7] [--folder DIR]

Four servers and two worker processes run side by side. The workers take so many steps with one
server, then with the next, again and again, so that whatever else the machine does falls upon all
of them. A round is a step as rank 0 sees it: forward, backward, push, the server, the answer. Given
are times of a round beside those without --state-dir, best and median, and how much of the server's
processor time a round took.

    python bench/durability.py --restart [--mb 300]

A job of so much state (x, two moments and a residual for each value) whose server is killed, and
how long the next one takes from its start to the first commit; beside it, how long it takes to load
the checkpoint alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from psq.durable.checkpoint import list_checkpoints, load_checkpoint

LEVELS = ("off", "checkpoint", "replay", "journal")
READY = re.compile(r"endpoint=(\S+)")
BYTES_PER_VALUE = 16


def server(folder: Path, level: str, *options: str) -> tuple[subprocess.Popen[str], str]:
    """A server that keeps this much; the process, and where it is."""
    argv = [sys.executable, "-m", "psq_server", *options]
    if "--bind" not in options:
        argv += ["--bind", "tcp://127.0.0.1:0"]
    if level != "off":
        argv += ["--state-dir", str(folder / level), "--durability", level]
    log = (folder / f"{level}.log").open("a")
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True)
    ready = READY.search(piped(process.stdout).readline())
    if ready is None:
        sys.exit((folder / f"{level}.log").read_text())
    return process, ready[1]


def piped(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        sys.exit("a process was started without a pipe")
    return stream


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def worker(given: argparse.Namespace) -> None:
    """One rank: steps with each server in turn; rank 0 prints a line of seconds after each turn."""
    import torch  # noqa: PLC0415 - the other processes need none
    from torch import nn  # noqa: PLC0415

    import psq.torch  # noqa: PLC0415

    torch.set_num_threads(1)
    torch.manual_seed(given.rank)
    jobs: list[tuple[nn.Module, Any]] = []
    for endpoint in given.endpoints.split(","):
        model = nn.Sequential(
            nn.Linear(given.hidden, given.hidden), nn.Tanh(), nn.Linear(given.hidden, 8)
        )
        ps = psq.torch.Worker(
            model,
            connect=endpoint,
            rank=given.rank,
            world_size=2,
            recipe="server-adam",
            lr=1e-3,
        )
        jobs.append((model, ps))
    x = torch.randn(given.batch, given.hidden)
    for _ in range(given.repeats + 1):
        for place, (model, ps) in enumerate(jobs):
            began_s = time.perf_counter()
            for _ in range(given.steps):
                model(x).square().mean().backward()
                ps.step()
            took_s = (time.perf_counter() - began_s) / given.steps
            if given.rank == 0:
                print(json.dumps({"job": place, "round_s": took_s}), flush=True)
                sys.stdin.readline()
    for _, ps in jobs:
        ps.close()


def workers(given: argparse.Namespace, endpoints: list[str]) -> list[subprocess.Popen[str]]:
    started = []
    for rank in range(2):
        argv = [sys.executable, __file__, "--rank", str(rank), "--endpoints", ",".join(endpoints)]
        for name in ("hidden", "steps", "repeats", "batch"):
            argv += [f"--{name}", str(getattr(given, name))]
        pipe = subprocess.PIPE if rank == 0 else None
        started.append(subprocess.Popen(argv, stdout=pipe, stdin=pipe, text=True))
    return started


def compare(given: argparse.Namespace, folder: Path) -> None:
    servers = [server(folder, level) for level in LEVELS]
    first, second = workers(given, [endpoint for _, endpoint in servers])
    answer = piped(first.stdin)
    rounds_s: list[list[float]] = [[] for _ in LEVELS]
    used_s = [0.0 for _ in LEVELS]
    before = [cpu_s(process.pid) for process, _ in servers]
    is_warm = [False for _ in LEVELS]
    for line in piped(first.stdout):
        told = json.loads(line)
        place = told["job"]
        now_s = cpu_s(servers[place][0].pid)
        if is_warm[place]:
            rounds_s[place].append(told["round_s"])
            used_s[place] += now_s - before[place]
        is_warm[place], before[place] = True, now_s  # the first turn is for caches
        answer.write("\n")
        answer.flush()
    first.wait()
    second.wait()
    for process, _ in servers:
        process.wait()
    numel = given.hidden**2 + 9 * given.hidden + 8
    print(f"{numel:,} values, {given.steps} steps a turn, {given.repeats} turns")
    for level, took, used in zip(LEVELS, rounds_s, used_s, strict=True):
        best, median = min(took), statistics.median(took)
        ratios = [one / plain for one, plain in zip(took, rounds_s[0], strict=True)]
        cpu_ms = 1e3 * used / (len(took) * given.steps)
        print(
            f"{level:10}  round {1e3 * best:6.1f} ms best, {1e3 * median:6.1f} median;  beside off "
            f"{best / min(rounds_s[0]):.3f} best, {statistics.median(ratios):.3f} median;  "
            f"server {cpu_ms:.1f} ms of a core"
        )


def restart(given: argparse.Namespace, folder: Path) -> None:
    given.hidden = int((given.mb * 1e6 / BYTES_PER_VALUE) ** 0.5)
    options = ("--checkpoint-seconds", "5")
    process, endpoint = server(folder, "journal", *options)
    given.repeats, given.steps = 1_000_000, 1
    first, second = workers(given, [endpoint])
    lines, answer = iter(piped(first.stdout)), piped(first.stdin)

    def step() -> None:
        next(lines)
        answer.write("\n")
        answer.flush()

    for _ in range(given.rounds):
        step()
    for _ in range(given.repeats_of_kill):
        process.send_signal(signal.SIGKILL)
        process.wait()
        began_s = time.perf_counter()
        process, _ = server(folder, "journal", *options, "--bind", endpoint)
        ready_s = time.perf_counter() - began_s
        step()
        step()  # the one under way may have been committed before the kill
        first_s = time.perf_counter() - began_s
        newest = list_checkpoints(folder / "journal" / "checkpoints")[0]
        began_s = time.perf_counter()
        arrays, _ = load_checkpoint(newest.path)
        load_s = time.perf_counter() - began_s
        size = sum(array.nbytes for array in arrays.values())
        told = re.findall(r"event=recovered .*", (folder / "journal.log").read_text())[-1]
        print(
            f"{size / 1e6:.0f} MB: ready after {ready_s:.2f} s, two rounds done after "
            f"{first_s:.2f} s; loading alone {load_s:.2f} s; {told}"
        )
        del arrays
        for _ in range(given.rounds):
            step()
    for each in (first, second, process):
        each.kill()
        each.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1448, help="width: about 2 M values")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="in a turn")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--folder", help="where state directories are made")
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("--mb", type=float, default=300)
    parser.add_argument("--rounds", type=int, default=10, help="before each kill")
    parser.add_argument("--repeats-of-kill", type=int, default=3)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--endpoints")
    given = parser.parse_args()
    if given.rank is not None:
        worker(given)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        (restart if given.restart else compare)(given, Path(folder))


if __name__ == "__main__":
    main()

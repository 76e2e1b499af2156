"""What durability costs beside doing the same to plain files, in turns, on one disk.

    python bench/durable.py [--folder DIR] [--mb 300] [--rounds 20] [--repeats 5]

Journal: rounds of so many bytes, each appended and synced, beside write + fsync of the same bytes.
Checkpoint: writing and loading beside np.save + fsync and np.load. Loads find their files in the
page cache on both sides, so they are compared at the speed of memory. Ratios are of times: under 1
means that psq is faster.
"""

from __future__ import annotations

import argparse
import os
import queue
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from psq.durable import Journal
from psq.durable.checkpoint import list_checkpoints, load_checkpoint, verify, write_checkpoint
from psq.durable.files import sync, write_all

RUN_ID = bytes(16)
ROUNDS_OF = ((4096, 1), (1 << 20, 1), (9_400_000, 2))
"""(bytes of a record, records a round): a round at level "replay", a shard, two workers' pushes."""
SHARD_NUMEL = 1 << 20


def in_turns(repeats: int, *runs: Callable[[], float]) -> list[list[float]]:
    """Seconds of each, one after another, again and again."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, mine in zip(runs, times, strict=True):
            mine.append(run())
    return times


def say(name: str, nbytes: int, ours: list[float], plain: list[float]) -> None:
    """One line: rates of the best runs, ratios of best and median."""
    best = min(ours) / min(plain)
    median = statistics.median(ours) / statistics.median(plain)
    print(
        f"{name:<34}{nbytes / min(ours) / 1e6:>9,.0f}{nbytes / min(plain) / 1e6:>9,.0f} MB/s"
        f"   ratio {best:.2f} best, {median:.2f} median"
    )


def journal_s(folder: Path, data: list[bytes], rounds: int) -> float:
    """Seconds for so many rounds, each durable before the next begins."""
    done: queue.Queue[object] = queue.Queue()
    place = Path(tempfile.mkdtemp(dir=folder))
    journal = Journal(place, 0, done.put, run_id=RUN_ID)
    start_s = time.perf_counter()
    for _ in range(rounds):
        for payload in data:
            number = journal.append(1, {"round": 1}, [payload])
        journal.sync()
        while done.get() != number:
            pass
    took_s = time.perf_counter() - start_s
    journal.close()
    shutil.rmtree(place)
    return took_s


def plain_s(folder: Path, data: list[bytes], rounds: int) -> float:
    """Seconds for the same bytes, appended to a plain file and synced."""
    place = folder / "plain"
    fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sync(fd)
    start_s = time.perf_counter()
    for _ in range(rounds):
        write_all(fd, data)
        sync(fd)
    took_s = time.perf_counter() - start_s
    os.close(fd)
    place.unlink()
    return took_s


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """The same, as seconds; what it gives back is let go after that."""

    def run() -> float:
        start_s = time.perf_counter()
        result = work()
        took_s = time.perf_counter() - start_s
        del result
        return took_s

    return run


def save_plain_s(path: Path, array: NDArray[np.float32]) -> float:
    """Seconds of np.save, and what makes it durable, into a new file."""
    path.unlink(missing_ok=True)
    start_s = time.perf_counter()
    with path.open("wb") as file:
        np.save(file, array)
        file.flush()
        sync(file.fileno())
    return time.perf_counter() - start_s


def save_ours_s(folder: Path, arrays: dict[str, NDArray[np.float32]]) -> float:
    """Seconds of a checkpoint, into a new folder."""
    for one in list_checkpoints(folder):
        shutil.rmtree(one.path)
    start_s = time.perf_counter()
    write_checkpoint(folder, 1, arrays, {"round": 1})
    return time.perf_counter() - start_s


def bench_journal(folder: Path, rounds: int, repeats: int) -> None:
    """Appending and syncing, for each size of a round."""
    for nbytes, records in ROUNDS_OF:
        data = [os.urandom(nbytes) for _ in range(records)]
        ours, plain = in_turns(
            repeats,
            lambda data=data: journal_s(folder, data, rounds),
            lambda data=data: plain_s(folder, data, rounds),
        )
        say(f"journal, {records} x {nbytes:,} bytes", rounds * nbytes * records, ours, plain)


def bench_checkpoint(folder: Path, nbytes: int, repeats: int) -> None:
    """Writing, loading and verifying a checkpoint of so many bytes."""
    values = np.random.default_rng(0).standard_normal(nbytes // 4, np.float32)
    cuts = range(0, values.size, SHARD_NUMEL)
    arrays = {f"x{i}": values[start : start + SHARD_NUMEL] for i, start in enumerate(cuts)}
    place = folder / "plain.npy"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save_ours_s(folder, arrays)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    ours, plain = in_turns(
        repeats, lambda: save_ours_s(folder, arrays), lambda: save_plain_s(place, values)
    )
    say("checkpoint, write", nbytes, ours, plain)
    path = list_checkpoints(folder)[0].path
    ours, plain = in_turns(
        repeats, timed(lambda: load_checkpoint(path)), timed(lambda: np.load(place))
    )
    say("checkpoint, load and check", nbytes, ours, plain)
    ours, plain = in_turns(repeats, timed(lambda: verify(path)), timed(lambda: np.load(place)))
    say("checkpoint, verify (beside np.load)", nbytes, ours, plain)
    print(f"writing a checkpoint raised the peak of memory by {grown / 1e3:.1f} MB")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="on the disk to measure; else a temporary one")
    parser.add_argument("--mb", type=int, default=300, help="of the checkpoint")
    parser.add_argument("--rounds", type=int, default=20, help="of the journal, per run")
    parser.add_argument("--repeats", type=int, default=5)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=told.folder) as name:
        print(f"{'':<34}{'psq':>9}{'plain':>9}")
        bench_journal(Path(name), told.rounds, told.repeats)
        bench_checkpoint(Path(name), told.mb * 1_000_000, told.repeats)


if __name__ == "__main__":
    main()

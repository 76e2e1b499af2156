"""One life of something durable, for tests that end it early: rounds, checkpoints, pruning.

    python durable_life.py DIRECTORY ROUNDS

Goes on from what the directory holds and says each promise on a line as soon as it was made. Every
value follows from the round's number, so whoever reads the directory knows what must be in it.
"""

import contextlib
import queue
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from psq.durable import Journal, StateDirectory, prune_journal, read_journal
from psq.durable.checkpoint import write_checkpoint
from psq.durable.retention import load_newest, prune

CHECKPOINT_EVERY = 2
END_S = 30.0


def payload(version: int) -> bytes:
    return bytes([version % 251]) * (3000 + version)


def arrays(version: int) -> dict[str, np.ndarray]:
    return {"x": np.full(5000, version, np.float32), "count": np.array(version)}


def recover(opened: StateDirectory):
    """(version, reader) of what is there, each round of it checked."""
    loaded = load_newest(opened.checkpoints)
    version = loaded.version if loaded else 0
    if loaded:
        assert not loaded.skipped
        assert all(np.array_equal(loaded.arrays[k], v) for k, v in arrays(version).items())
    reader = read_journal(opened.journal, version, run_id=opened.run_id)
    for record in reader:
        said = record.meta["version"]
        assert record.kind == 1
        assert [bytes(buffer) for buffer in record.buffers] == [payload(said), b"end"]
        if said > version:
            assert said == version + 1
            version = said
    return version, reader


def live(path: Path, rounds: int, say) -> None:
    with StateDirectory.open(path, create=True) as opened:
        say(f"epoch {opened.epoch}")
        version, reader = recover(opened)
        done: queue.Queue = queue.Queue()
        journal = Journal(opened.journal, version, done.put, run_id=opened.run_id, reader=reader)
        for now in range(version + 1, version + 1 + rounds):
            number = journal.append(1, {"version": now}, [payload(now), b"end"])
            journal.sync()
            while done.get(timeout=END_S) < number:
                pass
            say(f"version {now}")
            if now % CHECKPOINT_EVERY == 0:
                write_checkpoint(opened.checkpoints, now, arrays(now), {})
                journal.start_segment(now)
                prune_journal(opened.journal, prune(opened.checkpoints).oldest_version)
        assert journal.close()


def tell(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@contextlib.contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory, where there is such a file system: kills spoil no page cache."""
    memory = Path("/dev/shm")  # noqa: S108 - the folder's name is random, and it is ours alone
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


if __name__ == "__main__":
    live(Path(sys.argv[1]), int(sys.argv[2]), tell)

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import durable_life
import pytest

import psq
from psq.durable.checkpoint import list_checkpoints, verify
from psq.durable.directory import StateDirectory
from psq.durable.failpoints import FAILPOINT_ENV, NAMES, reach
from psq.errors import EXIT_CONFIG, ConfigError

ROUNDS = 12
LAYERS = ("checkpoint.", "directory.", "files.", "journal.")
OURS = sorted(name for name in NAMES if name.startswith(LAYERS))
ONCE = ("directory.made", "directory.epoch", "directory.format")
CASES = [(name, count) for name in OURS for count in (1, 3) if count == 1 or name not in ONCE]


@pytest.fixture
def folder() -> Iterator[Path]:
    with durable_life.memory_folder() as path:
        yield path


def run_life(path: Path, failpoint: str) -> tuple[int, list[str]]:
    """How a life ended, and what it had promised until then."""
    done = subprocess.run(
        [sys.executable, durable_life.__file__, str(path), str(ROUNDS)],
        env={**os.environ, FAILPOINT_ENV: failpoint},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def promised(lines: list[str], word: str) -> int:
    return max((int(line.split()[1]) for line in lines if line.startswith(word)), default=0)


@pytest.mark.parametrize(("name", "count"), CASES)
def test_what_was_promised_survives_a_kill_at(folder, name, count):
    code, lines = run_life(folder, f"{name}:{count}")
    assert code == -signal.SIGKILL, f"{name} was not reached {count} times"
    with StateDirectory.open(folder, create=True) as opened:
        version, _ = durable_life.recover(opened)
        assert opened.epoch > promised(lines, "epoch")
        assert promised(lines, "version") <= version <= promised(lines, "version") + 1
    again: list[str] = []
    durable_life.live(folder, ROUNDS, again.append)
    assert promised(again, "version") == version + ROUNDS
    with StateDirectory.open(folder, create=False) as opened:
        assert durable_life.recover(opened)[0] == version + ROUNDS
        listed = list_checkpoints(opened.checkpoints)
        assert len(listed) == 2
        assert all(verify(one.path) == () for one in listed)
        leftovers = [
            path for path in folder.rglob("*") if "tmp" in path.relative_to(folder).as_posix()
        ]
        assert leftovers == [], "the next life cleans up"


def test_an_unset_failpoint_is_nothing():
    reach("journal.append")


@pytest.mark.parametrize("text", ["journal.nowhere:1", "journal.append", "journal.append:0", ":2"])
def test_a_failpoint_that_cannot_strike_is_refused(text):
    command = [sys.executable, "-c", "import psq.durable.failpoints"]
    done = subprocess.run(
        command,
        env={**os.environ, FAILPOINT_ENV: text},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"{ConfigError.__name__}: {FAILPOINT_ENV}='{text}': expected NAME:N" in done.stderr
    assert ConfigError.exit_code == EXIT_CONFIG


def test_every_failpoint_has_one_place_and_every_place_a_name():
    root = Path(psq.__file__).parents[1]
    sources = [file for part in ("psq", "server", "worker") for file in (root / part).rglob("*.py")]
    places = [
        name for file in sources for name in re.findall(r'\breach\("([^"]+)"\)', file.read_text())
    ]
    assert sorted(places) == sorted(NAMES)

"""Commands whose JSON is kept: run once, read again for ever, until they or `again` say otherwise.

A kept file says the command, how long it took, what came of it, and which machine and versions it
was. It is done again when its command has changed or when it had failed. A command that takes
longer than its limit is ended (it gets time to tidy up) and says so; it never stops the others.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent.parent
TIDY_S = 20.0  # from SIGTERM to SIGKILL: namespaces are removed meanwhile
SLACK_S = 60.0
PATIENCE = 4.0  # times what is expected, before a command counts as stuck
TAIL_LINES = 3
MAX_REASON = 300


@dataclass(frozen=True, slots=True)
class Run:
    """One command: a script of this folder and its arguments; `--json` is added.

    Attributes:
        name: of its file.
        words: script and arguments.
        quick: arguments instead, for a try that takes seconds.
        expected_s: on a quiet machine of two cores.
        takes_cache: it is told where the peers' environments are.
        writes_file: its `--json` takes the path of a file to write.
    """

    name: str
    words: str
    quick: str
    expected_s: float
    takes_cache: bool = False
    writes_file: bool = False

    def command(self, *, quick: bool) -> str:
        return f"python bench/{self.quick if quick else self.words}"

    @property
    def limit_s(self) -> float:
        return PATIENCE * self.expected_s + SLACK_S


@dataclass(frozen=True, slots=True)
class Settings:
    """Where results are kept, and how commands are run."""

    folder: Path
    cache: Path | None = None
    quick: bool = False
    again: bool = False


Kept = dict[str, Any]


def perform(run: Run, settings: Settings, *, limit_s: float | None = None) -> Kept:
    """What this run came to, now or before."""
    path = settings.folder / f"{run.name}.json"
    command, before = run.command(quick=settings.quick), read(path)
    if not settings.again and before and before["command"] == command and not before["error"]:
        return before
    print(f"{command} (about {run.expected_s:.0f} s)", file=sys.stderr, flush=True)
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="psq-bench-") as folder:
        file = Path(folder) / "out.json" if run.writes_file else None
        argv = [*argv_of(run, settings), *([str(file)] if file else [])]
        text, error = output_of(argv, limit_s or run.limit_s)
        if file is not None and file.exists():
            text = file.read_text()
    wall_s = time.monotonic() - start_s
    result, error = (None, error) if error else parsed(text)
    kept = {
        "command": command,
        "wall_s": round(wall_s, 1),
        "error": error,
        "facts": facts(),
        "result": result,
    }
    settings.folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept))
    if error:
        print(f"  not measured: {error}", file=sys.stderr, flush=True)
    return kept


def read(path: Path) -> Kept | None:
    """A kept result; none if there is none, or if it was cut off while it was written."""
    try:
        kept: Kept = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return kept


def argv_of(run: Run, settings: Settings) -> list[str]:
    script, *words = shlex.split(run.quick if settings.quick else run.words)
    cache = ["--cache", str(settings.cache)] if run.takes_cache and settings.cache else []
    return [sys.executable, str(BENCH / script), *words, *cache, "--json"]


def output_of(argv: list[str], limit_s: float) -> tuple[str, str]:
    """(what it printed, why there is nothing)."""
    if not Path(argv[1]).is_file():
        return "", f"there is no {Path(argv[1]).name}"
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(argv, stdout=out, stderr=told, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return "", f"stopped: it took longer than {limit_s:.0f} s"
        finally:
            stop(process)
        told.seek(0)
        if code:
            return "", f"ended with {code}: {reason_of(told.read())}"
        out.seek(0)
        return out.read(), ""


def stop(process: subprocess.Popen[bytes]) -> None:
    """End it, if it still runs: first ask."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(TIDY_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own group: it was started as one
        process.wait()


def reason_of(told: str) -> str:
    """The last lines of what it wrote to stderr, in one."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    return " ".join(lines[-TAIL_LINES:])[-MAX_REASON:] or "it wrote nothing to stderr"


def parsed(text: str) -> tuple[Any, str]:
    """(JSON, why it is none)."""
    words = text.strip()
    if words.startswith("skipped"):
        return None, words.removeprefix("skipped:").strip()
    try:
        return json.loads(words), ""
    except json.JSONDecodeError:
        return None, f"it did not print JSON but {words[:80]!r}"


def facts() -> dict[str, str]:
    """The machine and versions, without dates and names."""
    import numpy as np  # noqa: PLC0415 - with what follows, a second that tests do not need
    import torch  # noqa: PLC0415

    from psq import __version__, kernels  # noqa: PLC0415

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "psq": __version__,
        "kernels": kernels.level(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "Python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {cores} cores",
    }


def facts_line(found: Mapping[str, str]) -> str:
    *versions, machine = [f"{n} {v}" if n != "machine" else v for n, v in found.items()]
    return f"{machine}; {', '.join(versions)}"

"""A virtual environment for each peer, outside the repository, made when first asked for.

    $XDG_CACHE_HOME/psq-bench/torch/bin/python

One that cannot be made says why with the last line of what pip wrote, and is tried again next time.
psq itself runs in the environment that runs the benchmark.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

INSTALL_S = 1800.0
FREE_BYTES = 4 << 30  # below this nothing is installed
PROBE_S = 60.0


class UnavailableError(Exception):
    """A peer that cannot be had here, and why, in one line."""


@dataclass(frozen=True)
class Venv:
    """What a peer needs.

    Attributes:
        name: its folder in the cache.
        requirements: for pip. torch comes from the index that holds its CPU build, if one is set
            up; this project needs no other.
        then: what is built from its source and needs the requirements for that.
        pythons: versions of Python it has wheels for, best first.
    """

    name: str
    requirements: tuple[str, ...]
    then: tuple[str, ...] = ()
    pythons: tuple[str, ...] = ("3.11", "3.12", "3.13")


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "psq-bench"


def python_of(venv: Venv, cache: Path) -> Path:
    """The interpreter of this environment, made if it is not there.

    Raises:
        UnavailableError: it cannot be made.
    """
    folder = cache / venv.name
    python, done = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join(venv.requirements + venv.then)
    if python.exists() and done.exists() and done.read_text() == wanted:
        return python
    cache.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(cache).free < FREE_BYTES:
        msg = f"less than {FREE_BYTES >> 30} GiB are free under {cache}"
        raise UnavailableError(msg)
    print(f"installing {', '.join(venv.requirements + venv.then)} into {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    _must([interpreter(venv.pythons), "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    _must([*pip, *venv.requirements])
    if venv.then:
        _must([*pip, "--no-build-isolation", *venv.then])
    done.write_text(wanted)
    return python


def interpreter(versions: tuple[str, ...]) -> str:
    """The first of these Pythons that runs here."""
    for version in versions:
        candidates = [f"python{version}"]
        if version == f"{sys.version_info.major}.{sys.version_info.minor}":
            candidates.insert(0, sys.executable)
        for name in [*candidates, *_others(version)]:
            path = shutil.which(name)
            if path and _runs(path):
                return path
    msg = f"it needs Python {' or '.join(versions)}, and there is none here"
    raise UnavailableError(msg)


def _others(version: str) -> list[str]:
    """Interpreters that pyenv keeps, should its shims be set to others."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    return [str(path) for path in sorted(root.glob(f"{version}.*/bin/python"))]


def _runs(path: str) -> bool:
    probe = [path, "-c", "import venv, ensurepip"]
    done = subprocess.run(probe, check=False, capture_output=True, timeout=PROBE_S)
    return done.returncode == 0


def _must(argv: list[str]) -> None:
    try:
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        msg = f"{' '.join(argv[1:])} took longer than {INSTALL_S:.0f} s"
        raise UnavailableError(msg) from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines or ["no message"]
        raise UnavailableError(errors[-1].strip())

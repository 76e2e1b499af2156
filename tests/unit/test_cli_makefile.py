"""The Makefile: its targets are listed, and a Python that is too old is refused in words."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEADLINE_S = 30.0

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*words):
    command = ["make", "--no-print-directory", "-C", str(ROOT), *words]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env={"PATH": "/usr/bin:/bin"},
    )


def test_every_target_is_listed_by_default():
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = re.findall(r"^  make ([\w-]+)", make().stdout, re.MULTILINE)
    assert sorted(listed) == sorted(phony.split())
    assert {"run", "test", "lint", "types", "build", "bench", "clean", "help"} <= set(listed)


def test_a_python_that_is_too_old_is_refused_and_the_way_out_is_named(tmp_path):
    result = make("install", "PYTHON=", f"VENV={tmp_path}/venv")
    assert result.returncode == 2
    assert "psq needs Python 3.11 or newer" in result.stderr
    assert "make PYTHON=" in result.stderr
    assert not (tmp_path / "venv").exists()

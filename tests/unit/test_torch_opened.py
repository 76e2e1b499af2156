"""What a worker says that nobody has closed, by how its program ends."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import psq

OPENED = Path(psq.__file__).parent / "torch" / "opened.py"
# Loaded by its path: the package would import torch, once for each program here.
BEFORE = f"""
import importlib.util
import sys

spec = importlib.util.spec_from_file_location("psq_opened", {str(OPENED)!r})
opened = importlib.util.module_from_spec(spec)
sys.modules["psq_opened"] = opened
spec.loader.exec_module(opened)


class Worker:
    in_this_process = True

    def close(self, reason="done", text=""):
        opened.opened.remove(self)
        print("left", reason, text, flush=True)


def train(code):
    opened.note_opened(Worker())
    return code


"""


def end(tmp_path, code, *options):
    """What the worker said, and the program's exit code."""
    (tmp_path / "train.py").write_text(BEFORE + textwrap.dedent(code))
    words = options or ("train.py",)
    ended = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ended.stdout.strip(), ended.returncode


@pytest.mark.parametrize(
    ("code", "said", "exit_code"),
    [
        ("train(0)", "left done", 0),
        ("sys.exit(train(0))", "left done", 0),
        ("train(0); sys.exit()", "left done", 0),
        ("sys.exit(train(1))", "left error sys.exit(1)", 1),
        ("train(0); sys.exit('no data')", "left error sys.exit('no data')", 1),
        ("train(0); raise RuntimeError('no data')", "left error RuntimeError: no data", 1),
        ("train(0); raise SystemExit(3)", "left interrupted SystemExit", 3),
        ("train(0); exit(3)", "left interrupted SystemExit", 3),
        ("train(0); raise KeyboardInterrupt", "left interrupted KeyboardInterrupt", None),
        # Caught, so it ended nothing.
        ("train(0)\ntry:\n    sys.exit(1)\nexcept SystemExit:\n    pass", "left done", 0),
        ("opened.note_ending('interrupted', 'SIGTERM'); train(0); raise SystemExit(0)",
         "left interrupted SIGTERM", 0),
        ("for _ in range(2):\n    train(0)\nif True:\n    x = 1", "left done\nleft done", 0),
    ],
)  # fmt: skip
def test_only_a_program_that_ran_to_its_end_or_said_so_is_done(tmp_path, code, said, exit_code):
    heard, code_of_it = end(tmp_path, code)
    assert "\n".join(line.strip() for line in heard.splitlines()) == said
    assert exit_code in (None, code_of_it)


@pytest.mark.parametrize(
    ("code", "said"), [("train(0)", "left done"), ("sys.exit(train(2))", "left error sys.exit(2)")]
)
def test_a_program_may_be_run_as_a_module(tmp_path, code, said):
    heard, _ = end(tmp_path, code, "-m", "train")
    assert heard == said


def test_a_worker_may_be_made_in_a_thread(tmp_path):
    code = """
    import threading

    thread = threading.Thread(target=train, args=(0,))
    thread.start()
    thread.join()
    sys.exit(1)
    """
    assert end(tmp_path, code)[0] == "left error sys.exit(1)"


def test_sys_exit_still_raises_what_it_did(tmp_path):
    code = """
    train(0)
    for words in ((), (0,), (None,), ("text",), (7,)):
        try:
            sys.exit(*words)
        except SystemExit as error:
            assert error.code == (words[0] if words else None), words
    try:
        sys.exit(1, 2)
    except TypeError:
        print("as before")
    """
    assert end(tmp_path, code)[0].splitlines()[0] == "as before"

"""The columns of doctor and config show, which a machine with the server alone prints too."""

from __future__ import annotations

import subprocess
import sys

import pytest

from psq.config import TABLES, Given, resolve
from psq_worker.doctor import Check
from psq_worker.listing import print_checks, print_settings

DEADLINE_S = 60.0
# A machine where only the server is installed: what the worker's extra brings cannot be imported.
SERVER_ALONE = """
import sys
from importlib.abc import MetaPathFinder
class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "rich", "matplotlib"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in ("torch", "rich") else find_spec(name)
from psq_worker import cli
sys.argv = sys.argv[1:]
cli.worker_main() if sys.argv[0] == "psq-worker" else cli.main()
"""


def run_alone(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SERVER_ALONE, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def test_findings_are_lines_with_verdict_and_advice(capsys):
    print_checks([Check("kernels", "ok", "v4"), Check("port", "note", "taken", "use another")])
    assert capsys.readouterr().out.splitlines() == [
        "ok    kernels  v4",
        "note  port     taken",
        "               use another",
    ]


def test_settings_are_shown_with_value_origin_and_variable(capsys):
    environ = {"PSQ_LR": "0.5", "PSQ_JSON": "1"}
    resolved = {n: resolve(c, {}, given=Given(), environ=environ) for n, c in TABLES.items()}
    print_settings(resolved)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name in TABLES:
        assert [f"[{name}]"] in lines
    assert ["lr", "0.5", "PSQ_LR", "PSQ_LR"] in lines
    assert ["uplink", "-", "default", "PSQ_UPLINK"] in lines
    assert ["json", "true", "PSQ_JSON", "PSQ_JSON"] in lines


@pytest.mark.parametrize("words", [("doctor",), ("config", "show"), ("launch", "--help")])
def test_these_commands_work_where_only_the_server_is_installed(words):
    result = run_alone("psq", *words)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    "words", [("psq-worker",), ("psq", "launch"), ("psq", "demo"), ("psq", "baseline")]
)
def test_the_others_say_in_one_line_what_is_missing(words):
    result = run_alone(*words)
    assert result.returncode == 78
    assert "error: torch is not installed: this command needs the extra psq-train[worker]" in (
        result.stderr
    )
    assert "Traceback" not in result.stderr

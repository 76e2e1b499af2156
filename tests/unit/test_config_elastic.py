"""What a server is told about workers that may be missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from psq.config import ServerConfig
from psq.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"children": "0,1"}, "in a tree every child is waited for"),
        ({"parent": "tcp://127.0.0.1:1", "children": "0,1"}, "in a tree every child"),
        ({"world_size": 2, "min_workers": 3}, "expected 1 to 2, the --world-size, got 3"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings, words):
    with pytest.raises(ConfigError, match=words):
        ServerConfig(**{"min_workers": 1, **settings})


def test_a_grace_that_nothing_asks_for_is_refused():
    command = [sys.executable, "-m", "psq_server", "--grace", "3", "--bind", "tcp://127.0.0.1:0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 78
    assert "without --min-workers every rank is waited for" in ended.stderr

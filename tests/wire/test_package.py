from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import psq_proto

SOURCES = sorted(Path(psq_proto.__file__).parent.glob("*.py"))
ALLOWED = {"psq_proto", "msgpack", "crc32c"}


def imported(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def test_the_protocol_needs_nothing_but_msgpack_and_crc32c() -> None:
    assert len(SOURCES) > 10
    foreign = {name for source in SOURCES for name in imported(source)} - sys.stdlib_module_names
    assert foreign == ALLOWED


def test_the_protocol_touches_no_clock_socket_thread_or_randomness() -> None:
    world = {"time", "datetime", "socket", "ssl", "threading", "asyncio", "random", "secrets", "os"}
    for source in SOURCES:
        assert not world & set(imported(source)), source.name

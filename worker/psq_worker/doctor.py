"""`psq doctor`: is this machine fit to run psq, and what will it run with?

Each check looks at one thing and says what it found and, where something is wrong, what to do. It
needs no torch (it only asks for its version) and changes nothing.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final, Literal

from psq.config import (
    DEFAULT_PORT,
    TABLES,
    Given,
    WorkerConfig,
    known_variables,
    resolve,
    settings_of,
    stray_variables,
)
from psq.errors import EXIT_CONFIG, GaveUpError, PsqError
from psq.keys import load_worker_keys

__all__ = ["Check", "cores", "examine", "exit_code"]

Verdict = Literal["ok", "note", "fail"]

MIN_PYTHON: Final = (3, 11)
PACKAGES: Final = ("numpy", "pyzmq", "msgpack", "crc32c", "safetensors", "prometheus-client")
OPTIONAL: Final = {
    "torch": "workers need it: install psq-train[worker]",
    "rich": "psq launch needs it: install psq-train[worker]",
    "matplotlib": "the demo's picture needs it: install psq-train[plot]",
}
ROUND_TRIPS: Final = 100
ROUND_TRIP_TIMEOUT_S: Final = 5.0
ANSWER_TIMEOUT_S: Final = 2.0
ECHO: Final = b"echo" * 64


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: "ok", "note" (works, but look), or "fail" (psq cannot run like this).

    Attributes:
        code: what the command ends with where this failed.
    """

    name: str
    verdict: Verdict
    found: str
    advice: str = ""
    code: int = EXIT_CONFIG


def examine(environ: Mapping[str, str], given: Given | None = None) -> list[Check]:
    """Every check, in order.

    Takes well under a second, and up to `ANSWER_TIMEOUT_S` for each server that was named and does
    not answer.
    """
    given = given or Given()
    return [
        _python(),
        *_packages(),
        *_kernels(environ),
        _libzmq(),
        _round_trip(),
        _cores(environ),
        _port(),
        *_variables(environ),
        _settings(environ, given),
        *_servers(environ, given),
    ]


def exit_code(checks: list[Check]) -> int:
    """0 when psq can run, and every server that was named answers; else the highest code.

    That is 78 where this machine or its settings will not do. Else it is what a worker would end
    with that meets this server: 75 where it does not answer, 77 where it refuses.
    """
    return max((check.code for check in checks if check.verdict == "fail"), default=0)


def cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _python() -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info >= MIN_PYTHON:
        return Check("python", "ok", found)
    return Check("python", "fail", found, "psq needs Python 3.11 or newer")


def _packages() -> Iterator[Check]:
    yield Check("psq", "ok", f"{_version('psq-train') or 'not installed as a package'}")
    for name in PACKAGES:
        version = _version(name)
        if version:
            yield Check(name, "ok", version)
        else:
            yield Check(name, "fail", "not installed", "install psq-train again")
    for name, advice in OPTIONAL.items():
        version = _version(name)
        if version:
            yield Check(name, "ok", version)
        else:
            yield Check(name, "note", "not installed", advice)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _kernels(environ: Mapping[str, str]) -> Iterator[Check]:
    try:
        from psq import kernels  # noqa: PLC0415 - a level that was forced and is missing fails here

        level, available = kernels.level(), ", ".join(kernels.available())
    except (PsqError, ImportError) as error:
        yield Check("kernels", "fail", str(error), "unset PSQ_KERNEL, or install psq-train again")
        return
    found = f"{level} (this machine has {available})"
    if level == "reference":
        advice = "slow NumPy code, with the same bits: install a C++ compiler and psq-train again"
        forced = " because PSQ_KERNEL says so" if environ.get("PSQ_KERNEL") else ""
        yield Check("kernels", "note", found + forced, "" if forced else advice)
    else:
        yield Check("kernels", "ok", found)


def _libzmq() -> Check:
    from psq.link import check_libzmq, libzmq_version  # noqa: PLC0415 - loads libzmq

    version = ".".join(map(str, libzmq_version()))
    try:
        check_libzmq()
    except PsqError as error:
        return Check("libzmq", "fail", version, str(error))
    return Check("libzmq", "ok", version)


def _round_trip() -> Check:
    from psq.link import ServerLink, WorkerLink  # noqa: PLC0415 - loads libzmq

    try:
        with ServerLink("tcp://127.0.0.1:0") as server, WorkerLink(server.endpoint) as worker:
            if not worker.wait_room(ROUND_TRIP_TIMEOUT_S):
                return Check("loopback", "fail", "no connection within 5 s", _FIREWALL)
            began_s = time.perf_counter()
            for _ in range(ROUND_TRIPS):
                worker.send(ECHO)
                if not server.wait(ROUND_TRIP_TIMEOUT_S):
                    return Check("loopback", "fail", "a message was lost", _FIREWALL)
                for peer, frame in server.drain():
                    server.send(peer, bytes(frame))
                if not worker.wait(ROUND_TRIP_TIMEOUT_S):
                    return Check("loopback", "fail", "an answer was lost", _FIREWALL)
                for _ in worker.drain():
                    pass
            trip_s = (time.perf_counter() - began_s) / ROUND_TRIPS
    except PsqError as error:
        return Check("loopback", "fail", str(error), _FIREWALL)
    return Check("loopback", "ok", f"{1e6 * trip_s:.0f} microseconds there and back")


_FIREWALL: Final = "something keeps this machine from talking to itself over TCP: a firewall?"


def _cores(environ: Mapping[str, str]) -> Check:
    threads = environ.get("OMP_NUM_THREADS")
    said = f", OMP_NUM_THREADS={threads}" if threads else ""
    return Check("cores", "ok", f"{cores()} for this process{said}")


def _port() -> Check:
    name = f"port {DEFAULT_PORT}"
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", DEFAULT_PORT))
        except OSError as error:
            advice = "psq-server needs another one: --bind tcp://127.0.0.1:0 takes a free one"
            return Check(name, "note", error.strerror or "cannot be bound", advice)
    return Check(name, "ok", "free")


def _variables(environ: Mapping[str, str]) -> Iterator[Check]:
    for name in known_variables():
        if environ.get(name):
            yield Check(name, "ok", environ[name])
    for name, meant in stray_variables(environ).items():
        advice = f"did you mean {meant}?" if meant else "psq reads no such variable"
        yield Check(name, "note", environ[name], advice)


def _settings(environ: Mapping[str, str], given: Given) -> Check:
    """Whether what the environment and the file say is acceptable to every process."""
    from psq_worker.recipes import recipe_of  # noqa: PLC0415 - loads the kernels, a check of its own

    for cls in TABLES.values():
        try:
            told = resolve(cls, {}, given=given, environ=environ).config
            if isinstance(told, WorkerConfig):
                recipe_of(told)
        except PsqError as error:
            return Check("settings", "fail", str(error), "see: psq config show")
    count = sum(len(settings_of(cls)) for cls in TABLES.values())
    return Check("settings", "ok", f"all {count} acceptable (psq config show lists them)")


def _servers(environ: Mapping[str, str], given: Given) -> Iterator[Check]:
    """Whether the servers that somebody named can be reached."""
    try:
        told = resolve(WorkerConfig, {}, given=given, environ=environ)
    except PsqError:  # another check says so
        return
    if told.origins["connect"] == "default":
        return
    endpoints, keys = told.config.endpoints, told.config.keys
    for number, endpoint in enumerate(endpoints):
        yield _server("server" if len(endpoints) == 1 else f"server {number}", endpoint, keys)


def _server(name: str, endpoint: str, folder: str | None) -> Check:
    from psq.client import Patience, probe_link  # noqa: PLC0415 - loads libzmq and numpy

    patience = Patience(give_up_after_s=ANSWER_TIMEOUT_S)
    try:
        keys = load_worker_keys(Path(folder)) if folder is not None else None
        rank = keys.rank if keys is not None else 0
        rates = probe_link(endpoint, rank, patience=patience, keys=keys)
    except GaveUpError as error:
        found = f"{endpoint}: no answer within {ANSWER_TIMEOUT_S:g} s"
        pinned = f"; {folder} may have the key of another server" if folder else ""
        return Check(name, "fail", found, _NO_SERVER + pinned, error.exit_code)
    except PsqError as error:  # it says itself what to do
        return Check(name, "fail", f"{endpoint}: {error}", code=error.exit_code)
    words = f"{1000 * rates.round_trip_s:.2f} ms there and back"
    speed = f"{rates.up_mbit_s:,.0f} Mbit/s up, {rates.down_mbit_s:,.0f} down"
    return Check(name, "ok", f"{endpoint} answers: {words}, {speed}")


_NO_SERVER: Final = "start psq-server there, or look at its --bind, tunnels and firewalls between"

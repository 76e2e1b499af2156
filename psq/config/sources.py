"""Who wins when a setting is said twice, and how a value's origin is kept.

    flag  >  argument in code  >  PSQ_* variable  >  TOML file  >  torchrun, Slurm  >  default

The first that speaks wins, setting by setting. A flag beats an argument written in a script because
the script's author wrote the argument once and the person at the terminal typed the flag now. This
module is the only place below the commands that reads the environment; a wrong value is refused
with its key, where it came from, what was expected and what came.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from psq.config.schema import DEFAULT_PORT, TABLES, WorkerConfig
from psq.config.setting import ENV_PREFIX, Setting, settings_of
from psq.errors import ConfigError, UsageError

__all__ = [
    "CONFIG_ENV",
    "OTHER_VARIABLES",
    "Given",
    "Resolved",
    "known_variables",
    "resolve",
    "stray_variables",
    "use_given",
    "worker_config",
]

ConfigT = TypeVar("ConfigT")

CONFIG_ENV: Final = "PSQ_CONFIG"
MAX_FILE_BYTES: Final = 1 << 20
# PSQ_* variables that are no setting of a process: kernels and data are found by modules of their
# own.
OTHER_VARIABLES: Final = {
    CONFIG_ENV: "TOML file with tables: server, worker, launch, demo, advise, simulate",
    "PSQ_FAILPOINT": "for tests: where this process kills itself, as in journal.fsync:3",
    "PSQ_KERNEL": "kernel level to use: reference, v2, v3, v4 or neon",
    "PSQ_PARENT_FD": "set by psq launch for the processes it starts",
}


@dataclass(frozen=True, slots=True)
class Resolved(Generic[ConfigT]):
    """A config and, for each field, who said so, as in "PSQ_RANK", "--lr" or "default"."""

    config: ConfigT
    origins: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Given:
    """What was typed: settings by key (see `Setting.key`), and the TOML file if one was named."""

    values: Mapping[str, Any] = field(default_factory=dict)
    file: str | None = None

    def resolve(self, cls: type[ConfigT], **arguments: Any) -> Resolved[ConfigT]:
        """`cls` from all sources; `arguments` are what the code itself says, by field name."""
        return resolve(cls, arguments, given=self, environ=os.environ)


_GIVEN: ContextVar[Given | None] = ContextVar("psq_given", default=None)


@contextmanager
def use_given(given: Given) -> Iterator[None]:
    """In the block `worker_config` knows what was typed: so a script gets psq-worker's flags."""
    token = _GIVEN.set(given)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def worker_config(
    arguments: Mapping[str, Any] | None = None, *, settled: Collection[str] = ()
) -> WorkerConfig:
    """The config of a worker that a script makes, from everything that was said.

    Args:
        arguments: field name to value; None means "not said".
        settled: keys that the script has settled in a way no flag can express, such as a learning
            rate that is a function; a flag for one of them would be ignored, so it is refused.

    Raises:
        ConfigError: a value is wrong; the message names it and where it came from.
        UsageError: a flag was typed for what the script has settled.
    """
    given = _GIVEN.get() or Given()
    for item in settings_of(WorkerConfig):
        if item.key in settled and given.values.get(item.key) is not None:
            msg = (
                f"{item.flag} {given.values[item.key]} would have no effect: the script itself "
                f"settles {item.key}; leave the flag out, or let the script take it from psq"
            )
            raise UsageError(msg)
    return resolve(WorkerConfig, arguments or {}, given=given, environ=os.environ).config


def resolve(
    cls: type[ConfigT],
    arguments: Mapping[str, Any],
    *,
    given: Given,
    environ: Mapping[str, str],
) -> Resolved[ConfigT]:
    """A config from everything that was said, with the origin of each value.

    Args:
        cls: ServerConfig, WorkerConfig or LaunchConfig.
        arguments: field name to value, as a script says it; None means "not said".
        given: the command line; values of other classes' settings are left alone.
        environ: the environment.

    Raises:
        ConfigError: unknown argument, unreadable file, unknown key, wrong type or range.
    """
    settings = settings_of(cls)
    unknown = sorted(set(arguments) - {item.field for item in settings})
    if unknown:
        hint = _suggest(unknown[0], (item.field for item in settings))
        msg = f"{cls.__name__} has no setting {unknown[0]!r}{hint}"
        raise ConfigError(msg)
    said = _Said(arguments, given.values, environ, _read_table(cls, given, environ))
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for item in settings:
        values[item.field], origins[item.field] = said.look_up(item)
    try:
        return Resolved(cls(**values), origins)
    except ConfigError as error:
        # Each value passed its own check, so this is about what they mean together: say who said
        # the first one named.
        name = str(error).partition(":")[0]
        msg = f"{error} (from {origins[name]})" if name in origins else str(error)
        raise ConfigError(msg) from None


def known_variables() -> dict[str, str]:
    """Every PSQ_* variable and what it says."""
    found = {item.env: item.help for cls in TABLES.values() for item in settings_of(cls)}
    return dict(sorted({**found, **OTHER_VARIABLES}.items()))


def stray_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """PSQ_* variables that mean nothing, each with the name likely meant (or an empty text)."""
    known = known_variables()
    strays = sorted(name for name in environ if name.startswith(ENV_PREFIX) and name not in known)
    return {name: (difflib.get_close_matches(name, known, n=1) or [""])[0] for name in strays}


@dataclass(frozen=True, slots=True)
class _Said:
    """Everything that was said, source by source; `table` maps a TOML key to (value, origin)."""

    arguments: Mapping[str, Any]
    typed: Mapping[str, Any]
    environ: Mapping[str, str]
    table: Mapping[str, tuple[Any, str]]

    def look_up(self, item: Setting) -> tuple[Any, str]:
        """(value, origin) of one setting: the first source that speaks."""
        typed = self.typed.get(item.key)
        if typed is not None:
            return _convert(item, typed, item.flag), item.flag
        argument = self.arguments.get(item.field)
        if argument is not None:
            return _check(item, argument, f"argument {item.field}"), f"argument {item.field}"
        if self.environ.get(item.env):
            return _convert(item, self.environ[item.env], item.env), item.env
        if item.key in self.table:
            value, origin = self.table[item.key]
            return _check(item, value, origin), origin
        for name in item.cluster:
            if self.environ.get(name):
                return _convert(item, _cluster_text(name, self.environ[name]), name), name
        return item.default, "default"


def _cluster_text(name: str, text: str) -> str:
    if name == "MASTER_ADDR":  # torchrun's MASTER_PORT is its own rendezvous, never psq's
        return f"tcp://{f'[{text}]' if ':' in text else text}:{DEFAULT_PORT}"
    return text


def _convert(item: Setting, value: Any, origin: str) -> Any:
    """A flag's or a variable's text, or a value that click has already made of a flag."""
    if not isinstance(value, str):
        return _check(item, value, origin)
    try:
        return item.parse(value)
    except ValueError as error:
        msg = f"{item.key} (from {origin}): {error}"
        raise ConfigError(msg) from None


def _check(item: Setting, value: Any, origin: str) -> Any:
    try:
        return item.check(value)
    except ValueError as error:
        msg = f"{item.key} (from {origin}): {error}"
        raise ConfigError(msg) from None


def _read_table(cls: type, given: Given, environ: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    """The file's table for `cls`: TOML key to (value, origin). The other tables are checked too."""
    path, origin = (given.file, "--config") if given.file else (environ.get(CONFIG_ENV), CONFIG_ENV)
    if not path:
        return {}
    found: dict[str, tuple[Any, str]] = {}
    for name, table in _parse_file(path, origin).items():
        if name not in TABLES or not isinstance(table, dict):
            tables = ", ".join(f"[{known}]" for known in TABLES)
            msg = f"{path}: expected only the tables {tables}, got {name!r}{_suggest(name, TABLES)}"
            raise ConfigError(msg)
        known = [item.key for item in settings_of(TABLES[name])]
        for key, value in table.items():
            if key not in known:
                msg = f"{path}: [{name}] has no key {key!r}{_suggest(key, known)}"
                raise ConfigError(msg)
            if TABLES[name] is cls:
                found[key] = (value, f"{path} [{name}] {key}")
    return found


def _parse_file(path: str, origin: str) -> dict[str, Any]:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        msg = f"cannot read the file {path!r} named by {origin}: {error.strerror}"
        raise ConfigError(msg) from None
    if len(data) > MAX_FILE_BYTES:
        msg = f"{path}: {len(data)} bytes, a config file has at most {MAX_FILE_BYTES}"
        raise ConfigError(msg)
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        msg = f"{path} (named by {origin}) is not TOML: {error}"
        raise ConfigError(msg) from None


def _suggest(name: str, known: Iterable[str]) -> str:
    """Words that end a complaint: the nearest known name, or all of them when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(names)}"

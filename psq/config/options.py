"""Commands from config dataclasses: one list of settings, one shell for errors.

    @click.command("psq-server")
    @options(ServerConfig)
    def serve(given: Given) -> None:
        config = given.resolve(ServerConfig).config
        ...

    def main() -> None:
        run(serve, "psq-server")

click only splits the command line; values are parsed and checked by `psq.config.sources`, so a
wrong flag, a wrong variable and a wrong TOML key are refused in the same words. Exit codes: 64 for
a command line click cannot read, the error's own `exit_code` (see `psq.errors`) for what psq
refuses, 130 for Ctrl-C.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, NoReturn, TypeVar

import click

from psq.config.setting import SPACE, Setting, settings_of
from psq.config.sources import CONFIG_ENV, Given
from psq.errors import EXIT_USAGE, PsqError

__all__ = ["EPILOG", "EXIT_INTERRUPTED", "fail", "options", "run"]

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

EXIT_INTERRUPTED: Final = 128 + signal.SIGINT
DEBUG_ENV: Final = "PSQ_DEBUG"
# What --help of every command ends with.
EPILOG: Final = """\
Exit codes: 0 done, 1 another error, 64 wrong use, 65 file unusable, 75 gave up waiting, 76 fenced
by a newer process, 77 turned away by the server, 78 wrong configuration, 130 Ctrl-C, 143 SIGTERM.
Each setting may be a flag, a PSQ_* variable (in brackets) or a key of the TOML file; the first of
these that speaks wins.
"""


def options(
    *classes: type, skip: Collection[str] = (), defaults: dict[str, Any] | None = None
) -> Callable[[FunctionT], FunctionT]:
    """Give a click command the flags of config dataclasses, and --config, as `given`.

    Args:
        classes: config dataclasses; a key that two of them share becomes one flag.
        skip: keys left out.
        defaults: other defaults by key, for the help text only.
    """
    chosen: dict[str, Setting] = {}
    for cls in classes:
        for item in settings_of(cls):
            if item.key not in skip:
                chosen.setdefault(item.key, item)

    def decorate(function: FunctionT) -> FunctionT:
        @functools.wraps(function)
        def command(*, config: str | None, **params: Any) -> Any:
            values = {key: _typed(chosen[key], params.pop(key)) for key in chosen}
            typed = {key: value for key, value in values.items() if value is not None}
            return function(given=Given(typed, config), **params)

        decorated: Any = click.option(
            "--config", metavar="FILE", help=f"TOML file with settings.  [{CONFIG_ENV}]"
        )(command)
        for item in reversed(chosen.values()):
            decorated = _option(item, (defaults or {}).get(item.key, item.default))(decorated)
        return decorated  # type: ignore[no-any-return]

    return decorate


def run(command: click.Command, name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process; an error is one line on stderr and an exit code.

    Args:
        command: what to run.
        name: how it calls itself in usage texts and errors.
        arguments: the command line without the program's name (default: this process's own).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = command.main(words, prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(EXIT_INTERRUPTED)
    except PsqError as error:
        fail(error, name, debug=_wants_traceback(words))
    sys.exit(result if isinstance(result, int) else 0)


def fail(error: PsqError, name: str, *, debug: bool = False) -> NoReturn:
    """Say what is wrong on stderr and end the process with the error's exit code."""
    if debug:
        raise error
    click.echo(f"{name}: error: {error}", err=True)
    sys.exit(error.exit_code)


def _wants_traceback(words: Sequence[str]) -> bool:
    """Whether --debug or PSQ_DEBUG was given; the config cannot say, it may be what is wrong."""
    return "--debug" in words or bool(os.environ.get(DEBUG_ENV))


def _typed(item: Setting, value: Any) -> Any:
    """What was typed for a setting, None for nothing; of a repeated flag, all as one text."""
    if not item.repeat:
        return value
    return SPACE.join(value) if value else None


def _option(item: Setting, default: Any) -> Callable[[Any], Any]:
    names = [item.key, item.flag, *([item.short] if item.short else [])]
    text = f"{item.help[0].upper()}{item.help[1:]}."
    if item.kind is bool:
        names[1] = f"{item.flag}/--no-{item.flag.removeprefix('--')}"
        return click.option(*names, default=None, help=f"{text}  [{item.env}]")
    shown = "" if default is None else f"{default:g}; " if item.kind is float else f"{default}; "
    return click.option(
        *names,
        default=None,
        type=str,
        multiple=item.repeat,
        metavar=item.metavar,
        help=f"{text}  [{shown}{item.env}]",
    )

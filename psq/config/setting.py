"""One setting: a dataclass field that knows its flag, variable, TOML key, type and range.

    lease_s: float = setting(10.0, "silence after which ...", key="lease", above=0)

declares `--lease`, `PSQ_LEASE`, `lease =` in the TOML table, the unit (the field's last word), the
default and the check, once. `settings_of` turns such a dataclass into `Setting` values;
`psq.config.sources` and `psq.config.options` read nothing else. A setting with `many` is a list
that a flag or a variable writes with commas; a TOML file and code may say it as a list. One with
`repeat` is a list whose flag is given again for each; a variable writes spaces. One typed
`int | Literal["auto"]` takes the word in place of a number. This module never reads the
environment, a file or the command line.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from psq.errors import ConfigError

__all__ = ["ENV_PREFIX", "Setting", "check_fields", "setting", "settings_of", "switch"]

ENV_PREFIX: Final = "PSQ_"
MAX_TEXT_CHARS: Final = 4096
MAX_LIST_CHARS: Final = 65_536
COMMA: Final = ","
SPACE: Final = " "
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})
_METAVARS: Final = {str: "TEXT", int: "N", float: "X", bool: ""}


@dataclass(frozen=True, slots=True)
class _Meta:
    """What `setting` keeps in a field's metadata."""

    help: str
    key: str
    short: str
    metavar: str
    low: float | None
    above: float | None
    high: float | None
    many: bool
    repeat: bool
    cluster: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """A field as the outside world sees it.

    Attributes:
        field: the dataclass field's name, unit included, as in "lease_s".
        key: the TOML key, as in "lease".
        kind: str, int, float or bool.
        choices: the allowed texts; empty when any will do.
        words: the texts that may stand in place of a number.
        optional: None is allowed and means "not set".
        low, above, high: the range: low <= value <= high, value > above; None is no limit.
        many: a text of several parts with commas between them; a list of them will do too.
        repeat: the same with spaces between them, and the flag may be given several times.
        cluster: torchrun's and Slurm's variables that say the same, in order of preference.
    """

    field: str
    key: str
    kind: type[str | int | float | bool]
    default: Any
    help: str
    short: str
    metavar: str
    choices: tuple[str, ...]
    words: tuple[str, ...]
    optional: bool
    low: float | None
    above: float | None
    high: float | None
    many: bool
    repeat: bool
    cluster: tuple[str, ...]

    @property
    def flag(self) -> str:
        """The command-line flag, as in "--give-up-after"."""
        return "--" + self.key.replace("_", "-")

    @property
    def env(self) -> str:
        """The environment variable, as in "PSQ_GIVE_UP_AFTER"."""
        return ENV_PREFIX + self.key.upper()

    def expects(self) -> str:
        """What a value must be, in words: the middle of every error message."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        kind = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[
            self.kind
        ]
        limits = [
            f"{sign} {limit:g}"
            for sign, limit in ((">", self.above), (">=", self.low), ("<=", self.high))
            if limit is not None
        ]
        said = f"{kind} {' and '.join(limits)}" if limits else kind
        return " or ".join((said, *self.words))

    def parse(self, text: str) -> Any:
        """The value a text (a flag's or a variable's) stands for.

        Raises:
            ValueError: the text is not of this kind or out of range.
        """
        try:
            if self.kind is bool:
                value: Any = _parse_bool(text)
            else:
                value = text if text in self.words else self.kind(text)
        except ValueError:
            raise ValueError(self.complaint(text)) from None
        return self.check(value)

    def check(self, value: Any) -> Any:
        """The value itself; an int widened to float where a float is meant, a list made one text.

        Raises:
            ValueError: it has another type, or is out of range; the message says what was expected
                and what came.
        """
        if value is None and self.optional:
            return None
        if self.words and value in self.words:
            return value
        if self.kind is float and type(value) is int:
            value = float(value)
        several = (self.many or self.repeat) and isinstance(value, list | tuple)
        if several and all(type(v) is str for v in value):
            value = (COMMA if self.many else SPACE).join(value)
        if type(value) is not self.kind or not self._in_range(value):
            raise ValueError(self.complaint(value))
        return value

    def complaint(self, got: object) -> str:
        """The text of a refusal."""
        return f"expected {self.expects()}, got {got!r:.200}"

    def _in_range(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if isinstance(value, str):
            return (
                0 < len(value) <= (MAX_LIST_CHARS if self.many or self.repeat else MAX_TEXT_CHARS)
            )
        if isinstance(value, bool):
            return True
        return (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
        )


def setting(  # noqa: PLR0913 - one keyword for each thing that can be said of a setting
    default: Any,
    help: str,  # noqa: A002 - click's own word for it
    *,
    key: str = "",
    short: str = "",
    metavar: str = "",
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    many: bool = False,
    repeat: bool = False,
    cluster: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that is also a flag, a variable and a TOML key.

    Args:
        default: the value when nobody says anything; None needs a type that allows it.
        help: one line, unit included.
        key: the outside name where it is not the field's, as in "lease" for `lease_s`.
        short: a one-letter flag, as in "-n".
        metavar: the placeholder in the help.
        low: smallest number allowed.
        above: a number must be larger than this.
        high: largest number allowed.
        many: several texts, with commas between them or as a list.
        repeat: several texts, with spaces between them, as a list, or one for each flag.
        cluster: variables of torchrun and Slurm that say the same.
    """
    meta = _Meta(help, key, short, metavar, low, above, high, many, repeat, cluster)
    return dataclasses.field(default=default, metadata={"setting": meta})


def switch(help: str) -> Any:  # noqa: A002 - as above
    """A setting that is off unless someone turns it on."""
    return setting(default=False, help=help)


def settings_of(cls: type) -> tuple[Setting, ...]:
    """The settings of a config dataclass, in the order of its fields."""
    return _settings_of(cls)


@cache
def _settings_of(cls: Hashable) -> tuple[Setting, ...]:
    assert isinstance(cls, type)  # noqa: S101 - Hashable is what `cache` can be typed with
    hints = get_type_hints(cls)
    return tuple(
        _describe(field, hints[field.name])
        for field in dataclasses.fields(cls)
        if "setting" in field.metadata
    )


def check_fields(config: Any) -> None:
    """Check every field of a config dataclass; for its `__post_init__`.

    Raises:
        ConfigError: a value has another type than its field, or is out of range.
    """
    for item in settings_of(type(config)):
        try:
            value = item.check(getattr(config, item.field))
        except ValueError as error:
            msg = f"{item.field}: {error}"
            raise ConfigError(msg) from None
        object.__setattr__(config, item.field, value)  # an int given for a float field


def _describe(field: dataclasses.Field[Any], hint: Any) -> Setting:
    meta: _Meta = field.metadata["setting"]
    kind, choices, words, optional = _read_hint(hint)
    return Setting(
        field=field.name,
        key=meta.key or field.name,
        kind=kind,
        default=field.default,
        help=meta.help,
        short=meta.short,
        metavar=meta.metavar or ("|".join(choices) if choices else _METAVARS[kind]),
        choices=choices,
        words=words,
        optional=optional,
        low=meta.low,
        above=meta.above,
        high=meta.high,
        many=meta.many,
        repeat=meta.repeat,
        cluster=meta.cluster,
    )


def _read_hint(hint: Any) -> tuple[Any, tuple[str, ...], tuple[str, ...], bool]:
    """(kind, choices, words, optional) of `str | None`, `Literal["a"]`, `int | Literal["auto"]`."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    literals = [part for part in parts if get_origin(part) is Literal]
    kinds = [part for part in parts if part in _METAVARS]
    assert len(kinds) + len(literals) in (1, 2), hint  # noqa: S101 - our own dataclasses only
    texts = get_args(literals[0]) if literals else ()
    optional = NoneType in parts
    return (kinds[0], (), texts, optional) if kinds else (str, texts, (), optional)


def _parse_bool(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in _TRUE:
        return True
    if lowered in _FALSE:
        return False
    raise ValueError(text)

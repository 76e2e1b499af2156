"""Numbers that change with the step t = 1, 2, ...: constants, two families, and the user's own.

    0.999                               always
    Power(0.5, 0.5)                     0.5 / t^0.5               step sizes of the Adam analyses
    OneMinusPower(0.01, 0.75)           1 - 0.01 / t^0.75         second moments
    Named("warm", (100.0,))             what `register_schedule("warm", f)` said: f(t, 100.0)

A function never travels: a plan carries its name and its numbers, and every process of the job has
it registered, by `register_schedule` or by an entry point in the group psq.schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from psq.errors import ConfigError
from psq.parts import MAX_TEXT_CHARS, entry, entry_names

__all__ = [
    "MAX_EXPONENT",
    "MAX_PARAMETERS",
    "SCHEDULES_GROUP",
    "Named",
    "OneMinusPower",
    "Power",
    "Schedule",
    "ScheduleFunction",
    "check_unit",
    "parse_schedule",
    "rate_of",
    "register_schedule",
    "schedule_from_plain",
    "schedule_plain",
    "schedule_text",
    "schedule_value",
]

ScheduleFunction: TypeAlias = Callable[..., float]

SCHEDULES_GROUP: Final = "psq.schedules"
MAX_EXPONENT: Final = 8.0
MAX_PARAMETERS: Final = 8
_LOOKED_AT: Final = (*range(1, 101), *(2**power for power in range(7, 41)))
"""The steps at which a user's schedule is looked at before a job starts."""


@dataclass(frozen=True, slots=True)
class Power:
    """value / t**exponent: the step sizes of the generic-Adam analyses (t counts from 1)."""

    value: float
    exponent: float


@dataclass(frozen=True, slots=True)
class OneMinusPower:
    """1 - value / t**exponent: a second-moment weight that approaches 1 (t counts from 1)."""

    value: float
    exponent: float


@dataclass(frozen=True, slots=True)
class Named:
    """A schedule that was registered under a name, with the numbers it takes after t."""

    name: str
    parameters: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no plan could carry."""
        if not isinstance(self.name, str) or not 0 < len(self.name) <= MAX_TEXT_CHARS:
            msg = f"a schedule's name has 1..{MAX_TEXT_CHARS} characters, got {self.name!r:.300}"
            raise ConfigError(msg)
        if len(self.parameters) > MAX_PARAMETERS:
            msg = (
                f"schedule {self.name!r}: at most {MAX_PARAMETERS} numbers, "
                f"got {len(self.parameters)}"
            )
            raise ConfigError(msg)
        object.__setattr__(self, "parameters", tuple(float(each) for each in self.parameters))


Schedule: TypeAlias = float | Power | OneMinusPower | Named

_FAMILIES: Final[Mapping[str, type[Power | OneMinusPower]]] = {
    "power": Power,
    "one-minus-power": OneMinusPower,
}
_REGISTERED: Final[dict[str, ScheduleFunction]] = {}


def register_schedule(name: str, function: ScheduleFunction) -> None:
    """Give a function of (t, *numbers) a name; every process of a job that names it has to.

    Raises:
        ConfigError: the name is taken, or none.
    """
    Named(name)
    if name in _FAMILIES or _REGISTERED.get(name, function) is not function:
        msg = f"there is a schedule called {name!r} already: choose another name"
        raise ConfigError(msg)
    if ":" in name or "," in name:
        msg = f"a schedule's name has no colon and no comma, got {name!r}"
        raise ConfigError(msg)
    _REGISTERED[name] = function


def schedule_value(schedule: Schedule, t: int) -> float:
    """The schedule at step t >= 1.

    Raises:
        ConfigError: a schedule that is not known here, or that gives no number.
    """
    if isinstance(schedule, Power):
        return float(schedule.value / t**schedule.exponent)
    if isinstance(schedule, OneMinusPower):
        return float(1.0 - schedule.value / t**schedule.exponent)
    if isinstance(schedule, Named):
        return _named_value(schedule, t)
    return schedule


def rate_of(schedule: Schedule) -> Callable[[int], float]:
    """A schedule as the learning rate that `psq.torch.Worker` takes, whose steps count from 0."""
    return lambda step: schedule_value(schedule, step + 1)


def check_unit(name: str, schedule: Schedule, *, allow_zero: bool) -> None:
    """Refuse a schedule that is no weight of an average, a number in [0, 1).

    A user's own is looked at in its first hundred steps and at powers of two up to 2^40.

    Raises:
        ConfigError: it leaves that range; or cannot be computed.
    """
    if isinstance(schedule, Named):
        for t in _LOOKED_AT:
            value = schedule_value(schedule, t)
            if not 0.0 <= value < 1.0:
                msg = f"{name} must lie in [0, 1), got {value!r} at t={t} from {schedule!r}"
                raise ConfigError(msg)
        return
    # With such an exponent a schedule that starts inside [0, 1) stays there, for any 64-bit t.
    if isinstance(schedule, Power | OneMinusPower) and not 0.0 <= schedule.exponent <= MAX_EXPONENT:
        msg = f"{name}: the exponent must lie in [0, {MAX_EXPONENT:g}], got {schedule!r}"
        raise ConfigError(msg)
    first = schedule_value(schedule, 1)
    low_ok = first >= 0.0 if allow_zero else first > 0.0
    if isinstance(schedule, OneMinusPower):
        # theta_1 = 1 - value may be 0: then v starts as g^2, which is well defined.
        low_ok = first >= 0.0
    if not (math.isfinite(first) and low_ok and first < 1.0):
        msg = f"{name} must lie in [0, 1) at t=1, got {first!r} from {schedule!r}"
        raise ConfigError(msg)


def schedule_plain(schedule: Schedule) -> float | list[Any]:
    """A schedule as plain data."""
    if isinstance(schedule, Named):
        return ["named", schedule.name, *schedule.parameters]
    if isinstance(schedule, Power | OneMinusPower):
        return [_family_of(schedule), float(schedule.value), float(schedule.exponent)]
    return float(schedule)


def schedule_from_plain(plain: Any) -> Schedule:
    """Inverse of `schedule_plain`.

    Raises:
        ConfigError: it is no schedule, or one that is not known here.
    """
    match plain:
        case ["power", value, exponent]:
            return Power(_number(value), _number(exponent))
        case ["one-minus-power", value, exponent]:
            return OneMinusPower(_number(value), _number(exponent))
        case ["named", str(name), *numbers]:
            _function_of(name)
            return Named(name, tuple(_number(number) for number in numbers))
    return _number(plain)


def schedule_text(schedule: Schedule) -> str:
    """A schedule as `parse_schedule` reads it."""
    if isinstance(schedule, Named):
        return ":".join((schedule.name, *(f"{number:g}" for number in schedule.parameters)))
    if isinstance(schedule, Power | OneMinusPower):
        return f"{_family_of(schedule)}:{schedule.value:g}:{schedule.exponent:g}"
    return f"{schedule:g}"


def parse_schedule(text: str) -> Schedule | None:
    """What a text means: a number, power:VALUE:EXPONENT, NAME:NUMBER:...; None if it is neither."""
    name, *rest = text.split(":")
    numbers = [_parsed(number) for number in rest]
    given = [number for number in numbers if number is not None]
    if len(given) != len(numbers):
        return None
    if name in _FAMILIES:
        return _FAMILIES[name](*given) if len(given) == 2 else None  # noqa: PLR2004 - VALUE, EXPONENT
    number = _parsed(name)
    if number is not None:
        return None if rest else number
    _function_of(name)
    return Named(name, tuple(given))


def _named_value(schedule: Named, t: int) -> float:
    function = _function_of(schedule.name)
    try:
        value = float(function(t, *schedule.parameters))
    except Exception as error:  # a function of the user's may raise anything
        msg = f"schedule {schedule_text(schedule)!r} cannot be computed at t={t}: {error!r}"
        raise ConfigError(msg) from error
    if not math.isfinite(value):
        msg = f"schedule {schedule_text(schedule)!r} is {value!r} at t={t}: expected a number"
        raise ConfigError(msg)
    return value


def _function_of(name: str) -> ScheduleFunction:
    if name not in _REGISTERED:
        found = entry(SCHEDULES_GROUP, name, object)
        if found is None:
            there = ", ".join(sorted({*_FAMILIES, *_REGISTERED, *entry_names(SCHEDULES_GROUP)}))
            msg = (
                f"no schedule {name!r:.200} here; there are: {there}. Register it in every process "
                f"of the job, or install the package that brings it ({SCHEDULES_GROUP})"
            )
            raise ConfigError(msg)
        function, package = found
        if not callable(function):
            msg = f"schedule {name!r} of the package {package} is no function: {function!r:.80}"
            raise ConfigError(msg)
        _REGISTERED[name] = function
    return _REGISTERED[name]


def _family_of(schedule: Power | OneMinusPower) -> str:
    return next(name for name, kind in _FAMILIES.items() if isinstance(schedule, kind))


def _parsed(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        msg = f"expected a number, got {value!r:.200}"
        raise ConfigError(msg)
    return float(value)

"""What a person types, as a `SimConfig`: rates, durations, shares and faults written as text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Final

from psq.advice.links import parse_link
from psq.config import SimulateConfig, WorkerConfig
from psq.errors import ConfigError
from psq_worker.recipes import recipe_of
from psq_worker.simulate.attacks import Attack
from psq_worker.simulate.config import SimConfig
from psq_worker.simulate.faults import Crash, Faults
from psq_worker.simulate.network import Network
from psq_worker.tasks import Task

__all__ = ["config_of", "parse_seconds"]

_UNITS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_TIME: Final = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s|min)")
_CRASH: Final = re.compile(r"(\d{1,4})@(\d{1,9})(?:\+(.+))?")
PAIR: Final = 2


def config_of(told: WorkerConfig, wanted: SimulateConfig, task: Task) -> SimConfig:
    """The job that the settings add up to.

    Raises:
        ConfigError: a text is not what it is to be; it is named with what was expected.
    """
    return SimConfig(
        task=task,
        recipe=recipe_of(told),
        workers=wanted.workers,
        servers=wanted.servers,
        steps=told.steps,
        batch_size=told.batch_size,
        lr=told.lr,
        schedule=told.schedule,
        eval_every=told.eval_every,
        seed=told.seed,
        consistency=told.consistency,
        residual=told.residual,
        network=_network(wanted),
        compute_s=parse_seconds("compute", wanted.compute),
        reduce_s=parse_seconds("reduce", wanted.reduce),
        faults=_faults(wanted),
        participation=wanted.participation,
        non_iid=wanted.non_iid,
        attack=None if wanted.attack is None else _attack(wanted.attack),
        vectorised=wanted.vectorised,
        chunk=wanted.chunk,
        threads=wanted.threads,
    )


def parse_seconds(name: str, text: str) -> float:
    """A duration such as 50us, 1.5ms, 2s or 3min.

    Raises:
        ConfigError: it is none.
    """
    match = _TIME.fullmatch(text.strip())
    if match is None:
        msg = f"{name}: expected a time such as 50us, 1.5ms, 2s or 3min, got {text!r}"
        raise ConfigError(msg)
    return float(match[1]) * _UNITS[match[2]]


def _network(wanted: SimulateConfig) -> Network:
    server = wanted.server_bandwidth
    return Network(
        bandwidth_bit_s=_rate("bandwidth", wanted.bandwidth),
        server_bit_s=None if server is None else _rate("server_bandwidth", server),
        latency_s=parse_seconds("latency", wanted.latency),
        loss=wanted.loss,
    )


def _rate(name: str, text: str) -> float:
    try:
        return parse_link(text, 0.0).up_bit_s
    except ConfigError as error:
        msg = f"{name}: {error}"
        raise ConfigError(msg) from error


def _faults(wanted: SimulateConfig) -> Faults:
    chance, pause_s = (0.0, 0.0)
    if wanted.pauses is not None:
        said, _, time = wanted.pauses.partition(":")
        chance, pause_s = _number("pauses", said), parse_seconds("pauses", time)
    crashes = [_crash("crash", text, leaves=False) for text in _listed(wanted.crash)]
    crashes += [_crash("leave", text, leaves=True) for text in _listed(wanted.leave)]
    return Faults(
        stragglers=_share("stragglers", wanted.stragglers),
        slow_links=_share("slow_links", wanted.slow_links),
        pause_chance=chance,
        pause_s=pause_s,
        crashes=tuple(crashes),
    )


def _share(name: str, text: str | None) -> tuple[float, float]:
    if text is None:
        return 0.0, 1.0
    parts = text.split(":")
    if len(parts) != PAIR:
        msg = f"{name}: expected SHARE:FACTOR, as in 0.1:4, got {text!r}"
        raise ConfigError(msg)
    share, factor = (_number(name, part) for part in parts)
    return share, factor


def _crash(name: str, text: str, *, leaves: bool) -> Crash:
    match = _CRASH.fullmatch(text)
    if match is None or (leaves and match[3]):
        form = "RANK@STEP, as in 3@20" if leaves else "RANK@STEP or RANK@STEP+TIME, as in 3@20+5s"
        msg = f"{name}: expected {form}, got {text!r}"
        raise ConfigError(msg)
    away_s = math.inf if match[3] is None else parse_seconds(name, match[3])
    return Crash(int(match[1]), int(match[2]), away_s, leaves=leaves)


def _attack(text: str) -> Attack:
    kind, *numbers = text.split(":")
    if len(numbers) not in {1, PAIR} or not numbers[0].isdecimal():
        msg = f"attack: expected KIND:N or KIND:N:STRENGTH, as in sign-flip:2, got {text!r}"
        raise ConfigError(msg)
    strength = _number("attack", numbers[1]) if len(numbers) == PAIR else None
    return Attack(kind, int(numbers[0]), strength)


def _number(name: str, text: str) -> float:
    read: Callable[[str], float] = float
    try:
        value = read(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        msg = f"{name}: expected a number, got {text!r}"
        raise ConfigError(msg)
    return value


def _listed(text: str | None) -> list[str]:
    return [] if text is None else [part.strip() for part in text.split(",")]

"""What a `Worker` is told, from arguments, variables and files: its settings and its recipe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from psq.advice.candidates import Specs
from psq.config import DEFAULT_LR, WorkerConfig, worker_config
from psq.errors import ConfigError
from psq.keys import Ranks, WorkerKeys, load_worker_keys
from psq.plan import Plan
from psq.presets import asked_recipe
from psq.recipe import AdamConfig, Recipe
from psq.theory import schedule_warning
from psq.torch.groups import Grouping

__all__ = ["config_of", "keys_of", "plan_of", "recipe_of", "settle_codecs", "warn_of_schedule"]

CHECKED_STEPS: Final = 10_000
"""Of a job whose length nobody says."""
_log = logging.getLogger("psq.torch")


def config_of(  # noqa: PLR0913 - a worker's arguments
    *,
    lr: float | Callable[[int], float] | None,
    optimizer: object | None,
    recipe: Recipe | str | None,
    adam: AdamConfig | str | None,
    connect: str | Sequence[str] | None,
    options: str | Sequence[str] | None,
    **said: float | str | None,
) -> WorkerConfig:
    """The settings, given a `Worker`'s arguments; what is None there others may say.

    An optimizer has a learning rate of its own, so nobody else may say one.

    Raises:
        ConfigError: an argument, a variable or a file says what cannot be.
    """
    said |= {
        "lr": None if callable(lr) else lr,
        "recipe": recipe if isinstance(recipe, str) else None,
        "adam": adam if isinstance(adam, str) else None,
    }
    settled = ["lr"] if callable(lr) or optimizer is not None else []
    if isinstance(recipe, Recipe):
        if options is not None:
            msg = "options: a recipe given as a value has its own; use recipe.with_options"
            raise ConfigError(msg)
        settled += ["recipe", "with", "uplink", "downlink", "local_steps", "every", "adam", "codec"]
    if isinstance(adam, AdamConfig):
        settled += ["adam"]
    lists = {
        name: each if isinstance(each, str | None) else list(each)
        for name, each in (("connect", connect), ("options", options))
    }
    return worker_config({**said, **lists}, settled=settled)


def recipe_of(
    config: WorkerConfig, recipe: Recipe | str | None, adam: AdamConfig | str | None
) -> Recipe:
    """The recipe that is asked for.

    Raises:
        ConfigError: there is none of that name, or it cannot have these settings.
    """
    if isinstance(recipe, Recipe):
        if adam is not None:
            msg = "adam: a recipe given as a value has its own settings; use recipe.with_adam"
            raise ConfigError(msg)
        return recipe
    return asked_recipe(config, adam if isinstance(adam, AdamConfig) else None)


def keys_of(config: WorkerConfig) -> WorkerKeys | None:
    """The keys of this worker, if links are to be encrypted.

    Raises:
        ConfigError: there are none where they should be, or they are another rank's.
    """
    if config.keys is None:
        return None
    return load_worker_keys(Path(config.keys), Ranks(config.rank, config.rank))


def settle_codecs(
    config: WorkerConfig, specs: Specs, made: Recipe, recipe: Recipe | str | None
) -> tuple[Recipe, str]:
    """The recipe that `codec="auto"` makes of the one that was asked for, and why.

    Without it the recipe stays as it is, and there is nothing to say.

    Raises:
        ConfigError: the recipe was given as a value, codecs and all.
    """
    if config.codec != "auto":
        return made, ""
    if isinstance(recipe, Recipe):
        msg = "codec: auto chooses the recipe's codecs, so it cannot be given as a value: leave one"
        raise ConfigError(msg)
    from psq.torch.auto import settle  # noqa: PLC0415 - only such jobs need to measure

    choice = settle(config, specs, made)
    return choice.recipe, choice.words


def plan_of(config: WorkerConfig, specs: Specs, made: Recipe, grouping: Grouping) -> Plan:
    """What all processes of the job agree on.

    Raises:
        ConfigError: such a job cannot be run.
    """
    return Plan.of(
        specs,
        made,
        config.world_size,
        servers=len(config.endpoints),
        consistency=config.consistency,
        groups=grouping.groups,
        members=[grouping.number(name) for name, _ in specs],
    )


def warn_of_schedule(config: WorkerConfig, made: Recipe, lr: object) -> None:
    """Say once in a job, on rank 0, what Adam's schedule lacks if the rate is a constant.

    Of a rate that is a function nobody knows here how long it goes on: `psq.theory.check_schedule`
    takes it with the number of steps.
    """
    if callable(lr) or config.rank:
        return
    warning = schedule_warning(made, config.lr or DEFAULT_LR, CHECKED_STEPS)
    if warning:
        _log.warning("%s", warning)

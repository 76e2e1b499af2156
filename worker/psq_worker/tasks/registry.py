"""Finds a task by name: one of psq's own, or any `module:attribute` on the import path."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Final

from torch import nn

from psq.errors import ConfigError
from psq_worker.tasks.base import Task
from psq_worker.tasks.char_lm import CharLm
from psq_worker.tasks.fashion_mnist import FashionMnist
from psq_worker.tasks.fashion_resnet import FashionResNet

__all__ = ["TASK_NAMES", "check_model", "find_task", "get_task"]

TASK_NAMES: Final = (FashionMnist.name, FashionResNet.name, CharLm.name)
_NEEDED: Final = ("name", "metric", "model", "loss", "batches", "evaluate")


def find_task(spec: str, data: str | None = None) -> Task:
    """The task that somebody typed: modules in the working folder are found as well.

    Raises:
        ConfigError: as `get_task`.
    """
    if os.getcwd() not in sys.path:  # noqa: PTH109 - sys.path holds texts; a user's task lies here
        sys.path.insert(0, os.getcwd())  # noqa: PTH109 - as above
    return get_task(spec, data_dir=Path(data) if data else None)


def get_task(spec: str, *, data_dir: Path | None = None, subset: bool = False) -> Task:
    """Makes the task that `spec` names, its data loaded and checked.

    Args:
        spec: "fashion-mnist", "fashion-resnet", "char-lm", or "module:attribute", where the
            attribute is a task or makes one when called without arguments (a class or a function).
        data_dir: folder with the data of a task that can read other data than what psq ships: the
            two with Fashion-MNIST's images.
        subset: use the shipped subset although the full set is there; for these two, the others
            have one set.

    Raises:
        ConfigError: no such task, module or attribute; the attribute is no task; the data are
            missing or damaged; or a data folder was given for a task that does not read one.
    """
    if spec == FashionMnist.name:
        return FashionMnist(data_dir, subset=subset)
    if spec == FashionResNet.name:
        return FashionResNet(data_dir, subset=subset)
    if data_dir is not None:
        msg = f"task {spec!r} reads no data folder, but {data_dir} was given: leave the folder out"
        raise ConfigError(msg)
    if spec == CharLm.name:
        return CharLm()
    if ":" not in spec:
        known = ", ".join(TASK_NAMES)
        msg = f"no task {spec!r}: expected one of {known}, or your own as module:attribute"
        raise ConfigError(msg)
    return _user_task(spec)


def check_model(task: Task, model: nn.Module) -> None:
    """Refuses a model that has nothing to train.

    Raises:
        ConfigError: the model has no parameter that wants a gradient.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        msg = (
            f"task {task.name!r}: model {type(model).__name__} has no parameters that require "
            "gradients, so there is nothing to train: register layers as attributes of the module "
            "and do not freeze all of them"
        )
        raise ConfigError(msg)


def _user_task(spec: str) -> Task:
    module_name, _, attribute = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            msg = f"task {spec!r}: module {module_name!r} imports {error.name!r}, which is missing"
            raise ConfigError(msg) from error
        msg = (
            f"task {spec!r}: no module {module_name!r} on the import path: run psq from its folder "
            "or set PYTHONPATH"
        )
        raise ConfigError(msg) from error
    except (ValueError, TypeError) as error:
        msg = f"task {spec!r}: {module_name!r} is no module name"
        raise ConfigError(msg) from error
    if not hasattr(module, attribute):
        msg = f"task {spec!r}: module {module_name!r} has no attribute {attribute!r}"
        raise ConfigError(msg)
    return _as_task(spec, getattr(module, attribute))


def _as_task(spec: str, found: object) -> Task:
    # A class that describes a task has all of a task's attributes and still is none.
    made = found if isinstance(found, Task) and not isinstance(found, type) else _call(spec, found)
    if isinstance(made, Task):
        return made
    lacks = ", ".join(name for name in _NEEDED if not hasattr(made, name))
    msg = (
        f"task {spec!r}: expected a task or a function that makes one, got "
        f"{type(made).__name__} without {lacks}; see psq_worker.tasks.Task"
    )
    raise ConfigError(msg)


def _call(spec: str, factory: object) -> object:
    if not callable(factory):
        return factory
    try:
        return factory()
    except TypeError as error:
        msg = f"task {spec!r}: calling it without arguments failed: {error}"
        raise ConfigError(msg) from error

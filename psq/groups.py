"""Groups of parameters: what some of a model's tensors do otherwise than the rest.

Group 0 is all that the recipe says; others may have another learning rate or other codecs, or be
the server's own, which workers receive and never push. Frozen tensors, and those that never leave
their worker, are in no plan at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from psq.errors import ConfigError
from psq.parts import MAX_TEXT_CHARS

__all__ = ["DEFAULT_GROUP", "MAX_GROUPS", "Group", "check_groups", "group_from_plain"]

MAX_GROUPS: Final = 64
MAX_RATE: Final = 1e6


@dataclass(frozen=True, slots=True)
class Group:
    """What is different for the tensors of a group.

    Args:
        name: for messages.
        lr: times the learning rate of the step, >= 0.
        uplink: codec of its pushes; empty for the recipe's.
        downlink: codec of its answers, whose kind is the recipe's; empty for the recipe's.
        pushed: whether workers push it. If not, only the server moves it.
    """

    name: str = "default"
    lr: float = 1.0
    uplink: str = ""
    downlink: str = ""
    pushed: bool = True

    def __post_init__(self) -> None:
        """Types and ranges; codecs are looked at by the plan."""
        texts: tuple[object, ...] = (self.name, self.uplink, self.downlink)
        if not all(isinstance(text, str) for text in texts):
            msg = f"a group's name and codecs are texts, got {texts!r:.300}"
            raise ConfigError(msg)
        if not 0 < len(self.name) <= MAX_TEXT_CHARS:
            msg = f"a group's name has 1..{MAX_TEXT_CHARS} characters, got {self.name!r:.300}"
            raise ConfigError(msg)
        lr = self.lr
        if type(lr) not in (int, float) or not (math.isfinite(lr) and 0.0 <= lr <= MAX_RATE):
            msg = f"group {self.name!r}: lr must be 0..{MAX_RATE:g} times the step's, got {lr!r}"
            raise ConfigError(msg)
        object.__setattr__(self, "lr", float(lr))
        pushed: object = self.pushed
        if not isinstance(pushed, bool):
            msg = f"group {self.name!r}: pushed is true or false, got {pushed!r:.100}"
            raise ConfigError(msg)

    def to_plain(self) -> list[Any]:
        """Plain data in a fixed order."""
        return [self.name, self.lr, self.uplink, self.downlink, self.pushed]


DEFAULT_GROUP: Final = Group()


def group_from_plain(plain: Any) -> Group:
    """Inverse of `Group.to_plain`.

    Raises:
        ConfigError: it is no group.
    """
    match plain:
        case [name, float(lr), uplink, downlink, pushed]:
            return Group(name, lr, uplink, downlink, pushed)
    msg = f"a group is [name, lr, uplink, downlink, pushed], got {plain!r:.200}"
    raise ConfigError(msg)


def check_groups(groups: Sequence[Group], members: Sequence[int], tensors: int) -> None:
    """Whether groups and their members fit a model of so many tensors.

    Raises:
        ConfigError: group 0 is not the default, a name comes twice, there are too many, a tensor is
            of none, or nothing is ever pushed.
    """
    if not groups or groups[0] != DEFAULT_GROUP:
        msg = f"group 0 is {DEFAULT_GROUP}, got {groups[0] if groups else 'no group'}"
        raise ConfigError(msg)
    if len(groups) > MAX_GROUPS:
        msg = f"a model has up to {MAX_GROUPS} groups, got {len(groups)}"
        raise ConfigError(msg)
    names = [group.name for group in groups]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        msg = f"two groups are called {twice!r}: names must be unique"
        raise ConfigError(msg)
    if len(members) != tensors:
        msg = f"members: expected a group for each of {tensors} parameters, got {len(members)}"
        raise ConfigError(msg)
    wrong = [each for each in members if type(each) is not int or not 0 <= each < len(groups)]
    if wrong:
        msg = f"a parameter is of group {wrong[0]!r:.80}, there are groups 0..{len(groups) - 1}"
        raise ConfigError(msg)
    if tensors and not any(groups[each].pushed for each in members):
        msg = "no parameter is pushed: workers would have nothing to say"
        raise ConfigError(msg)

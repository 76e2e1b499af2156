"""Parameter groups: which of a model's parameters are treated in a way of their own, and how.

    local      never pushed, never received: this worker's own, stepped by the user's own optimizer
    pushed     the usual case: pushed and received
    received   `pushed=False`: this worker says nothing of them, the server's weights come in

Parameters with `requires_grad=False` are frozen: like local ones they are left out, of whatever
group they are, but for those that are only received: these need no gradient.

What a job must agree on (rates, codecs, who is pushed) goes into the plan as `psq.plan.Group`, so
every worker makes the same groups in the same order. Local parameters are in no plan: workers may
have different ones. Nothing here touches a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final, TypeAlias

from torch import nn

from psq.errors import ConfigError
from psq.groups import DEFAULT_GROUP
from psq.groups import Group as PlanGroup

__all__ = ["Group", "Grouping", "group_up"]

Which: TypeAlias = str | nn.Parameter | Iterable[str | nn.Parameter]

MAX_NAMES_SHOWN: Final = 8


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Some parameters of a model, and what is special about them.

        Group("head.*", lr_factor=0.1, uplink="bf16")
        Group(model.memory.parameters(), local=True)

    Attributes:
        parameters: names as `named_parameters` gives them, with * ? [] as in a shell, or parameters
            themselves; one or several.
        name: for messages and the plan; made up where none is given.
        lr_factor: the learning rate is the worker's times this.
        local: never pushed nor received.
        pushed: False: only received.
        uplink: the codec of these pushes, where it is not the recipe's.
        downlink: the codec of the answers, where it is not the recipe's.
    """

    parameters: Which
    name: str = ""
    lr_factor: float = 1.0
    local: bool = False
    pushed: bool = True
    uplink: str = ""
    downlink: str = ""

    def __post_init__(self) -> None:
        """Patterns and parameters as a tuple; nothing is said of local ones that they cannot do."""
        which = self.parameters
        is_one = isinstance(which, str | nn.Parameter) or not isinstance(which, Iterable)
        several = (which,) if is_one else tuple(which)
        wrong = [each for each in several if not isinstance(each, str | nn.Parameter)]
        if wrong or not several:
            got = f"{type(wrong[0]).__name__} {wrong[0]!r:.80}" if wrong else "nothing"
            msg = f"a Group is made of parameter names or parameters, got {got}"
            raise ConfigError(msg)
        object.__setattr__(self, "parameters", several)
        plain = (self.lr_factor, self.pushed, self.uplink, self.downlink) == (1.0, True, "", "")
        if self.local and not plain:
            msg = (
                f"{self.words}: local parameters are the user's own optimizer's: lr_factor, "
                "pushed, uplink and downlink say nothing of them; leave these out"
            )
            raise ConfigError(msg)

    @property
    def words(self) -> str:
        """The group, in messages."""
        if self.name:
            return f"group {self.name!r}"
        assert isinstance(self.parameters, tuple)  # noqa: S101 - made so above
        first = self.parameters[0]
        return f"group of {first!r}" if isinstance(first, str) else "a group of parameters"


@dataclass(frozen=True, slots=True)
class Grouping:
    """A model's parameters, told apart.

    Attributes:
        groups: those of the plan; the first is that of all parameters that no group names.
        numbers: the place in `groups` of each parameter that is not in the first, by name.
        local: names of the parameters that psq leaves alone.
    """

    groups: tuple[PlanGroup, ...] = (DEFAULT_GROUP,)
    numbers: Mapping[str, int] = field(default_factory=dict)
    local: frozenset[str] = frozenset()

    def number(self, name: str) -> int:
        """The place in `groups` of a parameter that is not local."""
        return self.numbers.get(name, 0)

    def is_pushed(self, name: str) -> bool:
        """Whether a parameter that is not local is pushed, or only received."""
        return self.groups[self.number(name)].pushed


def group_up(model: nn.Module, groups: Sequence[Group]) -> Grouping:
    """Find each group's parameters.

    Raises:
        ConfigError: a group that has no parameter of the model, a parameter that is in two, a
            parameter that is not the model's, or two groups of one name.
    """
    made = [DEFAULT_GROUP]
    numbers: dict[str, int] = {}
    local: set[str] = set()
    taken: dict[str, Group] = {}
    for group in groups:
        names = _names_of(model, group)
        for name in names:
            if name in taken:
                msg = (
                    f"parameter {name!r} is in {taken[name].words} and in {group.words}: "
                    "a parameter belongs to one group"
                )
                raise ConfigError(msg)
            taken[name] = group
        if group.local:
            local.update(names)
        else:
            numbers |= dict.fromkeys(names, len(made))
            made.append(_of_plan(group, f"group{len(made)}", made))
    return Grouping(tuple(made), numbers, frozenset(local))


def _of_plan(group: Group, name: str, before: Sequence[PlanGroup]) -> PlanGroup:
    name = group.name or name
    if any(each.name == name for each in before):
        msg = f"two groups are called {name!r}: give each a name of its own"
        raise ConfigError(msg)
    return PlanGroup(
        name=name,
        lr=float(group.lr_factor),
        uplink=group.uplink,
        downlink=group.downlink,
        pushed=group.pushed,
    )


def _names_of(model: nn.Module, group: Group) -> list[str]:
    """The group's parameters as `named_parameters` calls them, each once, in the model's order."""
    assert isinstance(group.parameters, tuple)  # noqa: S101 - made so when it was made
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    wanted: set[str] = set()
    for which in group.parameters:
        if isinstance(which, str):
            # A parameter that the model uses twice has two names, and answers to both.
            every = model.named_parameters(remove_duplicate=False)
            found = {first[id(p)] for name, p in every if fnmatchcase(name, which)}
            lacking = f"no parameter is called {which!r}; there are {_some(first.values())}"
        else:
            found = {first[id(which)]} if id(which) in first else set()
            lacking = f"a parameter of shape {list(which.shape)} is not in the model"
        if not found:
            msg = f"{group.words}: {lacking}"
            raise ConfigError(msg)
        wanted |= found
    members = [parameter for name, parameter in model.named_parameters() if name in wanted]
    must_train = group.pushed and not group.local
    if must_train and not any(parameter.requires_grad for parameter in members):
        msg = f"{group.words}: all its parameters are frozen (requires_grad=False), nothing is left"
        raise ConfigError(msg)
    return [name for name in first.values() if name in wanted]


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - MAX_NAMES_SHOWN
    return ", ".join(listed[:MAX_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")

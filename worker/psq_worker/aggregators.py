"""Which aggregators a launched job has between its workers and a server: a tree of equal fan-out.

    --tree 2, 5 workers        server    --children 0-3,4
                               0-3       --children 0-1,2-3        (its parent is the server)
                               0-1, 2-3  --children 0,1 and 2,3    (theirs is 0-3)

Each server, and each aggregator, hears `fanout` at most; a worker alone at the end of its level
talks to whoever is above. Pure: nothing is started here.
"""

from __future__ import annotations

from dataclasses import dataclass

from psq.errors import ConfigError

__all__ = ["Aggregator", "Tree", "plan_tree"]


@dataclass(frozen=True, slots=True)
class Aggregator:
    """One process.

    Attributes:
        leaves: the ranks below it, as in "0-3".
        children: who talks to it, as psq-server takes them.
        parent: the leaves of the aggregator above; empty for the server.
        ranks: the workers that talk to it themselves.
    """

    leaves: str
    children: str
    parent: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tree:
    """What one server of a job has below it: `children` of its own, and aggregators, parents first.

    `ranks` are the workers that talk to the server itself.
    """

    children: str
    aggregators: tuple[Aggregator, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Node:
    first: int
    last: int
    below: tuple[_Node, ...] = ()

    @property
    def text(self) -> str:
        return f"{self.first}-{self.last}" if self.below else f"{self.first}"

    @property
    def children(self) -> str:
        return ",".join(node.text for node in self.below)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(node.first for node in self.below if not node.below)


def plan_tree(workers: int, fanout: int) -> Tree:
    """The tree of so many workers.

    Raises:
        ConfigError: so few workers need no aggregator.
    """
    if workers <= fanout:
        msg = (
            f"tree: {workers} workers with a fan-out of {fanout} need no aggregators: leave it out"
        )
        raise ConfigError(msg)
    level = [_Node(rank, rank) for rank in range(workers)]
    while len(level) > fanout:
        groups = [level[at : at + fanout] for at in range(0, len(level), fanout)]
        level = [
            group[0] if len(group) == 1 else _Node(group[0].first, group[-1].last, tuple(group))
            for group in groups
        ]
    root = _Node(0, workers - 1, tuple(level))
    return Tree(root.children, tuple(_aggregators(root, "")), root.ranks)


def _aggregators(node: _Node, name: str) -> list[Aggregator]:
    """All below a node, parents first."""
    found: list[Aggregator] = []
    for below in node.below:
        if below.below:
            found.append(Aggregator(below.text, below.children, name, below.ranks))
            found += _aggregators(below, below.text)
    return found

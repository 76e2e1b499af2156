"""Which aggregators a launched job has."""

from __future__ import annotations

import pytest

from psq.errors import ConfigError
from psq_server.state import parse_branches
from psq_worker.aggregators import plan_tree


def test_five_workers_in_twos_have_two_levels():
    tree = plan_tree(5, 2)
    assert tree.children == "0-3,4"
    assert tree.ranks == (4,)
    assert [(one.leaves, one.children, one.parent) for one in tree.aggregators] == [
        ("0-3", "0-1,2-3", ""),
        ("0-1", "0,1", "0-3"),
        ("2-3", "2,3", "0-3"),
    ]


@pytest.mark.parametrize(
    ("workers", "fanout"),
    [(w, f) for w in (5, 8, 9, 16, 31) for f in (2, 3, 4, 7) if w > f],
)
def test_every_worker_has_one_place_and_nobody_hears_too_many(workers, fanout):
    tree = plan_tree(workers, fanout)
    ranks = [rank for one in tree.aggregators for rank in one.ranks]
    assert sorted([*ranks, *tree.ranks]) == list(range(workers))
    names = [""]
    for one in tree.aggregators:
        assert one.parent in names, "a parent is started first"
        names.append(one.leaves)
        branches = parse_branches(one.children)
        assert not branches.misfit(workers, is_root=False)
        assert f"{branches.first}-{branches.last}" == one.leaves
        assert 2 <= len(branches.items) <= fanout
    root = parse_branches(tree.children)
    assert not root.misfit(workers, is_root=True)
    assert len(root.items) <= fanout


def test_a_tree_without_aggregators_is_refused():
    with pytest.raises(ConfigError, match="4 workers with a fan-out of 4 need no aggregators"):
        plan_tree(4, 4)

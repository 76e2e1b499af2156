"""Which jobs a tree of aggregators can run: those where a mean of means is the mean.

An aggregator says one message for several, in the job's own codec. That is the same job, with a
little more residual, where the root adds messages up by weight and each shard by itself. Where it
counts heads, or sorts them, or has to see whole rounds, one message for several is another thing.

With aggregate "coded" a group's word is chosen where its ranks connect, and from there on words add
up like any others; so all ranks of a group have to connect to the same server of the tree.
"""

from __future__ import annotations

from typing import cast

from psq.clock import parse_consistency
from psq.parts import load_rule
from psq.plan import Plan
from psq.rules import ApplyRule
from psq_server.state.branches import Branches

__all__ = ["refusal", "split_group"]


def refusal(plan: Plan) -> str:
    """Why a tree cannot run this job, in words; empty if it can."""
    recipe, consistency = plan.recipe, parse_consistency(plan.consistency)
    if not consistency.eager:
        return (
            f"a tree of aggregators runs consistency bsp, not {consistency.text}: every message of "
            "an aggregator waits for all of its workers"
        )
    if recipe.aggregate.kind not in {"mean", "coded"}:
        return (
            f"a tree of aggregators cannot run recipe {recipe.name!r}: aggregate="
            f"{recipe.aggregate.kind} looks at every worker's message, and an aggregator passes on "
            "one for several; connect the workers to the root, or choose aggregate=mean"
        )
    if recipe.whole:
        return (
            f"a tree of aggregators cannot run recipe {recipe.name!r}: apply={recipe.apply.kind} "
            "takes whole rounds, and aggregators pass on shard by shard"
        )
    rule = cast("type[ApplyRule]", load_rule(recipe.apply.part))
    if rule.rescale is not ApplyRule.rescale:
        return (
            f"a tree of aggregators cannot run recipe {recipe.name!r}: apply={recipe.apply.kind} "
            "changes the units of residuals by a state that aggregators do not have; "
            "server-adam can be run"
        )
    if rule.counts_absent:
        return (
            f"a tree of aggregators cannot run recipe {recipe.name!r}: apply={recipe.apply.kind} "
            "counts a silent worker as one that said zero, and a message says nothing of those"
        )
    return ""


def split_group(plan: Plan, branches: Branches) -> str:
    """Which ranks that compute the same do not all connect here, in words; empty if none."""
    ends = [branches.first, branches.last + 1]
    for branch in branches.items:
        ends += [branch.rank, branch.last + 1] if branch.is_aggregator else []
    parted = next((end for end in ends if end % plan.replicas), None)
    if parted is None:
        return ""
    start = parted - parted % plan.replicas
    return (
        f"children: {branches.text} part the ranks {start} to {start + plan.replicas - 1}, which "
        f"compute the same (aggregate=coded, replicas={plan.replicas}): all of them have to "
        "connect to one server of the tree"
    )

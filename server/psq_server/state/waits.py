"""Waits: who the job stands still for, since when, in words.

A wait is named by what it needs and of whom; while that stays the same it grows older, and whatever
brings it nearer to its end (another shard, another joiner) starts its age anew. So the age says for
how long *nothing* has happened, which is what a bound on waiting is about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from psq_server.state.branches import Branches

__all__ = ["MAX_NAMED_RANKS", "Wait", "describe"]

MAX_NAMED_RANKS: Final = 8

Need = Literal["join", "weights", "push", "payloads", "disk"]


@dataclass(frozen=True, slots=True)
class Wait:
    """`ranks` owe a JOIN, the initial weights, a push of `round`, or what they said since `round`.

    They are ascending; none means that nobody knows yet who will come, or that it is the disk's
    turn.
    """

    need: Need
    ranks: tuple[int, ...]
    round: int
    since_s: float

    def age_s(self, now_s: float) -> float:
        """For how long nothing has come nearer."""
        return max(0.0, now_s - self.since_s)


def describe(  # noqa: PLR0913 - the parts of a sentence
    wait: Wait,
    *,
    world_size: int | None,
    now_s: float,
    seen_s: Mapping[int, float],
    others_left: bool = False,
    branches: Branches | None = None,
    few: str = "",
) -> str:
    """The wait in words.

    As in "waiting for rank 1 of 2 for 12 s, last seen 12.3 s ago (to push round 7)".

    Args:
        wait: what is waited for.
        world_size: how many ranks there are, None while unknown.
        now_s: the moment of asking.
        seen_s: when each rank was last heard; a rank that never was is not in it.
        others_left: some ranks have ended their part, so these may as well.
        branches: who speaks for whom, in a tree.
        few: that there are too few workers, in words.
    """
    age = f"for {wait.age_s(now_s):.0f} s"
    if world_size is None or not wait.ranks:
        return f"waiting for the first worker {age}"
    named = wait.ranks[:MAX_NAMED_RANKS]
    names = ", ".join(_name(rank, branches) for rank in named)
    ranks = f"rank{'s' if len(wait.ranks) > 1 else ''} {names}"
    if len(wait.ranks) > len(named):
        ranks += f" and {len(wait.ranks) - len(named)} more"
    seen, need = _seen(named, now_s, seen_s), _need(wait, others_left)
    need += f": {few}" if few and wait.need == "join" else ""
    return f"waiting for {ranks} of {world_size} {age}, {seen} ({need})"


def _name(rank: int, branches: Branches | None) -> str:
    branch = branches.of(rank) if branches is not None else None
    if branch is None or not branch.is_aggregator:
        return str(rank)
    return f"{rank} (the aggregator of {branch.text})"


def _seen(ranks: tuple[int, ...], now_s: float, seen_s: Mapping[int, float]) -> str:
    ages = [
        f"{max(0.0, now_s - seen_s[rank]):.1f} s ago" if rank in seen_s else "never"
        for rank in ranks
    ]
    if set(ages) == {"never"}:
        return "never seen"
    return "last seen " + ", ".join(ages)


def _need(wait: Wait, others_left: bool) -> str:  # noqa: FBT001 - private, named at its one call
    if wait.need == "join":
        return "to join"
    if wait.need == "weights":
        return "to send the initial weights"
    if wait.need == "payloads":
        return f"to say again what it said in round {wait.round} and after"
    return f"to push round {wait.round}{' or leave' if others_left else ''}"

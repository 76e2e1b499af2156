"""The arithmetic of a recipe's parts: what a worker says, and what becomes of it.

A rule is found by its part's name (`psq.parts`), imported on first use, and works shard by shard.
"""

from __future__ import annotations

from psq.rules.base import (
    AggregateRule,
    ApplyRule,
    ChoiceRule,
    DirectionRule,
    Judgement,
    OptionValue,
    RoundView,
    RuleOptions,
    Said,
    Segments,
)

__all__ = [
    "AggregateRule",
    "ApplyRule",
    "ChoiceRule",
    "DirectionRule",
    "Judgement",
    "OptionValue",
    "RoundView",
    "RuleOptions",
    "Said",
    "Segments",
]

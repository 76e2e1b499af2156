"""What a field of a control body may hold: each check raises UsageError and says what it wanted.

Bodies are checked when they are made, by whoever makes them; the decoder makes them too, and turns
the UsageError into a RemoteWireError.
"""

from __future__ import annotations

import math
from typing import Any

from psq_proto.errors import UsageError
from psq_proto.limits import MAX_LIST_ITEMS, MAX_TEXT_BYTES, NO_SHARD

__all__ = ["choice", "clip_text", "flag", "items", "seconds", "shards", "text", "whole"]


def clip_text(value: str) -> str:
    """`value`, cut to what a control body may hold; what UTF-8 cannot carry becomes a "?"."""
    return value.encode("utf-8", "replace")[:MAX_TEXT_BYTES].decode("utf-8", "ignore")


def whole(what: str, value: object, low: int, high: int) -> None:
    """A whole number in low..high; true and false are none."""
    if type(value) is not int or not low <= value <= high:
        msg = f"{what} must be a whole number {low}..{high}, got {value!r:.80}"
        raise UsageError(msg)


def seconds(what: str, value: object) -> float:
    """Finite and not negative; a whole number is taken as one, so that 0 and 0.0 mean the same."""
    if isinstance(value, int | float) and type(value) is not bool and 0 <= value < math.inf:
        return float(value)
    msg = f"{what} must be a finite number of seconds >= 0, got {value!r:.80}"
    raise UsageError(msg)


def flag(what: str, value: object) -> None:
    """True or false, and nothing that merely counts as such."""
    if type(value) is not bool:
        msg = f"{what} must be true or false, got {value!r:.80}"
        raise UsageError(msg)


def text(what: str, value: object) -> None:
    """A string that UTF-8 carries in at most MAX_TEXT_BYTES."""
    if not isinstance(value, str) or clip_text(value) != value:
        msg = (
            f"{what} must be a string of at most {MAX_TEXT_BYTES} bytes of UTF-8 (see clip_text), "
            f"got {value!r:.80}"
        )
        raise UsageError(msg)


def choice(what: str, value: object, allowed: tuple[str, ...]) -> None:
    """One of a few words."""
    if value not in allowed:
        msg = f"{what} must be one of {', '.join(allowed)}, got {value!r:.80}"
        raise UsageError(msg)


def items(what: str, value: object) -> tuple[Any, ...]:
    """A tuple of at most MAX_LIST_ITEMS; its items are for the caller to check."""
    if not isinstance(value, tuple) or len(value) > MAX_LIST_ITEMS:
        msg = f"{what} must be a tuple of at most {MAX_LIST_ITEMS} items, got {value!r:.80}"
        raise UsageError(msg)
    return value


def shards(what: str, value: object) -> None:
    """A tuple of shard indexes, ascending and none twice, so that nobody can act on one twice."""
    before = -1
    for shard in items(what, value):
        whole(what, shard, 0, NO_SHARD - 1)
        if shard <= before:
            msg = f"{what} must name shards in ascending order, got {shard} after {before}"
            raise UsageError(msg)
        before = shard

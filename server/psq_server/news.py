"""What a server's disk answers. Plain values, so that who has no disk need not load one's code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Answered", "Copied", "Kept", "News", "Refused"]


@dataclass(frozen=True, slots=True)
class Answered:
    """All that this ticket asked for is on disk."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The disk refuses, and is asked again; empty: it does not any more."""

    text: str


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint is on disk, or is not and why; `note` is of what was done with it since.

    Attributes:
        is_alone: what was to be done with it could not be, as the note says.
    """

    version: int
    text: str = ""
    note: str = ""
    is_alone: bool = False


@dataclass(frozen=True, slots=True)
class Copied:
    """A checkpoint was copied somewhere else, `text` says where; or it could not be, and why."""

    version: int
    text: str
    failed: bool = False


News: TypeAlias = Answered | Refused | Kept | Copied

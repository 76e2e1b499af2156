"""What an HTTP client can be answered with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

__all__ = ["NOT_FOUND", "OK", "UNAVAILABLE", "Page", "Pages"]

OK: Final = 200
NOT_FOUND: Final = 404
UNAVAILABLE: Final = 503


@dataclass(frozen=True, slots=True)
class Page:
    """One answer."""

    body: bytes
    content_type: str
    code: int = OK


Pages: TypeAlias = Mapping[str, Callable[[], Page]]
"""Path to what makes the page: in a thread of its own, so it must not block."""

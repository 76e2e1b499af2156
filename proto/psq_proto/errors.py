"""The part of psq's error tree that the protocol raises; `psq.errors` draws the whole tree."""

from __future__ import annotations

from typing import Final

__all__ = [
    "EXIT_CONFIG",
    "EXIT_FENCED",
    "EXIT_GAVE_UP",
    "EXIT_REFUSED",
    "EXIT_STATE",
    "EXIT_USAGE",
    "FencedError",
    "GaveUpError",
    "LocalError",
    "PsqError",
    "RefusedError",
    "RemoteError",
    "RemotePayloadError",
    "RemotePlanError",
    "RemoteProtocolError",
    "RemoteVersionError",
    "RemoteWireError",
    "StaleFrameError",
    "UsageError",
]

EXIT_USAGE: Final = 64
EXIT_STATE: Final = 65
EXIT_GAVE_UP: Final = 75
EXIT_FENCED: Final = 76
EXIT_REFUSED: Final = 77
EXIT_CONFIG: Final = 78


class PsqError(Exception):
    """Anything psq raises on purpose; `exit_code` is what a command then ends with."""

    exit_code: int = 1


class LocalError(PsqError):
    """This program asked for something illegal."""


class UsageError(LocalError):
    """An API was called in a way its contract forbids."""

    exit_code = EXIT_USAGE


class RemoteError(PsqError):
    """The peer sent or did something illegal, or nothing at all."""


class RemoteWireError(RemoteError):
    """Bytes that are no message: wrong magic, length, checksum, or over a limit."""


class RemoteProtocolError(RemoteError):
    """A well-formed message that is not allowed in the session's present state."""


class StaleFrameError(RemoteProtocolError):
    """A message of an earlier epoch, incarnation or connection; `incarnation` is what it claimed.

    A worker drops it; a server answers it with STALE_EPOCH.
    """

    def __init__(self, message: str, incarnation: int = 0) -> None:
        super().__init__(message)
        self.incarnation = incarnation


class RemotePlanError(RemoteError):
    """The peer trains another model or recipe, or speaks another protocol version."""

    exit_code = EXIT_CONFIG


class RemoteVersionError(RemotePlanError):
    """The peer speaks no protocol version that this side speaks."""


class RemotePayloadError(RemoteError):
    """A payload whose length, codec or scales do not fit the plan."""


class FencedError(RemoteError):
    """A newer process took over this worker's rank."""

    exit_code = EXIT_FENCED


class RefusedError(RemoteError):
    """The server turned this worker away."""

    exit_code = EXIT_REFUSED


class GaveUpError(RemoteError):
    """Nobody answered for as long as this process was told to wait."""

    exit_code = EXIT_GAVE_UP

"""Every error psq raises, drawn once, and the exit code that goes with it.

PsqError
├── LocalError               this program asked for something illegal
│   ├── ConfigError          an option, a TOML file or an environment variable is wrong     78
│   ├── UsageError           an API was called in a way its contract forbids                64
│   └── StateError           a file or directory of ours cannot be used                     65
└── RemoteError              the peer sent or did something illegal, or nothing at all
    ├── RemoteWireError      bytes that are no message: magic, length, crc, limits
    ├── RemoteProtocolError  a message that is not allowed now
    │   └── StaleFrameError  one of an earlier epoch, incarnation or connection: drop it
    ├── RemotePlanError      the peer has another model, recipe or protocol version         78
    │   └── RemoteVersionError    the version, in particular                                78
    ├── RemotePayloadError   a payload whose length, codec or scales do not fit the plan
    ├── FencedError          a newer process took over our rank                             76
    ├── RefusedError         the server turned us away: unknown rank, key refused           77
    └── GaveUpError          nobody answered for as long as we were told to wait            75

The number is the exit code of a command that ends with it; 1 where none stands.
A message says what was expected, what came, from whom, and what to do about it.
The classes that the wire protocol itself raises live in `psq_proto.errors`, below every other
layer; this module adds the rest and re-exports all of them, so callers import one module.
"""

from __future__ import annotations

from psq_proto.errors import (
    EXIT_CONFIG,
    EXIT_FENCED,
    EXIT_GAVE_UP,
    EXIT_REFUSED,
    EXIT_STATE,
    EXIT_USAGE,
    FencedError,
    GaveUpError,
    LocalError,
    PsqError,
    RefusedError,
    RemoteError,
    RemotePayloadError,
    RemotePlanError,
    RemoteProtocolError,
    RemoteVersionError,
    RemoteWireError,
    StaleFrameError,
    UsageError,
)

__all__ = [
    "EXIT_CONFIG",
    "EXIT_FENCED",
    "EXIT_GAVE_UP",
    "EXIT_REFUSED",
    "EXIT_STATE",
    "EXIT_USAGE",
    "ConfigError",
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
    "StateError",
    "UsageError",
]


class ConfigError(LocalError):
    """An option, a TOML file or an environment variable is wrong."""

    exit_code = EXIT_CONFIG


class StateError(LocalError):
    """A file or directory of ours cannot be used."""

    exit_code = EXIT_STATE

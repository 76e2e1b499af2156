"""From a codec's text or wire id to the codec.

spec   = name [":" option {"," option}]          sign    log:k=6,block=256    uniform:bits=8
option = key "=" value
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, Final

from psq.codec.base import Codec
from psq.codec.families import FAMILIES
from psq.errors import ConfigError, RemotePayloadError

__all__ = ["all_codecs", "codec_of_wire_id", "codec_specs", "get_codec"]

_FAMILIES: Final = {family.name: family for family in FAMILIES}


@functools.cache
def get_codec(spec: str) -> Codec:
    """Return the codec a spec names; the same object for the same text.

    Raises:
        ConfigError: no such codec, option or value; the message lists those that exist.
    """
    name, colon, listed = spec.partition(":")
    family = _FAMILIES.get(name)
    if family is None:
        msg = f"codec {spec!r}: no codec is called {name!r}; there are {', '.join(_FAMILIES)}"
        raise ConfigError(msg)
    options: dict[str, Any] = {}
    for option in listed.split(",") if colon else ():
        key, _, text = option.partition("=")
        if key in options:
            msg = f"codec {spec!r}: option {key!r} is given twice"
            raise ConfigError(msg)
        options[key] = _value(spec, name, key, text)
    return family(**options)


def _value(spec: str, name: str, key: str, text: str) -> Any:
    choices = _FAMILIES[name].choices
    if key not in choices:
        has = f"its options are {', '.join(choices)}" if choices else "it has none"
        msg = f"codec {spec!r}: {name!r} has no option {key!r}; {has}, written key=value"
        raise ConfigError(msg)
    if text not in choices[key]:
        msg = f"codec {spec!r}: {key} cannot be {text!r}; it is one of {', '.join(choices[key])}"
        raise ConfigError(msg)
    return choices[key][text]


@functools.cache
def codec_specs() -> tuple[str, ...]:
    """Canonical specs of all codecs with the default block, in the order of their wire ids."""
    return tuple(codec.spec for codec in all_codecs() if "block=" not in codec.spec)


def codec_of_wire_id(wire_id: int) -> Codec:
    """Return the codec whose payloads carry this id.

    Raises:
        RemotePayloadError: no codec has it.
    """
    codec = _by_wire_id().get(wire_id)
    if codec is None:
        msg = f"codec id {wire_id:#06x} names no codec of this version: the peer is newer or broken"
        raise RemotePayloadError(msg)
    return codec


@functools.cache
def _by_wire_id() -> dict[int, Codec]:
    return {codec.wire_id: codec for codec in all_codecs()}


@functools.cache
def all_codecs() -> tuple[Codec, ...]:
    """Return every codec with every value of every option, in the order of their wire ids."""
    codecs = [
        get_codec(family.name + (":" + ",".join(options) if options else ""))
        for family in FAMILIES
        for options in itertools.product(
            *([f"{key}={text}" for text in values] for key, values in family.choices.items())
        )
    ]
    return tuple(sorted(codecs, key=lambda codec: codec.wire_id))

"""Codecs: f32 values to payloads of a few bits a value, and back.

>>> codec = get_codec("sign")
>>> codec.nbytes(1 << 20)
135168
"""

from __future__ import annotations

from psq.codec.base import DEFAULT_BLOCK, Codec
from psq.codec.registry import codec_of_wire_id, codec_specs, get_codec
from psq.codec.shard import MAX_SCALE, ShardCodec

__all__ = [
    "DEFAULT_BLOCK",
    "MAX_SCALE",
    "Codec",
    "ShardCodec",
    "codec_of_wire_id",
    "codec_specs",
    "get_codec",
]

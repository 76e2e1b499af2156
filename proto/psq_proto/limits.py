"""Every limit and reserved value of the protocol, each written once."""

from __future__ import annotations

from typing import Final

from psq_proto.packing import PackLimits

__all__ = [
    "CONTROL_LIMITS",
    "INIT_PART_NUMEL",
    "MAJOR",
    "MAX_CONTROL_BYTES",
    "MAX_LIST_ITEMS",
    "MAX_PAYLOAD_BYTES",
    "MAX_POSITIONS",
    "MAX_TEXT_BYTES",
    "NONE",
    "NO_SHARD",
    "NO_VERSION",
    "PLAN_LIMITS",
    "U32_MAX",
    "U64_MAX",
]

MAJOR: Final = 1
"""The protocol version this package speaks."""

U32_MAX: Final = (1 << 32) - 1
U64_MAX: Final = (1 << 64) - 1

MAX_PAYLOAD_BYTES: Final = 1 << 20
"""The longest body of a data message; the layout cuts shards so that no payload is longer."""
MAX_CONTROL_BYTES: Final = 64 * 1024
"""The longest body of a control message."""
MAX_TEXT_BYTES: Final = 4096
"""The longest string in a control body, in UTF-8 bytes."""
MAX_LIST_ITEMS: Final = 1024
"""The longest list in a control body; who has more to report reports the first ones."""

MAX_POSITIONS: Final = 1 << 62
"""The largest data set whose order workers draw ranges of."""

NO_SHARD: Final = U32_MAX
"""The shard of a SKIP that speaks for every shard not said yet."""
NO_VERSION: Final = U64_MAX
"""The version of a PULL from a worker that has no weights yet."""
NONE: Final = -1
"""No version, no sequence number: in control bodies, where such fields are signed."""
INIT_PART_NUMEL: Final = MAX_PAYLOAD_BYTES // 4
"""Part p of a shard sent as f32 holds its elements [p * INIT_PART_NUMEL, ...)."""

CONTROL_LIMITS: Final = PackLimits(
    total_bytes=MAX_CONTROL_BYTES,
    map_items=64,
    array_items=MAX_LIST_ITEMS,
    str_bytes=MAX_TEXT_BYTES,
    bin_bytes=4096,
    depth=8,
    items=6 * MAX_LIST_ITEMS,
)
PLAN_LIMITS: Final = PackLimits(
    total_bytes=MAX_PAYLOAD_BYTES,
    map_items=64,
    array_items=65_536,
    str_bytes=4096,
    bin_bytes=0,
    depth=8,
    items=8 * 65_536,
)
"""For whoever reads a PLAN body; the wire layer passes it on as bytes."""

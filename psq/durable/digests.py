"""Checksums of what lies on disk, and small texts that carry their own.

xxh3-128 of arrays, manifests and small files finds any accident; it does not stop a forger. A
sealed text is the text, then a last line "xxh3_128 HEX" over all that is before it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from xxhash import xxh3_128_digest, xxh3_128_hexdigest

from psq.durable.files import explained
from psq.errors import StateError

__all__ = ["DIGEST_BYTES", "MAX_TEXT_BYTES", "read_sealed", "sealed", "xxh3_128"]

DIGEST_BYTES: Final = 16
MAX_TEXT_BYTES: Final = 256 << 20
_SEAL: Final = re.compile(rb"xxh3_128 ([0-9a-f]{32})\n")
_SEAL_BYTES: Final = len("xxh3_128 ") + 2 * DIGEST_BYTES + 1


def xxh3_128(data: bytes | bytearray | memoryview) -> bytes:
    """The 16 bytes of a digest."""
    return bytes(xxh3_128_digest(data))


def sealed(text: str) -> bytes:
    """A text that ends with a line, and a line that says what it must be."""
    data = text.encode()
    assert data.endswith(b"\n")  # noqa: S101 - our own texts
    return data + f"xxh3_128 {xxh3_128_hexdigest(data)}\n".encode()


def read_sealed(path: Path) -> str:
    """A sealed text's text.

    Raises:
        StateError: it cannot be read, or is not what was written.
    """
    with explained("read", path), path.open("rb") as file:
        data = file.read(MAX_TEXT_BYTES + 1)
    text, seal = data[:-_SEAL_BYTES], _SEAL.fullmatch(data[-_SEAL_BYTES:])
    if seal is None or len(data) > MAX_TEXT_BYTES or seal[1].decode() != xxh3_128_hexdigest(text):
        msg = f"{path} is damaged: its last line is not the checksum of the others"
        raise StateError(msg)
    return text.decode()

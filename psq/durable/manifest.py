"""What a checkpoint's manifest says: every file, every array, and the checksum of every byte.

    manifest.json    sealed text (psq.durable.digests): one JSON object on one line
      format, version
      files          [name, bytes]: arrays lie in them one behind the other, nothing between
      arrays         [name, dtype, shape, file's place in the list, offset, xxh3-128]
      meta           [bytes, xxh3-128] of meta.msgpack

Every byte of every file belongs to one array, or to the meta, so one flipped bit is always found.
Pure but for `read_manifest`. A manifest that does not hold together is never handed out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from psq.durable.digests import DIGEST_BYTES, read_sealed
from psq.errors import StateError, UsageError

__all__ = [
    "FORMAT",
    "MANIFEST",
    "MAX_ARRAYS",
    "META",
    "ArrayEntry",
    "Manifest",
    "check_kind",
    "manifest_text",
    "read_manifest",
]

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
META: Final = "meta.msgpack"
MAX_ARRAYS: Final = 1 << 20
MAX_NAME_CHARS: Final = 4096
MAX_DIMENSIONS: Final = 32
MAX_ARRAY_BYTES: Final = 1 << 44
_FILE_NAME: Final = re.compile(r"arrays-\d{5}\.bin")
_HEX: Final = re.compile(rf"[0-9a-f]{{{2 * DIGEST_BYTES}}}")
_KINDS: Final = "biuf"


@dataclass(frozen=True, slots=True)
class ArrayEntry:
    """One array: what it is, and where it lies.

    Attributes:
        dtype: as NumPy writes it, little-endian.
        shape: its own, kept.
        file: its place in the manifest's files.
        offset: of its first byte there.
        digest: xxh3-128 of its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    digest: str

    @property
    def nbytes(self) -> int:
        """How much it takes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of a manifest."""

    version: int
    files: tuple[tuple[str, int], ...]
    arrays: Mapping[str, ArrayEntry]
    meta_bytes: int
    meta_digest: str


def check_kind(name: str, dtype: np.dtype[Any]) -> str:
    """The dtype's text.

    Raises:
        UsageError: such an array cannot be saved.
    """
    little = dtype.newbyteorder("<")
    if dtype.kind not in _KINDS or little.str == "|O":
        msg = f"array {name!r} has dtype {dtype}: a checkpoint holds bools, integers and floats"
        raise UsageError(msg)
    if dtype != little:
        msg = f"array {name!r} has dtype {dtype}: a checkpoint is little-endian; convert it"
        raise UsageError(msg)
    return str(little.str)


def manifest_text(manifest: Manifest) -> str:
    """The line that `read_manifest` reads."""
    arrays = [
        [a.name, a.dtype, list(a.shape), a.file, a.offset, a.digest]
        for a in manifest.arrays.values()
    ]
    value = {
        "format": FORMAT,
        "version": manifest.version,
        "files": manifest.files,
        "meta": [manifest.meta_bytes, manifest.meta_digest],
        "arrays": arrays,
    }
    return json.dumps(value, separators=(",", ":")) + "\n"


def read_manifest(path: Path) -> Manifest:
    """The manifest in a checkpoint's folder.

    Raises:
        StateError: it is missing, damaged, or of another format.
    """
    place = path / MANIFEST
    try:
        value = json.loads(read_sealed(place))
        if value["format"] != FORMAT:
            msg = (
                f"{place} has format {value['format']!r:.20}, this psq reads format {FORMAT}: "
                "use the psq that wrote it"
            )
            raise StateError(msg)
        return _parse(value)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        msg = f"{place} is no manifest of a checkpoint ({error}), though its checksum holds"
        raise StateError(msg) from error


def _parse(value: Mapping[str, Any]) -> Manifest:
    files = tuple((str(name), _natural(size)) for name, size in value["files"])
    arrays = [_entry(row) for row in value["arrays"]]
    meta_bytes, meta_digest = value["meta"]
    _require(len(arrays) <= MAX_ARRAYS, "arrays")
    _require(all(_FILE_NAME.fullmatch(name) for name, _ in files), "files")
    _require(len({array.name for array in arrays}) == len(arrays), "names")
    _require(_HEX.fullmatch(meta_digest) is not None, "meta")
    _check_layout(files, arrays)
    return Manifest(
        _natural(value["version"]),
        files,
        {array.name: array for array in arrays},
        _natural(meta_bytes),
        meta_digest,
    )


def _entry(row: list[Any]) -> ArrayEntry:
    name, dtype, shape, file, offset, digest = row
    _require(isinstance(name, str) and len(name) <= MAX_NAME_CHARS, "name")
    _require(isinstance(dtype, str) and dtype == np.dtype(dtype).newbyteorder("<").str, "dtype")
    _require(np.dtype(dtype).kind in _KINDS and len(shape) <= MAX_DIMENSIONS, "dtype")
    _require(_HEX.fullmatch(digest) is not None, "digest")
    sizes = tuple(_natural(size) for size in shape)
    entry = ArrayEntry(name, dtype, sizes, _natural(file), _natural(offset), digest)
    _require(entry.nbytes <= MAX_ARRAY_BYTES, "shape")
    return entry


def _check_layout(files: tuple[tuple[str, int], ...], arrays: list[ArrayEntry]) -> None:
    """Arrays fill their files, in order, with nothing between."""
    ends = [0] * len(files)
    for array in arrays:
        _require(array.file < len(files) and array.offset == ends[array.file], "offset")
        ends[array.file] += array.nbytes
    _require(ends == [size for _, size in files], "files")


def _natural(value: Any) -> int:
    _require(type(value) is int and value >= 0, "number")
    return int(value)


def _require(holds: object, what: str) -> None:
    if not holds:
        msg = f"its {what} cannot be"
        raise ValueError(msg)

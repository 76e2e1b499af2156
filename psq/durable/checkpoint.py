"""A checkpoint: named arrays and a meta, in a folder that is whole or not there.

    checkpoint-VERSION-SERIAL/    arrays-00000.bin ...   meta.msgpack   manifest.json
    CURRENT                       the name of the newest, for people and tools

Everything is written into a temporary folder: files, each synced, the manifest last of all; then
the folder is synced, gets its name, and the folder above is synced. So what has the name of a
checkpoint is a whole one, unless a disk spoils it later, which every reader finds: no array leaves
this module before its checksum was right.

Arrays are taken and written one after another, 1 MiB at a time; memory beyond theirs is that of a
piece. One process writes in a folder; anybody may read.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgpack
import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128

from psq.durable.digests import read_sealed, sealed
from psq.durable.failpoints import reach
from psq.durable.files import bytes_of, explained, replace_file, sync, sync_folder, write_all
from psq.durable.manifest import (
    MANIFEST,
    MAX_ARRAYS,
    META,
    ArrayEntry,
    Manifest,
    check_kind,
    manifest_text,
    read_manifest,
)
from psq.errors import StateError, UsageError

__all__ = [
    "CURRENT",
    "MAX_FILE_BYTES",
    "PIECE_BYTES",
    "TEMPORARY",
    "Checkpoint",
    "Listed",
    "adopt",
    "current",
    "list_checkpoints",
    "load_checkpoint",
    "open_checkpoint",
    "parse_name",
    "verify",
    "write_checkpoint",
]

CURRENT: Final = "CURRENT"
TEMPORARY: Final = ".tmp-"
"""What the names of unfinished, or half removed, checkpoints begin with."""
PIECE_BYTES: Final = 1 << 20
"""What is hashed and written, or read and hashed, at a time: it stays in the processor's cache."""
ALIGNED_BYTES: Final = 64
"""Arrays that are read together begin at multiples of this: a line of the processor's cache."""
MAX_FILE_BYTES: Final = 1 << 30
"""A file gets no further array from here on; one array may be larger."""
MAX_META_BYTES: Final = 256 << 20
_NAME: Final = re.compile(r"checkpoint-(\d{20})-(\d{4})")
_MAX_SERIAL: Final = 9999


@dataclass(frozen=True, slots=True)
class Listed:
    """A checkpoint by its name; what is in it was not looked at."""

    path: Path
    version: int
    serial: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose manifest and meta are sound; its arrays are still on disk."""

    path: Path
    version: int
    meta: dict[Any, Any]
    manifest: Manifest

    @property
    def arrays(self) -> Mapping[str, ArrayEntry]:
        """What arrays it has, by name."""
        return self.manifest.arrays

    @property
    def nbytes(self) -> int:
        """Of all files but the manifest."""
        return sum(size for _, size in self.manifest.files) + self.manifest.meta_bytes

    def read(self, name: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Read one array.

        Args:
            name: of the array.
            out: where it goes: C-contiguous, of its dtype and shape. None: into a new one.

        Returns:
            `out`, or the new array.

        Raises:
            StateError: it is damaged, or the disk refused; `out` may hold any part of it.
            UsageError: there is no such array, or `out` does not fit.
        """
        entry = self.arrays.get(name)
        if entry is None:
            msg = f"{self.path} has no array {name!r}"
            raise UsageError(msg)
        if out is None:
            out = np.empty(entry.shape, entry.dtype)
        elif out.shape != entry.shape or out.dtype.str != entry.dtype or not out.flags.c_contiguous:
            msg = (
                f"array {name!r} is {entry.dtype}{list(entry.shape)}, contiguous; the buffer for "
                f"it is {out.dtype.str}{list(out.shape)}"
            )
            raise UsageError(msg)
        place = self.path / self.manifest.files[entry.file][0]
        with explained("read", place), place.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            digest = _read_into(file, bytes_of(out))
        if digest != entry.digest:
            msg = f"{place} is damaged: array {name!r} is not what was written"
            raise StateError(msg)
        return out

    def read_all(self) -> dict[str, NDArray[Any]]:
        """Read every array into one new block of memory, which lives as long as any of them.

        Raises:
            StateError: as `read`.
        """
        sizes = [_aligned(entry.nbytes) for entry in self.arrays.values()]
        block = np.empty(sum(sizes), np.uint8)
        found, at = {}, 0
        for entry, size in zip(self.arrays.values(), sizes, strict=True):
            place = block[at : at + entry.nbytes].view(entry.dtype).reshape(entry.shape)
            found[entry.name] = self.read(entry.name, place)
            at += size
        return found

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The same, piece by piece, in memory that is used again; checked after the last piece.

        Raises:
            StateError: as `read`.
        """
        entry = self.arrays[name]
        place = self.path / self.manifest.files[entry.file][0]
        buffer, state = memoryview(bytearray(min(PIECE_BYTES, entry.nbytes))), xxh3_128()
        with explained("read", place), place.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            for start in range(0, entry.nbytes, PIECE_BYTES):
                piece = buffer[: entry.nbytes - start]
                _fill(file, piece)
                state.update(piece)
                yield piece
        if state.hexdigest() != entry.digest:
            msg = f"{place} is damaged: array {name!r} is not what was written"
            raise StateError(msg)


# ---- writing


def write_checkpoint(
    folder: Path, version: int, arrays: Mapping[str, NDArray[Any]], meta: Mapping[Any, Any]
) -> Path:
    """Save arrays and a meta; as this returns they are on disk, under their name.

    Args:
        folder: of checkpoints; it is there.
        version: of what is saved. A second checkpoint of one version is put beside the first.
        arrays: bools, integers and floats of any shape, asked for one at a time, in order; nobody
            changes one while it is written.
        meta: small values, as msgpack can say them.

    Returns:
        The checkpoint's folder.

    Raises:
        StateError: the disk refused; the others are as before, and unless it was the very last
            step, there is no such checkpoint.
        UsageError: something in it cannot be saved.

    Cost: one pass over the bytes, for the checksum.
    """
    packed = _pack_meta(meta)

    def fill(temporary: Path) -> None:
        files, entries = _write_arrays(temporary, arrays)
        _write_file(temporary / META, packed)
        digest = xxh3_128(packed).hexdigest()
        manifest = Manifest(version, files, entries, len(packed), digest)
        reach("checkpoint.manifest")
        _write_file(temporary / MANIFEST, sealed(manifest_text(manifest)))

    return adopt(folder, version, fill)


def adopt(folder: Path, version: int, fill: Callable[[Path], None]) -> Path:
    """Make a checkpoint of what `fill` puts into a temporary folder, whose files it has synced.

    Raises:
        StateError: as `write_checkpoint`.
    """
    with explained("write a checkpoint in", folder):
        for leftover in folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover)
        temporary = folder / f"{TEMPORARY}{version}"
        temporary.mkdir()
        try:
            fill(temporary)
            sync_folder(temporary)
            path = folder / _free_name(folder, version)
            reach("checkpoint.rename")
            temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        reach("checkpoint.renamed")
        sync_folder(folder)
    replace_file(folder / CURRENT, sealed(f"{path.name}\n"))
    reach("checkpoint.current")
    return path


def _free_name(folder: Path, version: int) -> str:
    serials = [listed.serial for listed in list_checkpoints(folder) if listed.version == version]
    serial = max(serials, default=-1) + 1
    if serial > _MAX_SERIAL:
        msg = f"{folder} has {serial} checkpoints of version {version}: psq ckpt prune it"
        raise StateError(msg)
    return f"checkpoint-{version:020d}-{serial:04d}"


def _pack_meta(meta: Mapping[Any, Any]) -> bytes:
    try:
        packed: bytes = msgpack.packb(dict(meta))
    except (TypeError, ValueError, OverflowError) as error:
        msg = f"a checkpoint's meta must be what msgpack can say: {error}"
        raise UsageError(msg) from error
    if len(packed) > MAX_META_BYTES:
        msg = f"a checkpoint's meta has {len(packed):,} bytes, expected up to {MAX_META_BYTES:,}"
        raise UsageError(msg)
    return packed


def _write_file(path: Path, data: bytes) -> None:
    with path.open("xb", buffering=0) as file:
        write_all(file.fileno(), [data])
        sync(file.fileno())


def _write_arrays(
    folder: Path, arrays: Mapping[str, NDArray[Any]]
) -> tuple[tuple[tuple[str, int], ...], dict[str, ArrayEntry]]:
    """Write every array, in as many files as it takes: these and their sizes, and the entries."""
    if len(arrays) > MAX_ARRAYS:
        msg = f"a checkpoint has up to {MAX_ARRAYS:,} arrays, got {len(arrays):,}"
        raise UsageError(msg)
    files: list[tuple[str, int]] = []
    entries: dict[str, ArrayEntry] = {}
    names = iter(arrays)
    name = next(names, None)
    while name is not None:
        file_name, offset = f"arrays-{len(files):05d}.bin", 0
        with (folder / file_name).open("xb", buffering=0) as file:
            while name is not None and offset < MAX_FILE_BYTES:
                entry = _write_array(file, name, arrays[name], len(files), offset)
                entries[name] = entry
                offset += entry.nbytes
                name = next(names, None)
            sync(file.fileno())
        reach("checkpoint.file")
        files.append((file_name, offset))
    return tuple(files), entries


def _write_array(
    file: BinaryIO, name: str, array: NDArray[Any], place: int, offset: int
) -> ArrayEntry:
    dtype = check_kind(name, array.dtype)
    view, state = bytes_of(np.ascontiguousarray(array)), xxh3_128()
    for start in range(0, view.nbytes, PIECE_BYTES):
        piece = view[start : start + PIECE_BYTES]
        state.update(piece)
        write_all(file.fileno(), [piece])
    reach("checkpoint.array")
    return ArrayEntry(name, dtype, array.shape, place, offset, state.hexdigest())


# ---- reading


def parse_name(name: str) -> tuple[int, int] | None:
    """(version, serial) of a checkpoint's folder; None if it is none."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def list_checkpoints(folder: Path) -> list[Listed]:
    """The checkpoints in a folder by their names, newest first; none if there is no folder.

    Raises:
        StateError: it cannot be read.
    """
    if not folder.is_dir():
        return []
    with explained("read", folder):
        names = [entry.name for entry in folder.iterdir()]
    found = [(folder / name, parse_name(name)) for name in names]
    listed = [Listed(path, *numbers) for path, numbers in found if numbers]
    return sorted(listed, key=lambda one: (one.version, one.serial), reverse=True)


def current(folder: Path) -> Path | None:
    """What CURRENT names, if it does; for people and tools, recovery goes by what is valid.

    Raises:
        StateError: CURRENT is damaged, or names none of a checkpoint.
    """
    place = folder / CURRENT
    if not place.exists():
        return None
    name = read_sealed(place).removesuffix("\n")
    if parse_name(name) is None:
        msg = f"{place} names {name!r:.80}, which is no checkpoint's name"
        raise StateError(msg)
    return folder / name


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest and meta, and look at its files' sizes.

    Raises:
        StateError: it is missing or damaged.
    """
    manifest = read_manifest(path)
    place = path / META
    with explained("read", place), place.open("rb") as file:
        packed = file.read(MAX_META_BYTES + 1)
    sound = len(packed) == manifest.meta_bytes
    if not sound or xxh3_128(packed).hexdigest() != manifest.meta_digest:
        msg = f"{place} is damaged: it is not what was written"
        raise StateError(msg)
    for name, size in manifest.files:
        with explained("read", path / name):
            found = (path / name).stat().st_size
        if found != size:
            msg = f"{path / name} is damaged: it has {found:,} bytes, expected {size:,}"
            raise StateError(msg)
    return Checkpoint(path, manifest.version, _unpack_meta(place, packed), manifest)


def load_checkpoint(path: Path) -> tuple[dict[str, NDArray[Any]], dict[Any, Any]]:
    """Read all of a checkpoint: (arrays by name, meta); the arrays are the caller's own.

    Raises:
        StateError: it is missing or damaged.
    """
    checkpoint = open_checkpoint(path)
    return checkpoint.read_all(), checkpoint.meta


def verify(path: Path) -> tuple[str, ...]:
    """Read all of a checkpoint, and say what is wrong with it; nothing, if it is valid.

    Cost: one pass over the files; memory for one piece.
    """
    try:
        checkpoint = open_checkpoint(path)
    except StateError as error:
        return (str(error),)
    problems = []
    for name in checkpoint.arrays:
        try:
            for _ in checkpoint.chunks(name):
                pass
        except StateError as error:
            problems.append(str(error))
    return tuple(problems)


def _unpack_meta(place: Path, packed: bytes) -> dict[Any, Any]:
    try:
        meta = msgpack.unpackb(packed, strict_map_key=False, max_ext_len=0)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        msg = f"{place} is no msgpack ({error}), though its checksum holds"
        raise StateError(msg) from error
    if not isinstance(meta, dict):
        msg = f"{place} holds no map, though its checksum holds"
        raise StateError(msg)
    return meta


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNED_BYTES) * ALIGNED_BYTES


def _read_into(file: BinaryIO, view: memoryview) -> str:
    """Fill memory from a file: the digest of what came."""
    state = xxh3_128()
    for start in range(0, view.nbytes, PIECE_BYTES):
        piece = view[start : start + PIECE_BYTES]
        _fill(file, piece)
        state.update(piece)
    return state.hexdigest()


def _fill(file: BinaryIO, piece: memoryview) -> None:
    while piece.nbytes:
        came = os.readv(file.fileno(), [piece])
        if not came:
            piece[:] = bytes(piece.nbytes)
            return  # shorter than its manifest says: the digest will not fit
        piece = piece[came:]

"""A checkpoint's weights as a safetensors file, by parameter name, for anybody who has no psq.

What a parameter is made of stands in the checkpoint's meta, put there by who wrote it:

    "parameters"   {name: {"shape": [...], "pieces": [[array, start, stop], ...]}}
                   flat ranges of arrays; one behind the other they are the parameter
    "export"       {text: text}, the file's own metadata; may be missing

Every array is read once, piece by piece, and each piece goes to its place in the file; the file
gets its name only if all checksums were right. Memory is that of a piece.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from psq.durable.checkpoint import Checkpoint, open_checkpoint
from psq.durable.files import explained, sync, sync_folder
from psq.errors import StateError

__all__ = ["export_safetensors"]

_DTYPES: Final = {
    "|b1": "BOOL",
    "|u1": "U8",
    "|i1": "I8",
    "<u2": "U16",
    "<i2": "I16",
    "<f2": "F16",
    "<u4": "U32",
    "<i4": "I32",
    "<f4": "F32",
    "<u8": "U64",
    "<i8": "I64",
    "<f8": "F64",
}


@dataclass(frozen=True, slots=True, order=True)
class _Piece:
    """Bytes [start, stop) of an array, and where they go."""

    start: int
    stop: int
    target: int


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A parameter, and the ranges of arrays it is made of."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[str, int, int], ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def export_safetensors(path: Path, out: Path) -> int:
    """Write a checkpoint's weights to a file, replacing what was there.

    Args:
        path: of the checkpoint.
        out: the file.

    Returns:
        The file's size in bytes.

    Raises:
        StateError: the checkpoint is damaged, or says nothing of parameters, or the disk refused;
            nothing was replaced.
    """
    checkpoint = open_checkpoint(path)
    header, pieces = _lay_out(checkpoint)
    out = out.absolute()
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with explained("write", out):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            _put(fd, header, 0)
            for array, wanted in pieces.items():
                _copy(checkpoint, array, sorted(wanted), fd)
            sync(fd)
            size_bytes = os.fstat(fd).st_size
            temporary.replace(out)
            sync_folder(out.parent)
        finally:
            os.close(fd)
            temporary.unlink(missing_ok=True)
    return size_bytes


def _lay_out(checkpoint: Checkpoint) -> tuple[bytes, dict[str, list[_Piece]]]:
    """The file's head, and what of each array goes where."""
    head: dict[str, Any] = {"__metadata__": _metadata(checkpoint)}
    parameters = list(_parameters(checkpoint))
    at = 0
    for parameter in parameters:
        stop = at + parameter.nbytes
        kind = _DTYPES[parameter.dtype]
        shape, offsets = list(parameter.shape), [at, stop]
        head[parameter.name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
        at = stop
    text = json.dumps(head, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8, as the format says
    header = len(text).to_bytes(8, "little") + text
    pieces: dict[str, list[_Piece]] = {}
    target = len(header)
    for parameter in parameters:
        itemsize = np.dtype(parameter.dtype).itemsize
        for array, start, stop in parameter.pieces:
            piece = _Piece(start * itemsize, stop * itemsize, target)
            pieces.setdefault(array, []).append(piece)
            target += piece.stop - piece.start
    return header, pieces


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    told = checkpoint.meta.get("export", {})
    if not isinstance(told, dict) or not all(
        isinstance(word, str) for pair in told.items() for word in pair
    ):
        msg = f"{checkpoint.path}: its meta's 'export' must be a map of texts"
        raise StateError(msg)
    return told


def _parameters(checkpoint: Checkpoint) -> Iterator[_Parameter]:
    """What the meta says of parameters, each made up entirely of what is there.

    Raises:
        StateError: it says nothing, or something that cannot be.
    """
    told = checkpoint.meta.get("parameters")
    if not isinstance(told, dict):
        msg = (
            f"{checkpoint.path} holds no weights by name: its meta has no 'parameters'; export a "
            "server's checkpoint"
        )
        raise StateError(msg)
    for name, one in told.items():
        try:
            yield _parameter(checkpoint, str(name), one)
        except (KeyError, TypeError, ValueError) as error:
            msg = f"{checkpoint.path}: what its meta says of parameter {name!r:.80} cannot be"
            raise StateError(msg) from error


def _parameter(checkpoint: Checkpoint, name: str, told: Mapping[str, Any]) -> _Parameter:
    shape = tuple(int(size) for size in told["shape"])
    pieces = tuple((str(array), int(start), int(stop)) for array, start, stop in told["pieces"])
    dtypes = {checkpoint.arrays[array].dtype for array, _, _ in pieces} or {"<f4"}
    (dtype,) = dtypes
    numel = 0
    for array, start, stop in pieces:
        if not 0 <= start <= stop <= math.prod(checkpoint.arrays[array].shape):
            raise ValueError(array)
        numel += stop - start
    if numel != math.prod(shape) or min(shape, default=0) < 0 or dtype not in _DTYPES:
        raise ValueError(name)
    return _Parameter(name, dtype, shape, pieces)


def _copy(checkpoint: Checkpoint, array: str, pieces: list[_Piece], fd: int) -> None:
    """Read an array once, and put what is wanted of it where it goes."""
    at, first = 0, 0
    for chunk in checkpoint.chunks(array):
        end = at + chunk.nbytes
        while first < len(pieces) and pieces[first].stop <= at:
            first += 1
        for piece in pieces[first:]:
            if piece.start >= end:
                break
            start, stop = max(piece.start, at), min(piece.stop, end)
            if start < stop:
                _put(fd, chunk[start - at : stop - at], piece.target + start - piece.start)
        at = end


def _put(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view.nbytes:
        written = os.pwrite(fd, view, offset)
        offset, view = offset + written, view[written:]

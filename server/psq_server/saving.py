"""The final weights on disk: whole, or as before.

They are written beside their place, fsynced and renamed into it, and the folder is fsynced too: a
crash at any moment leaves the old file or the new one. The format is safetensors, which plain
PyTorch, NumPy and everything else reads, and which can hold no code.

Where several servers share a job, each saves a part of its own: what it has of every parameter, as
flat slices, with the shapes of all in the metadata. `merge` makes one file of all parts, one
parameter at a time in memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from psq.errors import StateError
from psq.plan import Plan
from psq_server.slices import parse_slice

__all__ = ["check_writable", "free_bytes", "merge", "metadata_of", "part_path", "save_weights"]

FLOAT_BYTES: Final = 4
_OF_THE_JOB: Final = ("job", "servers", "shapes")
"""What must be equal in the metadata of all parts of a job."""
_OF_A_PART: Final = ("server", "version", "recipe")


def check_writable(path: Path) -> None:
    """Refuse a place that cannot be written, before anybody has trained for hours.

    Raises:
        StateError: the folder does not exist or cannot be written, or the path is a folder.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        msg = f"cannot save weights to {path}: there is no folder {folder}; create it"
        raise StateError(msg)
    if path.is_dir():
        msg = f"cannot save weights to {path}: it is a folder; name a file in it"
        raise StateError(msg)
    if not os.access(folder, os.W_OK | os.X_OK):
        msg = f"cannot save weights to {path}: no permission to write in {folder}"
        raise StateError(msg)


def free_bytes(path: Path) -> int | None:
    """What is free beside this place, where the system says it."""
    try:
        return shutil.disk_usage(path.absolute().parent).free
    except OSError:
        return None


def part_path(path: Path, server: int, servers: int) -> Path:
    """Where server number `server` of `servers` saves, if it was told `path`.

    NAME.server0-of-2.safetensors for NAME.safetensors; the path itself if there is one server.
    """
    if servers == 1:
        return path
    return path.with_name(f"{path.stem}.server{server}-of-{servers}{path.suffix}")


def metadata_of(plan: Plan, run_id: bytes, version: int) -> dict[str, str]:
    """What a file says of the weights in it."""
    metadata = {
        "run_id": run_id.hex(),
        "version": str(version),
        "plan": f"{plan.digest:016x}",
        "recipe": plan.recipe.name,
    }
    if plan.servers > 1:
        shapes = {name: list(shape) for name, shape in plan.tensors}
        metadata |= {
            "job": f"{plan.job_digest:016x}",
            "server": str(plan.server),
            "servers": str(plan.servers),
            "shapes": json.dumps(shapes),
        }
    return metadata


def save_weights(
    path: Path, weights: Mapping[str, NDArray[np.float32]], metadata: Mapping[str, str]
) -> int:
    """Write the weights, replacing what was there.

    Args:
        path: the file.
        weights: by parameter name, shaped.
        metadata: text for whoever opens the file.

    Returns:
        The file's size in bytes.

    Raises:
        StateError: the disk refused; nothing was replaced.
    """
    from safetensors.numpy import save_file  # noqa: PLC0415 - at the end only: starts stay fast

    return _replace(path, lambda place: save_file(dict(weights), place, metadata=dict(metadata)))


def _replace(path: Path, write: Callable[[Path], object]) -> int:
    """Let `write` make the file beside its place, and put it there if all went well."""
    path = path.absolute()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        size_bytes = temporary.stat().st_size
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    except Exception as error:  # the library raises its own kind for a full disk
        temporary.unlink(missing_ok=True)
        msg = f"cannot save weights to {path}: {error}"
        raise StateError(msg) from error
    return size_bytes


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- merging


@dataclass(frozen=True, slots=True)
class _Piece:
    """Values [start, stop) of a parameter, in a file under this key."""

    start: int
    stop: int
    key: str
    opened: Any


def merge(paths: Sequence[Path], out: Path) -> int:
    """Make one file, of whole parameters by name, of the parts that the servers of a job saved.

    Args:
        paths: every server's part, in any order.
        out: the file; it may not be one of the parts.

    Returns:
        The file's size in bytes.

    Raises:
        StateError: a part is missing, is none, is of another job, or is the file to be made, or the
            disk refused; nothing was replaced.

    Cost: memory for the largest parameter and one slice of it.
    """
    if out.resolve() in {path.resolve() for path in paths}:
        msg = f"{out} is one of the parts: name another file for the whole"
        raise StateError(msg)
    with ExitStack() as stack:
        parts = {path: _open(path, stack) for path in paths}
        told = {path: _told(path, part) for path, part in parts.items()}
        first = _check_parts(told)
        shapes = _shapes(first["shapes"])
        pieces = _pieces(parts, shapes)
        metadata = {"job": first["job"], "recipe": first["recipe"], "version": _versions(told)}
        return _replace(out, lambda place: _write(place, shapes, pieces, metadata))


def _open(path: Path, stack: ExitStack) -> Any:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - as above

    try:
        return stack.enter_context(safe_open(path, "numpy"))
    except (OSError, SafetensorError) as error:
        msg = f"cannot read weights from {path}: {error}; name the parts that the servers saved"
        raise StateError(msg) from error


def _told(path: Path, part: Any) -> dict[str, str]:
    metadata = part.metadata() or {}
    lacking = [key for key in (*_OF_THE_JOB, *_OF_A_PART) if key not in metadata]
    if lacking:
        msg = (
            f"{path} is no part of a job's weights: its metadata have no {', '.join(lacking)}; "
            "name the files NAME.server0-of-2.safetensors, ... that servers saved"
        )
        raise StateError(msg)
    for key in ("server", "servers", "version"):
        if not metadata[key].isdecimal():
            msg = f"{path} is damaged: its {key} is {metadata[key]!r:.80}, no number"
            raise StateError(msg)
    return dict(metadata)


def _shapes(text: str) -> dict[str, list[int]]:
    """The shapes of a job's parameters, as its parts tell them."""
    try:
        shapes = json.loads(text)
        return {name: [int(size) for size in shape] for name, shape in shapes.items()}
    except (ValueError, TypeError, AttributeError) as error:
        msg = f"the parts are damaged: their shapes cannot be read: {error}"
        raise StateError(msg) from error


def _check_parts(told: Mapping[Path, Mapping[str, str]]) -> Mapping[str, str]:
    """Refuse parts that do not belong together; returns what one of them tells."""
    if not told:
        msg = "there are no parts to merge: name every server's file"
        raise StateError(msg)
    (first_path, first), *others = told.items()
    for path, other in others:
        for key in _OF_THE_JOB:
            if other[key] != first[key]:
                here, there = other[key][:80], first[key][:80]
                msg = (
                    f"{path} does not belong to {first_path}: its {key} is {here}, there it is "
                    f"{there}; merge the parts of one run"
                )
                raise StateError(msg)
    came = sorted(int(other["server"]) for other in told.values())
    if came != list(range(int(first["servers"]))):
        msg = (
            f"expected one part of each of {first['servers']} servers, got those of servers "
            f"{', '.join(map(str, came))}"
        )
        raise StateError(msg)
    return first


def _versions(told: Mapping[Path, Mapping[str, str]]) -> str:
    """The parts' version; if servers counted differently (as in ssp, asp), from lowest to highest.

    Each server counts its own rounds.
    """
    versions = sorted({int(other["version"]) for other in told.values()})
    return str(versions[0]) if len(versions) == 1 else f"{versions[0]}..{versions[-1]}"


def _pieces(
    parts: Mapping[Path, Any], shapes: Mapping[str, Sequence[int]]
) -> dict[str, list[_Piece]]:
    """Each parameter's slices in order; together they are exactly the whole of it."""
    pieces: dict[str, list[_Piece]] = {name: [] for name in shapes}
    for path, opened in parts.items():
        for key in opened.keys():  # noqa: SIM118 - it is no mapping
            parsed = parse_slice(key)
            if parsed is None or parsed[0] not in pieces:
                msg = f"{path} holds {key!r}, which is no slice of a parameter of this job"
                raise StateError(msg)
            pieces[parsed[0]].append(_Piece(parsed[1], parsed[2], key, opened))
    for name, own in pieces.items():
        own.sort(key=lambda piece: piece.start)
        stops = [0, *(piece.stop for piece in own)]
        if [piece.start for piece in own] != stops[:-1] or stops[-1] != _numel(shapes[name]):
            msg = f"the parts do not make up the whole of {name!r}: one of them is damaged"
            raise StateError(msg)
    return pieces


def _numel(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _write(
    place: Path,
    shapes: Mapping[str, Sequence[int]],
    pieces: Mapping[str, Sequence[_Piece]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file piece by piece: a length, a JSON header, the values."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, shape in shapes.items():
        stop = at + FLOAT_BYTES * _numel(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8, as the format says
    with place.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            for piece in pieces[name]:
                values = piece.opened.get_tensor(piece.key)
                if values.dtype != np.float32 or values.size != piece.stop - piece.start:
                    msg = f"{piece.key!r} holds {values.size} values of {values.dtype}"
                    raise StateError(msg)
                file.write(values.astype("<f4", copy=False).tobytes())

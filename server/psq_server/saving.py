"""The final weights on disk: whole, or as before.

They are written beside their place, fsynced and renamed into it, and the folder is fsynced too: a
crash at any moment leaves the old file or the new one. The format is safetensors, which plain
PyTorch, NumPy and everything else reads, and which can hold no code.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from psq.errors import StateError

__all__ = ["check_writable", "free_bytes", "save_weights"]


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

    path = path.absolute()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(dict(weights), temporary, metadata=dict(metadata))
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

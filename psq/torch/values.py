"""Values of a training script as bytes and back: dicts, lists, numbers, texts, bytes, tensors.

    [u32 length][JSON][crc32][buffers]       tensors, arrays and bytes are buffers, the rest is JSON

Nothing is executed when it is read, and what cannot be written is refused by its name: no pickle.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from psq.errors import StateError, UsageError

__all__ = ["pack", "unpack"]

_SIZES: Final = struct.Struct("<QQI")
_PLAIN: Final = (bool, int, float, str, type(None))
MAX_DEPTH: Final = 32


def pack(value: Any, name: str = "value") -> bytes:
    """A value as bytes.

    Args:
        value: dicts with keys of text or whole numbers, lists, tuples, None, numbers, texts, bytes,
            tensors and NumPy arrays of numbers.
        name: what it is called in an error.

    Raises:
        UsageError: it holds something else.
    """
    body = bytearray()
    text = json.dumps(_plain(value, name, body, 0), separators=(",", ":")).encode()
    return _SIZES.pack(len(text), len(body), zlib.crc32(body, zlib.crc32(text))) + text + body


def unpack(data: bytes, name: str = "value") -> Any:
    """Inverse of `pack`; tensors come back on the CPU.

    Raises:
        StateError: the bytes are damaged.
    """
    try:
        text_bytes, body_bytes, crc = _SIZES.unpack_from(data)
        text = data[_SIZES.size : _SIZES.size + text_bytes]
        body = data[_SIZES.size + text_bytes :][:body_bytes]
        if len(body) != body_bytes or crc != zlib.crc32(body, zlib.crc32(text)):
            msg = f"{name} is torn: its checksum is another"
            raise StateError(msg)
        return _value(json.loads(text), memoryview(body))
    except (struct.error, ValueError, KeyError, TypeError, IndexError) as error:
        msg = f"{name} is damaged: {error}"
        raise StateError(msg) from error


def _plain(value: Any, name: str, buffers: bytearray, depth: int) -> Any:
    """The JSON of a value; its buffers are appended."""
    if depth > MAX_DEPTH:
        msg = f"{name} is nested deeper than {MAX_DEPTH}, which cannot be kept"
        raise UsageError(msg)
    if type(value) in _PLAIN:
        return value
    if isinstance(value, dict):
        pairs = [[_key(k, name), _plain(v, f"{name}[{k!r}]", buffers, depth + 1)]
                 for k, v in value.items()]  # fmt: skip
        return {"d": pairs}
    if isinstance(value, list | tuple):
        items = [_plain(each, f"{name}[{i}]", buffers, depth + 1) for i, each in enumerate(value)]
        return items if isinstance(value, list) else {"t": items}
    kind, dtype, shape, raw = _raw(value, name)
    start = len(buffers)
    buffers += raw
    return {kind: [start, len(raw), dtype, shape]}


def _key(key: object, name: str) -> str | int:
    if type(key) is str or type(key) is int:
        return key
    msg = f"{name} has the key {key!r}: only texts and whole numbers can be kept"
    raise UsageError(msg)


def _raw(value: object, name: str) -> tuple[str, str, list[int], bytes]:
    if isinstance(value, bytes | bytearray):
        return "b", "", [], bytes(value)
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        return "T", str(value.dtype).removeprefix("torch."), list(value.shape), raw
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return "a", value.dtype.str, list(value.shape), value.tobytes()
    msg = (
        f"{name} is of type {type(value).__name__}, which cannot be kept: give dicts, lists, "
        "numbers, texts, bytes, tensors and arrays"
    )
    raise UsageError(msg)


def _value(plain: Any, body: memoryview) -> Any:
    if isinstance(plain, list):
        return [_value(each, body) for each in plain]
    if not isinstance(plain, dict):
        return plain
    [(kind, said)] = plain.items()
    if kind == "d":
        return {key: _value(each, body) for key, each in said}
    if kind == "t":
        return tuple(_value(each, body) for each in said)
    start, length, dtype, shape = said
    return _MAKERS[kind](bytearray(body[start : start + length]), dtype, shape)


def _tensor(raw: bytearray, dtype: str, shape: list[int]) -> Tensor:
    kind = getattr(torch, dtype)
    if not raw:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(raw, dtype=kind).reshape(shape)


def _array(raw: bytearray, dtype: str, shape: list[int]) -> Any:
    return np.frombuffer(raw, np.dtype(dtype)).reshape(shape)


_MAKERS: Final[dict[str, Callable[[bytearray, str, list[int]], Any]]] = {
    "b": lambda raw, _dtype, _shape: bytes(raw),
    "T": _tensor,
    "a": _array,
}

"""Image sets in the idx format of MNIST and Fashion-MNIST: where they lie, and how they are read.

The files are gzip over a plain header and plain bytes: nothing in them can run. Everything read is
checked against the header before it is used, and a file larger than `MAX_IDX_BYTES` is refused
before it is unpacked further.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from psq.errors import ConfigError

__all__ = [
    "DEBIAN_DIR",
    "FASHION_FILES",
    "SHIPPED_DIR",
    "IdxFiles",
    "IdxSet",
    "ImageSet",
    "find_folder",
    "load",
    "read_idx",
]

DEBIAN_DIR: Final = Path("/usr/share/datasets/fashion-mnist")
SHIPPED_DIR: Final = Path(__file__).parent / "data" / "fashion-mnist"
MAX_DIMENSIONS: Final = 3  # images are count x rows x columns, labels a count
MAX_IDX_BYTES: Final = 256 * 1024 * 1024
_MAGIC: Final = bytes((0, 0, 8))  # 8: the values are unsigned bytes
_IMAGE_DIMENSIONS: Final = 3
_REMEDY: Final = (
    "reinstall the package that brought it, or name another folder with the four original files"
)


@dataclass(frozen=True, slots=True)
class IdxFiles:
    """The file names of images and labels of one part of a set."""

    images: str
    labels: str


@dataclass(frozen=True, slots=True)
class IdxSet:
    """The file names of a whole set."""

    train: IdxFiles
    test: IdxFiles

    @property
    def names(self) -> tuple[str, ...]:
        """All four names."""
        return (self.train.images, self.train.labels, self.test.images, self.test.labels)


FASHION_FILES: Final = IdxSet(
    train=IdxFiles("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    test=IdxFiles("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
)


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images u8[n, rows, columns] with labels u8[n], and the folder they came from."""

    folder: Path
    train_images: npt.NDArray[np.uint8]
    train_labels: npt.NDArray[np.uint8]
    test_images: npt.NDArray[np.uint8]
    test_labels: npt.NDArray[np.uint8]


def find_folder(data_dir: Path | None, *, subset: bool) -> Path:
    """Chooses the folder: the one asked for, else Debian's full set, else the shipped subset.

    Args:
        data_dir: a folder with the four idx files, or with a `fashion-mnist` folder that has them;
            None looks for Debian's.
        subset: read the shipped subset whatever else is there, so that every machine trains on the
            same images.

    Raises:
        ConfigError: `data_dir` has not all four files, or was given together with `subset`.
    """
    if subset:
        if data_dir is not None:
            msg = (
                f"both the shipped subset and the data folder {data_dir} were asked for: leave one"
            )
            raise ConfigError(msg)
        return SHIPPED_DIR
    if data_dir is None:
        return DEBIAN_DIR if not _missing(DEBIAN_DIR) else SHIPPED_DIR
    tried = (data_dir, data_dir / "fashion-mnist")
    for folder in tried:
        if not _missing(folder):
            return folder
    lacks = "; ".join(f"{folder} lacks {', '.join(_missing(folder))}" for folder in tried)
    msg = (
        f"no Fashion-MNIST in the data folder: {lacks}. Put the four original files there, install "
        "Debian's dataset-fashion-mnist, or leave the folder out to train on psq's own subset"
    )
    raise ConfigError(msg)


def load(folder: Path) -> ImageSet:
    """Reads and checks the four files of `folder`.

    Raises:
        ConfigError: a file is missing, damaged, or does not fit the others.
    """
    parts = []
    for files in (FASHION_FILES.train, FASHION_FILES.test):
        images, labels = read_idx(folder / files.images), read_idx(folder / files.labels)
        if images.ndim != _IMAGE_DIMENSIONS or labels.shape != images.shape[:1]:
            msg = (
                f"in {folder}, {files.images} has shape {images.shape}, {files.labels} "
                f"{labels.shape}: expected images [n, rows, columns], labels [n]; {_REMEDY}"
            )
            raise ConfigError(msg)
        parts += [images, labels]
    return ImageSet(folder, *parts)


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Reads one gzip-compressed idx file of unsigned bytes.

    Args:
        path: the file.

    Returns:
        u8 array of the shape in the header; read-only.

    Raises:
        ConfigError: the file is missing, is not gzip, is cut short, or is not an idx file of
            unsigned bytes.
    """
    try:
        with gzip.open(path, "rb") as stream:
            raw = stream.read(MAX_IDX_BYTES + 1)
    except FileNotFoundError:
        msg = f"data file {path} is missing: {_REMEDY}"
        raise ConfigError(msg) from None
    except (OSError, EOFError, zlib.error) as error:
        msg = f"data file {path} cannot be read ({error}): {_REMEDY}"
        raise ConfigError(msg) from error
    if len(raw) > MAX_IDX_BYTES:
        msg = (
            f"data file {path} unpacks to more than {MAX_IDX_BYTES} bytes: it is not Fashion-MNIST"
        )
        raise ConfigError(msg)
    return _parse(path, raw)


def _parse(path: Path, raw: bytes) -> npt.NDArray[np.uint8]:
    if len(raw) <= len(_MAGIC) or not raw.startswith(_MAGIC):
        msg = f"data file {path} is no idx file of bytes, it starts with {raw[:4].hex()}: {_REMEDY}"
        raise ConfigError(msg)
    offset = 4 + 4 * raw[3]
    shape = tuple(
        int.from_bytes(raw[at : at + 4], "big") for at in range(4, min(offset, len(raw)), 4)
    )
    numel = math.prod(shape)
    if len(raw) != offset + numel:
        msg = (
            f"data file {path} has {len(raw)} bytes, its header of shape {shape} wants "
            f"{offset + numel}: {_REMEDY}"
        )
        raise ConfigError(msg)
    if not 1 <= raw[3] <= MAX_DIMENSIONS or numel == 0:
        msg = (
            f"data file {path} has a header of {raw[3]} dimensions and shape {shape}, expected 1 "
            f"to {MAX_DIMENSIONS} and none of size 0: {_REMEDY}"
        )
        raise ConfigError(msg)
    return np.frombuffer(raw, np.uint8, offset=offset).reshape(shape)


def _missing(folder: Path) -> list[str]:
    return [name for name in FASHION_FILES.names if not (folder / name).is_file()]

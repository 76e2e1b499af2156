"""Parameter shapes of the models that steps are timed on, written by rule: no model code needed.

"gradients given": what is in the tensors does not matter to a step's time, their shapes do. Runs on
every Python a peer needs (3.8 and later) and imports nothing.
"""

from __future__ import annotations

from typing import Tuple  # noqa: UP035 - Python 3.8 evaluates the alias below

Shape = Tuple[int, ...]  # noqa: UP006

MLP_WIDTHS = (784, 820, 420, 10)
STAGE_WIDTHS = (64, 128, 256, 512)


def mlp() -> list[Shape]:
    """Three layers on 28 x 28 pixels: 992,730 values."""
    shapes: list[Shape] = []
    for inputs, outputs in zip(MLP_WIDTHS, MLP_WIDTHS[1:]):  # noqa: B905, RUF007 - Python 3.8
        shapes += [(outputs, inputs), (outputs,)]
    return shapes


def resnet18() -> list[Shape]:
    """ResNet-18 of 1,000 classes: 11,689,512 values in 62 tensors."""
    shapes, width = _stem(), STAGE_WIDTHS[0]
    for stage, planes in enumerate(STAGE_WIDTHS):
        for block in range(2):
            shapes += _conv(planes, width, 3) + _conv(planes, planes, 3)
            if stage and not block:
                shapes += _conv(planes, width, 1)
            width = planes
    return [*shapes, (1000, width), (1000,)]


def resnet50() -> list[Shape]:
    """ResNet-50 of 1,000 classes: 25,557,032 values in 161 tensors."""
    shapes, width = _stem(), STAGE_WIDTHS[0]
    for planes, blocks in zip(STAGE_WIDTHS, (3, 4, 6, 3)):  # noqa: B905 - Python 3.8
        for block in range(blocks):
            shapes += _conv(planes, width, 1) + _conv(planes, planes, 3)
            shapes += _conv(4 * planes, planes, 1)
            if not block:
                shapes += _conv(4 * planes, width, 1)
            width = 4 * planes
    return [*shapes, (1000, width), (1000,)]


def flat25() -> list[Shape]:
    """25 square layers of 1,000 x 1,000: no tensor is small."""
    return [(1000, 1000)] * 25


SIZES = {"1M": mlp, "11.7M": resnet18, "25M": resnet50, "flat25": flat25}


def shapes_of(size: str) -> list[Shape]:
    """The shapes of a size by its name."""
    if size not in SIZES:
        msg = "the size {!r} is none of {}".format(size, ", ".join(SIZES))
        raise ValueError(msg)
    return SIZES[size]()


def numel(shape: Shape) -> int:
    """Values in a tensor of this shape."""
    product = 1
    for length in shape:
        product *= length
    return product


def totals() -> dict[str, int]:
    """Values of each size."""
    return {size: sum(map(numel, make())) for size, make in SIZES.items()}


def _conv(outputs: int, inputs: int, side: int) -> list[Shape]:
    """A convolution without bias, and the batch norm behind it."""
    return [(outputs, inputs, side, side), (outputs,), (outputs,)]


def _stem() -> list[Shape]:
    return _conv(STAGE_WIDTHS[0], 3, 7)

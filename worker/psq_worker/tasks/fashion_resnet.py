"""Task `fashion-resnet`: a residual network of 0.7 million parameters on pictures of clothing.

The usual shape: a convolution and a pooling, then three stages of two blocks, each block two 3 x 3
convolutions around a shortcut; from stage to stage images halve and channels double. Group norm
instead of batch norm: a step depends on its samples alone, so W workers make the same step as one
with a W-fold batch, and there are no buffers to keep equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from torch import nn
from torch.nn import functional

from psq_worker.tasks.base import JobDefaults, seeded
from psq_worker.tasks.fashion_mnist import FashionMnist, ImageBatch

__all__ = ["FashionResNet", "ResNet"]

CLASSES: Final = 10
STAGES: Final = (32, 64, 128)
BLOCKS: Final = 2
GROUPS: Final = 8


class FashionResNet:
    """The images of `fashion-mnist`, another network.

    Args:
        data_dir: as for `FashionMnist`.
        subset: likewise.

    Raises:
        ConfigError: no usable data where they were asked for; the text names the paths tried.
    """

    name: Final = "fashion-resnet"
    metric: Final = FashionMnist.metric
    defaults: Final = JobDefaults(
        steps=600, batch_size=32, lr=1e-3, schedule="linear", eval_every=100
    )

    def __init__(self, data_dir: Path | None = None, *, subset: bool = False) -> None:
        self._images: Final = FashionMnist(data_dir, subset=subset)

    @property
    def description(self) -> str:
        """Which images these are, and where they came from."""
        return self._images.description

    def model(self, seed: int) -> nn.Module:
        """A new network, 695,658 parameters."""
        with seeded(seed):
            return ResNet()

    def loss(self, model: nn.Module, batch: ImageBatch) -> torch.Tensor:
        """Mean cross-entropy of a batch."""
        return self._images.loss(model, batch)

    def batches(
        self, *, rank: int, world_size: int, batch_size: int, seed: int, start_step: int = 0
    ) -> Iterator[ImageBatch]:
        """This rank's slices of the global batches from `start_step` on, as `fashion-mnist`'s."""
        return self._images.batches(
            rank=rank,
            world_size=world_size,
            batch_size=batch_size,
            seed=seed,
            start_step=start_step,
        )

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy in [0, 1] and mean loss over all test images."""
        return self._images.evaluate(model)


class ResNet(nn.Module):
    """Images f32[n, 1, 28, 28] to scores f32[n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, STAGES[0], 3, stride=2, padding=1, bias=False)
        self.norm = nn.GroupNorm(GROUPS, STAGES[0])
        blocks, before = [], STAGES[0]
        for channels in STAGES:
            for _ in range(BLOCKS):
                blocks.append(_Block(before, channels))
                before = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores of the classes."""
        hidden = functional.relu(self.norm(self.stem(images)))
        hidden = self.blocks(functional.max_pool2d(hidden, 3, stride=2, padding=1))
        scores: torch.Tensor = self.head(hidden.mean(dim=(2, 3)))
        return scores


class _Block(nn.Module):
    """Two convolutions added to their input; where channels change, to a projection of it."""

    def __init__(self, before: int, channels: int) -> None:
        super().__init__()
        stride = 1 if before == channels else 2
        self.conv_first = nn.Conv2d(before, channels, 3, stride=stride, padding=1, bias=False)
        self.norm_first = nn.GroupNorm(GROUPS, channels)
        self.conv_second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_second = nn.GroupNorm(GROUPS, channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Conv2d(before, channels, 1, stride=stride, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = functional.relu(self.norm_first(self.conv_first(hidden)))
        inner = self.norm_second(self.conv_second(inner))
        return functional.relu(inner + self.shortcut(hidden))

"""Task `fashion-mnist`: a convolutional network of 1.2 million parameters on pictures of clothing.

Two convolutions and two dense layers; no dropout and no batch statistics, so a step depends on its
samples alone and W workers make the same step as one worker with a W-fold batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from psq_worker.tasks.base import EpochOrder, JobDefaults, seeded, slice_of
from psq_worker.tasks.idx import SHIPPED_DIR, ImageSet, find_folder, load

__all__ = ["FashionMnist", "ImageBatch"]

ImageBatch = tuple[torch.Tensor, torch.Tensor]
"""Images f32[n, 1, 28, 28], standardized, and labels i64[n]."""

EVALUATION_BATCH: Final = 500
# Mean and deviation of the full training set's grey values in [0, 1]: the same for the subset.
MEAN: Final = 0.2860
DEVIATION: Final = 0.3530


class FashionMnist:
    """Ten classes of clothing, 28 x 28 grey values.

    Args:
        data_dir: folder with the four original files; None takes Debian's full set if it is
            installed, else the subset that psq ships.
        subset: take the shipped subset even if the full set is there.

    Raises:
        ConfigError: no usable data where they were asked for; the text names the paths tried.
    """

    name: Final = "fashion-mnist"
    metric: Final = "accuracy"
    defaults: Final = JobDefaults(
        steps=800, batch_size=32, lr=1e-3, schedule="linear", eval_every=100
    )

    def __init__(self, data_dir: Path | None = None, *, subset: bool = False) -> None:
        self._data: Final[ImageSet] = load(find_folder(data_dir, subset=subset))
        self._test: Final = _batch(self._data.test_images, self._data.test_labels)

    @property
    def description(self) -> str:
        """Which images these are, and where they came from."""
        data = self._data
        origin = "the subset shipped with psq" if data.folder == SHIPPED_DIR else str(data.folder)
        counts = f"{len(data.train_images):,} + {len(data.test_images):,}"
        return f"Fashion-MNIST, {counts} images from {origin}"

    def model(self, seed: int) -> nn.Module:
        """A new network, 1,227,274 parameters."""
        with seeded(seed):
            return nn.Sequential(
                nn.Conv2d(1, 32, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(32, 64, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(64 * 7 * 7, 384),
                nn.ReLU(),
                nn.Linear(384, 10),
            )

    def loss(self, model: nn.Module, batch: ImageBatch) -> torch.Tensor:
        """Mean cross-entropy of a batch."""
        images, labels = batch
        return functional.cross_entropy(model(images), labels)

    def batches(
        self, *, rank: int, world_size: int, batch_size: int, seed: int, start_step: int = 0
    ) -> Iterator[ImageBatch]:
        """This rank's slices of the global batches from `start_step` on, without end."""
        part = slice_of(rank=rank, world_size=world_size, batch_size=batch_size)
        order = EpochOrder(len(self._data.train_labels), seed)
        size = world_size * batch_size
        step = start_step
        while True:
            chosen = order.take(step * size + part.start, batch_size)
            yield _batch(self._data.train_images[chosen], self._data.train_labels[chosen])
            step += 1

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy in [0, 1] and mean loss over all test images."""
        images, labels = self._test
        model.eval()
        with torch.no_grad():
            scores = torch.cat([model(part) for part in torch.split(images, EVALUATION_BATCH)])
        model.train()
        correct = (scores.argmax(dim=1) == labels).float().mean()
        return {
            "accuracy": float(correct),
            "val_loss": float(functional.cross_entropy(scores, labels)),
        }


def _batch(
    images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
    labels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
) -> ImageBatch:
    grey = (images.astype(np.float32) / np.float32(255) - np.float32(MEAN)) / np.float32(DEVIATION)
    return torch.from_numpy(grey[:, None]), torch.from_numpy(labels.astype(np.int64))

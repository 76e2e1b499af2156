"""Clothes in the hands of few: each worker has other classes, half of the workers take part.

    pip install ./examples/fedgen
    psq launch -n 4 --recipe fedgen examples/fedgen/train.py

Each worker has a part of the images of its own, in which some classes are frequent and others lack.
In each round a coin that all share lets half of them sit out; the others count by their samples.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import psq.torch
from psq.torch import Group
from psq_worker.tasks.idx import find_folder, load

CLASSES: Final = 10
FEATURES: Final = 64
NOISE: Final = 0.5  # as the recipe's apply.noise

Data = tuple[Tensor, Tensor]
Labels = NDArray[np.integer[Any]]


class Classifier(nn.Module):
    """A network, and the features that the server moves: received, never pushed, no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, FEATURES), nn.ReLU()
        )
        self.head = nn.Linear(FEATURES, CLASSES)
        self.means = nn.Parameter(0.1 * torch.rand(CLASSES, FEATURES), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        """A score for each class: f32[n, CLASSES]."""
        scores: Tensor = self.head(self.body(images))
        return scores

    def imagine(self, labels: Tensor, draws: torch.Generator) -> Tensor:
        """Features of these classes, as the server thinks they are."""
        noise = torch.randn(len(labels), FEATURES, generator=draws)
        return torch.relu(self.means[labels] + NOISE * noise)


def share_out(labels: Labels, workers: int, skew: float, seed: int) -> list[Labels]:
    """Which samples are whose: of each class a Dirichlet draw; skew small: few classes each."""
    rng = np.random.default_rng(seed)
    owned: list[list[Labels]] = [[] for _ in range(workers)]
    for label in range(CLASSES):
        places = rng.permutation(np.flatnonzero(labels == label))
        ends = np.cumsum(rng.dirichlet(np.full(workers, skew)))[:-1] * len(places)
        for part, its in zip(np.split(places, ends.astype(int)), owned, strict=True):
            its.append(part)
    return [np.concatenate(parts) for parts in owned]


def takes_part(rank: int, round_number: int, workers: int, seed: int) -> bool:
    """Half of the workers, by a coin that all of them toss alike."""
    order = np.random.default_rng((seed, round_number)).permutation(workers)
    return rank in order[: (workers + 1) // 2]


def loss_of(
    model: Classifier, images: Tensor, labels: Tensor, imagined: float, draws: torch.Generator
) -> Tensor:
    """Cross-entropy of a worker's own images, and of features of all classes."""
    loss = functional.cross_entropy(model(images), labels)
    wanted = torch.randint(CLASSES, (len(labels),), generator=draws)
    features = model.imagine(wanted, draws)
    return loss + imagined * functional.cross_entropy(model.head(features), wanted)


def train_round(
    ps: psq.torch.Worker, model: Classifier, data: Data, given: argparse.Namespace
) -> None:
    """All local steps of a round, on batches of this worker's own."""
    images, labels = data
    draws = torch.Generator().manual_seed((given.seed * 10_007 + ps.version) * 1_009 + ps.rank)
    before = ps.version
    while ps.version == before:
        chosen = torch.randint(len(labels), (given.batch,), generator=draws)
        loss = loss_of(model, images[chosen], labels[chosen], given.imagined, draws)
        loss.backward()
        ps.step(loss=loss, samples=given.batch)


def accuracy_of(model: Classifier, data: Data) -> float:
    """The share of images that the job's model names rightly."""
    images, labels = data
    with torch.no_grad():
        return float((model(images).argmax(dim=1) == labels).float().mean())


def tensors_of(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Data:
    """Images f32[n, 28, 28] in [-1, 1], and labels."""
    return (
        torch.from_numpy(images.astype(np.float32) / np.float32(127.5) - np.float32(1.0)),
        torch.from_numpy(labels.astype(np.int64)),
    )


def command_line() -> argparse.Namespace:
    """What may be asked for; recipe and learning rate are psq's own options."""
    parser = argparse.ArgumentParser(description="clothes in the hands of few")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--skew", type=float, default=0.1, help="of the shares; small: few classes")
    parser.add_argument("--imagined", type=float, default=1.0, help="weight of imagined features")
    parser.add_argument("--evaluate-every", type=int, default=10, help="rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="rank 0 writes what it measured here, as JSON")
    return parser.parse_args()


def main() -> None:
    """One worker of the job."""
    given = command_line()
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    model, images = Classifier(), load(find_folder(None, subset=True))
    test = tensors_of(images.test_images, images.test_labels)
    groups = [Group("means", name="teacher", pushed=False, downlink="bf16")]
    measured = []
    with psq.torch.Worker(model, groups=groups) as ps:
        workers = ps.world_size
        mine = share_out(images.train_labels, workers, given.skew, given.seed)[ps.rank]
        data = tensors_of(images.train_images[mine], images.train_labels[mine])
        ps.weight = max(1, len(mine))
        while ps.version < given.rounds:
            if len(mine) and takes_part(ps.rank, ps.version, workers, given.seed):
                train_round(ps, model, data, given)
            else:
                ps.sit_out()
            if ps.rank == 0 and ps.version % given.evaluate_every == 0:
                measured.append({"round": ps.version, "accuracy": accuracy_of(model, test)})
                print(f"round {ps.version}  accuracy {measured[-1]['accuracy']:.4f}", flush=True)
        if ps.rank == 0 and given.out is not None:
            given.out.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()

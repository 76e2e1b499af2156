"""A generative adversarial network on pictures of clothing (Fashion-MNIST), through psq.

    psq launch -n 2 --recipe dqgan --lr 0.02 examples/gan/images.py

The score needs no download. A classifier is trained on the real pictures first (rank 0, some
seconds; the same seed for every run), and looks at what the generator makes:

    distance   Frechet distance of its 384 features, made pictures against real ones
    classes    classes that have at least 1 % of the made pictures
    spread     entropy of these shares, in nats; ln 10 = 2.30 is the most
    doubt      mean entropy of its answer to a picture, in nats; that of real ones is small
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import torch
from game import Players, arguments, play
from numpy.typing import NDArray
from torch import Tensor, nn

from psq_worker.tasks.fashion_mnist import DEVIATION, MEAN, FashionMnist
from psq_worker.tasks.idx import find_folder, load

NOISE: Final = 64
SIDE: Final = 28
CLASSES: Final = 10
SCORED: Final = 2_000
SHOWN: Final = 64
COVERED: Final = 0.01
CLASSIFIER_STEPS: Final = 300
FEATURE_LAYERS: Final = 9
SEED: Final = 2_147_483_647  # of what is scored: no worker's


def generator() -> nn.Module:
    """From noise f32[n, NOISE] to pictures f32[n, 1, SIDE, SIDE] in [-1, 1]."""
    return nn.Sequential(
        nn.Linear(NOISE, 256), nn.LayerNorm(256), nn.ReLU(),
        nn.Linear(256, 512), nn.LayerNorm(512), nn.ReLU(),
        nn.Linear(512, SIDE * SIDE), nn.Tanh(), nn.Unflatten(1, (1, SIDE, SIDE)),
    )  # fmt: skip


def critic() -> nn.Module:
    """From pictures to how real they look, f32[n, 1]."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(SIDE * SIDE, 256), nn.LeakyReLU(0.2),
        nn.Linear(256, 256), nn.LeakyReLU(0.2), nn.Linear(256, 1),
    )  # fmt: skip


def pictures_of(images: NDArray[np.uint8]) -> Tensor:
    """Grey values as f32[n, 1, SIDE, SIDE] in [-1, 1]."""
    return torch.from_numpy(images.astype(np.float32) / np.float32(127.5) - np.float32(1.0))[
        :, None
    ]


class Judge:
    """A classifier of the real pictures, and what it thinks of others."""

    def __init__(self) -> None:
        task = FashionMnist(subset=True)
        self._model = task.model(seed=0)
        adam = torch.optim.Adam(self._model.parameters(), lr=1e-3)
        batches = task.batches(rank=0, world_size=1, batch_size=64, seed=0)
        for _, batch in zip(range(CLASSIFIER_STEPS), batches, strict=False):
            adam.zero_grad()
            task.loss(self._model, batch).backward()
            adam.step()
        self.accuracy = task.evaluate(self._model)["accuracy"]

    def look(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Features f64[n, 384] and answers f32[n, CLASSES] for pictures in [-1, 1]."""
        seen = ((pictures + 1.0) / 2.0 - MEAN) / DEVIATION
        with torch.no_grad():
            features = torch.cat([self._model[:FEATURE_LAYERS](part) for part in seen.split(250)])
            return features.double(), self._model[FEATURE_LAYERS](features).softmax(dim=1)


def frechet(ours: Tensor, theirs: Tensor) -> float:
    """Frechet distance of two sets of features as if they were normal: f64[n, d] each.

    With covariances A'A and B'B the trace of the root of their product is the sum of the singular
    values of A B'; A and B are what QR leaves of the centred features.
    """
    apart = (ours.mean(dim=0) - theirs.mean(dim=0)).square().sum()
    a, b = (
        torch.linalg.qr((x - x.mean(dim=0)) / math.sqrt(len(x) - 1), mode="r").R
        for x in (ours, theirs)
    )
    common = torch.linalg.svdvals(a @ b.T).sum()
    return float(apart + a.square().sum() + b.square().sum() - 2.0 * common)


def score(judge: Judge, real: Tensor, made: Tensor) -> dict[str, Any]:
    """What the module's docstring says, of features of real pictures and made pictures."""
    features, answers = judge.look(made)
    shares = torch.bincount(answers.argmax(dim=1), minlength=CLASSES) / len(made)
    return {
        "distance": frechet(features, real),
        "classes": int((shares >= COVERED).sum()),
        "spread": float(torch.special.entr(shares).sum()),
        "doubt": float(torch.special.entr(answers).sum(dim=1).mean()),
    }


def main() -> None:
    """One worker of the job."""
    parser = arguments("pictures of clothing", steps=2_000, batch=32, penalty=10.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    images = load(find_folder(None, subset=True))
    train, test = pictures_of(images.train_images), pictures_of(images.test_images)
    torch.manual_seed(given.seed)
    players = Players(generator(), critic())
    judges: list[tuple[Judge, Tensor]] = []

    def draw(draws: torch.Generator) -> tuple[Tensor, Tensor]:
        which = torch.randint(len(train), (given.batch,), generator=draws)
        return train[which], torch.randn(given.batch, NOISE, generator=draws)

    def evaluate() -> dict[str, Any]:
        if not judges:
            judge = Judge()
            judges.append((judge, judge.look(test[:SCORED])[0]))
        draws = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            made = players.generator(torch.randn(SCORED, NOISE, generator=draws))
        grey = ((made[:SHOWN, 0] + 1.0) * 127.5).round().to(torch.uint8)
        return {**score(*judges[0], made), "pictures": grey.flatten(1).tolist()}

    play(players, draw, evaluate, given)


if __name__ == "__main__":
    main()

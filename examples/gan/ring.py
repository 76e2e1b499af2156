"""A generative adversarial network on eight Gaussians on a ring, through psq.

    psq launch -n 2 --recipe dqgan --lr 0.03 examples/gan/ring.py
    psq launch -n 2 --recipe ef-sgd --uplink log:k=2 --downlink delta:log:k=2 --lr 0.03 \
        examples/gan/ring.py

The second is simultaneous gradient descent-ascent with the same codecs. A mode counts as covered
if at least 1 % of the samples lie within three deviations of its centre.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from game import Players, arguments, play
from torch import Tensor, nn

MODES: Final = 8
RADIUS: Final = 2.0
DEVIATION: Final = 0.1
NOISE: Final = 2
WIDTH: Final = 64
SAMPLES: Final = 4_000
KEPT: Final = 500
COVERED: Final = 0.01
SEED: Final = 2_147_483_647  # of the samples that are scored: no worker's


def centres() -> Tensor:
    """f32[MODES, 2]."""
    angles = torch.arange(MODES) * (2.0 * math.pi / MODES)
    return RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)


def network(inputs: int, outputs: int) -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(),
        nn.Linear(WIDTH, outputs),
    )  # fmt: skip


def score(points: Tensor) -> dict[str, Any]:
    """Modes covered, and the share of points that are close to one: points f32[n, 2]."""
    distance, nearest = torch.cdist(points, centres()).min(dim=1)
    is_close = distance < 3.0 * DEVIATION
    counts = torch.bincount(nearest[is_close], minlength=MODES)
    return {
        "modes": int((counts >= COVERED * len(points)).sum()),
        "close": float(is_close.float().mean()),
    }


def main() -> None:
    """One worker of the job."""
    parser = arguments("eight Gaussians on a ring", steps=3_000, batch=128, penalty=1.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    players = Players(network(NOISE, 2), network(2, 1))
    places = centres()

    def draw(draws: torch.Generator) -> tuple[Tensor, Tensor]:
        which = torch.randint(MODES, (given.batch,), generator=draws)
        real = places[which] + DEVIATION * torch.randn(given.batch, 2, generator=draws)
        return real, torch.randn(given.batch, NOISE, generator=draws)

    def evaluate() -> dict[str, Any]:
        draws = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            points = players.generator(torch.randn(SAMPLES, NOISE, generator=draws))
        shown = [[round(value, 3) for value in point] for point in points[:KEPT].tolist()]
        return {**score(points), "points": shown}

    play(players, draw, evaluate, given)


if __name__ == "__main__":
    main()

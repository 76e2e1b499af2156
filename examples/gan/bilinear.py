"""The smallest game: x wants x'Ay small, y wants it large; only x = y = 0 suits both.

    psq launch -n 2 --recipe dqgan --lr 0.1 examples/gan/bilinear.py
    psq launch -n 2 --recipe ef-sgd --uplink log:k=2 --downlink delta:log:k=2 --lr 0.1 \
        examples/gan/bilinear.py

Descent of one and ascent of the other turn around that point and away from it; looking ahead turns
them inwards. Each worker has a game of its own, and the job plays their mean.
"""

from __future__ import annotations

import argparse
import json
from typing import Final

import torch
from torch import Tensor, nn

import psq.torch

SIZE: Final = 64


class Game(nn.Module):
    """Both players, and what a worker thinks that they play for."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(SIZE))
        self.y = nn.Parameter(torch.ones(SIZE))
        own = torch.Generator().manual_seed(rank)
        self.register_buffer("payoff", torch.ones(SIZE) + 0.2 * torch.randn(SIZE, generator=own))

    def backward(self) -> None:
        """Each player's gradient of its own loss, at the same weights."""
        gain = (self.x * self.payoff * self.y).sum()
        gain.backward(inputs=[self.x], retain_graph=True)
        (-gain).backward(inputs=[self.y])

    @property
    def distance(self) -> Tensor:
        """From the one point that suits both."""
        return torch.cat([self.x, self.y]).detach().norm()


def main() -> None:
    """One worker of the job."""
    parser = argparse.ArgumentParser(description="a bilinear game")
    parser.add_argument("--steps", type=int, default=500)
    given = parser.parse_args()
    game = Game(0)
    start = float(game.distance)
    with psq.torch.Worker(game) as ps:
        game.payoff.copy_(Game(ps.rank).payoff)
        while ps.steps < given.steps:
            game.backward()
            ps.step()
        with ps.replica():
            end = float(game.distance)
    print(json.dumps({"rank": ps.rank, "start": start, "end": end}), flush=True)


if __name__ == "__main__":
    main()

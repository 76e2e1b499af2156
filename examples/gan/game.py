"""Two players in one step: what the scripts of this folder share.

    critic      minimizes  E D(G(z)) - E D(x) + penalty E (|D'(between)| - 1)^2
    generator   minimizes  - E D(G(z))

`backward` leaves each player's gradient of its own loss, both at the same weights, in `.grad`; one
`step` of a `psq.torch.Worker` then moves both. What makes a game of it is the recipe: dqgan takes
these gradients at a point that it looks ahead to. The losses are those of WGAN-GP.

All that is drawn follows from (seed, rank, step): a run can be repeated, and continued.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import psq.torch

__all__ = ["Players", "arguments", "backward", "draws_of", "play"]

SNAPSHOTS: Final = 8
Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]


class Players(nn.Module):
    """A generator and its critic, as one model."""

    def __init__(self, generator: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.generator = generator
        self.critic = critic


def backward(players: Players, real: Tensor, noise: Tensor, share: Tensor, penalty: float) -> float:
    """Leave both players' gradients in `.grad`; returns how far the critic tells them apart.

    Args:
        players: at the weights that the gradients are to be taken at.
        real: samples of the data, [n, ...].
        noise: what the generator starts from, [n, ...].
        share: how far between a real and a made sample the critic's slope is looked at, [n].
        penalty: times the squared distance of that slope from 1.
    """
    critic, fake = players.critic, players.generator(noise)
    gap = critic(real).mean() - critic(fake.detach()).mean()
    between = torch.lerp(real, fake.detach(), share.reshape(-1, *[1] * (real.dim() - 1)))
    between.requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    excess = (slope.flatten(1).norm(dim=1) - 1.0).square().mean()
    (penalty * excess - gap).backward(inputs=list(critic.parameters()))
    (-critic(fake).mean()).backward(inputs=list(players.generator.parameters()))
    return float(gap.detach())


def draws_of(seed: int, rank: int, step: int) -> torch.Generator:
    """The random numbers of one worker's step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_009 + rank)


def arguments(words: str, *, steps: int, batch: int, penalty: float) -> argparse.ArgumentParser:
    """The command line that the scripts have in common; recipe and rate are psq's own."""
    parser = argparse.ArgumentParser(description=words)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch, help="samples per worker and step")
    parser.add_argument("--penalty", type=float, default=penalty, help="of the critic's slope")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate-every", type=int, default=0, help="0: eight times in the run")
    parser.add_argument("--out", type=Path, help="rank 0 writes what it measured here, as JSON")
    return parser


def play(
    players: Players, draw: Draw, evaluate: Callable[[], dict[str, Any]], given: argparse.Namespace
) -> Sequence[dict[str, Any]]:
    """Train, and evaluate on rank 0 from time to time, at the job's own weights.

    Args:
        players: rank 0's are those that everyone starts with.
        draw: (real, noise) of one worker's step.
        evaluate: scores; called with the job's weights in the model.
        given: the command line.

    Returns:
        What was measured, in order; empty on other ranks.
    """
    every = given.evaluate_every or max(1, given.steps // SNAPSHOTS)
    curve: list[dict[str, Any]] = []
    with psq.torch.Worker(players) as ps:
        numel = sum(parameter.numel() for parameter in players.parameters())
        sent = received = 0
        while ps.steps < given.steps:
            draws = draws_of(given.seed, ps.rank, ps.steps)
            real, noise = draw(draws)
            share = torch.rand(len(real), generator=draws)
            gap = backward(players, real, noise, share, given.penalty)
            report = ps.step(loss=gap, samples=len(real))
            sent, received = sent + report.sent_bytes, received + report.received_bytes
            if ps.rank == 0 and ps.steps % every == 0:
                with ps.replica():
                    curve.append({"step": ps.steps, "gap": gap, **evaluate()})
                show(curve[-1])
        bits = {"up": 8 * sent / numel / given.steps, "down": 8 * received / numel / given.steps}
        if ps.rank == 0 and given.out is not None:
            facts = {"recipe": ps.plan.recipe.to_plain(), "lr": ps.lr, "workers": ps.world_size}
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps({**facts, "bits": bits, "curve": curve}))
    return curve


def show(measured: dict[str, Any]) -> None:
    """One line of numbers."""
    numbers = (
        f"{name} {value:.4g}" for name, value in measured.items() if isinstance(value, int | float)
    )
    print("  ".join(numbers), flush=True)

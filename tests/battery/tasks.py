"""Two problems that recipes learn: rings of points in the plane for a small network, and a game.

Both have workers with different data: what is lost on the way then does not average out.
"""

from __future__ import annotations

import numpy as np

__all__ = ["Game", "Rings"]


class Rings:
    """Four classes: two rings, each cut in two halves. A network with 16 tanh units.

    Three of four points of a worker are of two of the classes.
    """

    specs = (
        ("hidden.weight", (2, 16)),
        ("hidden.bias", (16,)),
        ("out.weight", (16, 4)),
        ("out.bias", (4,)),
    )
    classes, batch = 4, 16

    def __init__(self):
        rng = np.random.default_rng(5)
        weights = [
            0.8 * rng.standard_normal(32),
            np.zeros(16),
            0.3 * rng.standard_normal(64),
            np.zeros(4),
        ]
        self.x = np.concatenate(weights).astype(np.float32)
        self.judged = self._points(np.random.default_rng(6), np.arange(400) % 4)

    def gradient(self, rank, step, x):
        """The gradient of a worker's batch: f32[116]."""
        rng = np.random.default_rng([rank, step])
        mine = (rank + rng.integers(0, 2, self.batch)) % 4
        labels = np.where(rng.random(self.batch) < 0.75, mine, rng.integers(0, 4, self.batch))
        points, wanted = self._points(rng, labels)
        hidden, chances = self._forward(x, points)
        out = (chances - wanted) / self.batch
        back = (out @ x[48:112].reshape(16, 4).T) * (1.0 - hidden**2)
        parts = [points.T @ back, back.sum(0), hidden.T @ out, out.sum(0)]
        return np.concatenate([part.ravel() for part in parts]).astype(np.float32)

    def loss(self, x):
        """Mean cross entropy of 400 points."""
        points, wanted = self.judged
        _, chances = self._forward(x, points)
        return float(-np.mean(np.log(np.sum(chances * wanted, axis=1) + 1e-12)))

    @staticmethod
    def _points(rng, labels):
        radius = np.where(labels < 2, 1.0, 2.0) + 0.15 * rng.standard_normal(labels.size)
        angle = np.pi * (labels % 2 + rng.random(labels.size))
        points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
        return points, np.eye(4)[labels]

    @staticmethod
    def _forward(x, points):
        x = x.astype(np.float64)
        hidden = np.tanh(points @ x[:32].reshape(2, 16) + x[32:48])
        scores = hidden @ x[48:112].reshape(16, 4) + x[112:]
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        return hidden, scores / scores.sum(axis=1, keepdims=True)


class Game:
    """min over u, max over w of u A w, each worker with an A of its own; the solution is 0."""

    specs = (("u", (12,)), ("w", (12,)))

    def __init__(self):
        rng = np.random.default_rng(7)
        self.mean = np.eye(12) + 0.1 * rng.standard_normal((12, 12))
        self.apart = 0.3 * rng.standard_normal((8, 12, 12))
        self.apart -= self.apart[:4].mean(axis=0)
        self.x = rng.standard_normal(24).astype(np.float32)

    def gradient(self, rank, step, x):
        """The field of both players: f32[24]."""
        del step
        matrix = self.mean + self.apart[rank]
        return np.concatenate([matrix @ x[12:], -(matrix.T @ x[:12])]).astype(np.float32)

    def loss(self, x):
        """How far from the solution, over how far at first."""
        return float(np.linalg.norm(x) / np.linalg.norm(self.x))

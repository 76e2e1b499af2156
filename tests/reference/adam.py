"""Adam: its step on a gradient, and with v corrected to that of W times the batch."""

from __future__ import annotations

import numpy as np

from reference.common import Vector

__all__ = ["Adam", "CorrectedAdam"]


class Adam:
    """What is to be subtracted from the weights, step by step."""

    def __init__(
        self, beta: float = 0.9, theta: float = 0.999, eps: float = 1e-8, *, amsgrad: bool = False
    ) -> None:
        self.beta, self.theta, self.eps, self.amsgrad = beta, theta, eps, amsgrad
        self.m = self.v = self.largest = np.float32(0.0)
        self.t = 0

    def step(self, g: Vector, lr: float) -> Vector:
        """u = lr mhat / (sqrt(vhat) + eps)."""
        self._learn(g)
        self.largest = np.maximum(self.largest, self.v)
        v = self.largest if self.amsgrad else self.v
        root = np.sqrt(v) / np.float32((1 - self.theta**self.t) ** 0.5) + self.eps
        return lr / (1 - self.beta**self.t) * self.m / root

    def _learn(self, g: Vector) -> None:
        self.t += 1
        self.m = self.m + (1 - self.beta) * (g - self.m)
        self.v = self.theta * self.v + (1 - self.theta) * g * g


class CorrectedAdam(Adam):
    """v is split into the squared mean gradient, mu2, and noise, of which W workers have 1/W.

    r is the variance of mhat for a gradient of variance 1, so that E[mhat^2] = mu2 + r noise.
    """

    start = 5

    def __init__(self, workers: int, beta: float = 0.9, theta: float = 0.999) -> None:
        super().__init__(beta, theta)
        self.workers = workers
        self.s = np.float32(0.0)

    def step(self, g: Vector, lr: float) -> Vector:
        """Adam's, with vhat / W + (1 - 1/W) mu2 in the place of vhat."""
        self._learn(g)
        beta, theta, t, share = self.beta, self.theta, self.t, 1 / self.workers
        mhat, vhat = self.m * (1 / (1 - beta**t)), self.v * (1 / (1 - theta**t))
        mu2 = vhat
        if t >= self.start:
            r = (1 - beta) ** 2 * (1 - beta ** (2 * t)) / ((1 - beta**2) * (1 - beta**t) ** 2)
            estimate = (mhat * mhat - r * vhat) * (1 / (1 - r))
            self.s = theta * self.s + (1 - theta) * estimate
            mu2 = np.clip(self.s * (1 / (1 - theta ** (t - self.start + 1))), 0.0, vhat)
        v = vhat * share + mu2 * (1 - share)
        return lr / (1 - beta**t) * self.m / (np.sqrt(v) + self.eps)

"""Generic Adam on a flat float32 vector: what an `AdamConfig` means, step by step.

    state   m, v (vmax for AMSGrad, s for the variance correction): one float32 each per value;
            and a step counter
    step    advance(lr), then write(...) over any cut of the vector; direction(...) does both.
            A kernel that has Adam inside it takes the step's numbers from `coefficients` and
            `correction` instead

The result is a direction u, the thing subtracted from the weights; nothing here touches the weights
themselves. The arithmetic is the kernel adam_update, defined in psq/kernels/reference_optim.py.

With torch's settings u equals what torch.optim.Adam, AdamW and amsgrad=True subtract, within the
bounds that tests/unit/test_optim.py states: torch rounds differently in two places (FMA, its square
root). The decoupled decay multiplies x by 1 - f32(1 - lr wd), the factor torch really applies.
Paper form (after 2004.14180, Generic Adam): bias_correction off, eps_placement "inside", schedules
for beta and theta.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, TypeVar

import numpy as np

from psq import kernels
from psq.errors import ConfigError, UsageError
from psq.kernels import AdamCoefficients, CorrectionCoefficients, Floats
from psq.layout import Layout
from psq.recipe import AdamConfig, schedule_value

__all__ = ["CORRECTION_START", "Adam", "per_shard", "state_names"]

# The variance correction's first step: before it m holds too few gradients to tell noise from mean.
CORRECTION_START: Final = 5

_Weights = TypeVar("_Weights")


def state_names(config: AdamConfig, workers: int = 1) -> tuple[str, ...]:
    """The state vectors these settings need, each f32 of the model's size."""
    extra = ("vmax",) if config.amsgrad else ("s",) if _corrects(config, workers) else ()
    return ("m", "v", *extra)


class Adam:
    """Adam's state for `numel` values, and its steps.

    Args:
        config: the settings.
        numel: how many values.
        workers: W of the variance correction: the batch is W times this worker's share. At 1 there
            is nothing to correct, and the state s does not exist.
        state: the vectors to work on, f32[numel] by name, taken as they are; made and initialised
            here when None.

    Raises:
        ConfigError: the variance correction cannot run with these settings.
    """

    def __init__(
        self,
        config: AdamConfig,
        numel: int,
        *,
        workers: int = 1,
        state: Mapping[str, Floats] | None = None,
    ) -> None:
        if config.variance_correction and schedule_value(config.beta, 1) == 0.0:
            msg = "variance_correction needs beta > 0: without momentum noise looks like gradient"
            raise ConfigError(msg)
        self.config = config
        self.numel = numel
        self.workers = workers
        if state is None:
            state = _fresh_state(config, numel, workers)
        self._state = {name: state[name] for name in state_names(config, workers)}
        self._rewind()

    @property
    def count(self) -> int:
        """Steps taken."""
        return self._count

    def state_arrays(self) -> dict[str, Floats]:
        """The state by name, not copied: with `count` it is all that a checkpoint needs."""
        return dict(self._state)

    def resume(self, count: int) -> None:
        """Take the step counter (and the products that follow from it) of a saved state."""
        self._rewind()
        for _ in range(count):
            self._tick()

    @property
    def coefficients(self) -> AdamCoefficients:
        """The numbers of the step that `advance` began."""
        return self._coefficients

    @property
    def correction(self) -> CorrectionCoefficients | None:
        """Those of its variance correction; None where there is none."""
        return self._correction if "s" in self._state else None

    def weights(self, x: _Weights | None) -> _Weights | None:
        """Return the weights where these settings need them, else None.

        Raises:
            UsageError: weight decay without x.
        """
        if self.config.weight_decay == 0.0:
            return None
        if x is None:
            msg = "weight decay needs the current weights: pass x"
            raise UsageError(msg)
        return x

    def advance(self, lr: float) -> None:
        """Begin the next step.

        Args:
            lr: its learning rate, >= 0.

        Raises:
            UsageError: lr is negative or not finite.
        """
        if not (math.isfinite(lr) and lr >= 0.0):
            msg = f"the learning rate must be a finite number >= 0, got {lr!r}"
            raise UsageError(msg)
        self._tick()
        self._coefficients = self._make_coefficients(lr)
        if "s" in self._state:
            self._correction = self._make_correction()

    def write(
        self,
        g: Floats,
        out: Floats,
        *,
        start: int = 0,
        x: Floats | None = None,
    ) -> None:
        """Write the direction of values [start, start + n) in the step that `advance` began.

        Each value is to be written exactly once in a step.

        Args:
            g: gradient, f32[n].
            out: u, f32[n], written; may be g.
            start: where these values lie in the state.
            x: their weights, f32[n]; needed for weight decay, else ignored.

        Raises:
            UsageError: weight decay without x.

        Cost: one pass; reads and writes m and v, reads g, writes out.
        """
        x = self.weights(x)
        stop = start + g.size
        m, v = self._state["m"][start:stop], self._state["v"][start:stop]
        if "s" in self._state:
            s = self._state["s"][start:stop]
            now = (self._coefficients, self._correction)
            kernels.active().adam_update_corrected(g, m, v, s, out, *now, x=x)
            return
        vmax = self._state["vmax"][start:stop] if "vmax" in self._state else None
        kernels.active().adam_update(g, m, v, out, self._coefficients, vmax=vmax, x=x)

    def direction(
        self,
        g: Floats,
        lr: float,
        out: Floats,
        x: Floats | None = None,
    ) -> None:
        """One whole step: `advance`, then `write` over all values."""
        self.advance(lr)
        self.write(g, out, x=x)

    def _rewind(self) -> None:
        self._count = 0
        self._beta_product = 1.0
        self._theta_product = 1.0
        self._s_product = 1.0
        self._beta = self._theta = 0.0

    def _tick(self) -> None:
        self._count += 1
        self._beta = schedule_value(self.config.beta, self._count)
        self._theta = schedule_value(self.config.theta, self._count)
        self._beta_product *= self._beta
        self._theta_product *= self._theta
        if self._count >= CORRECTION_START:
            self._s_product *= self._theta

    def resume_as(self, other: Adam) -> None:
        """Take the step counter of another of the same settings. Cost: none, unlike `resume`."""
        self._count, self._s_product = other._count, other._s_product
        self._beta, self._beta_product = other._beta, other._beta_product
        self._theta, self._theta_product = other._theta, other._theta_product

    def _make_coefficients(self, lr: float) -> AdamCoefficients:
        config = self.config
        corrected = config.bias_correction
        m_rest = 1.0 - self._beta_product if corrected else 1.0
        v_rest = 1.0 - self._theta_product if corrected else 1.0
        inside = config.eps if config.eps_placement == "inside" else 0.0
        if "s" not in self._state:
            inside *= v_rest  # sqrt(v / v_rest + eps) is sqrt(v + eps v_rest) / sqrt(v_rest)
        weight = np.float32(1.0 - self._beta)
        decay = lr * config.weight_decay
        return AdamCoefficients(
            m_weight=float(weight if weight < 0.5 else weight - np.float32(1.0)),  # noqa: PLR2004 - torch's switch
            theta=_f32(self._theta),
            theta_rest=_f32(1.0 - self._theta),
            step_size=_f32(lr / m_rest),
            root=_f32(math.sqrt(v_rest)),
            eps_inside=_f32(inside),
            eps_outside=_f32(config.eps if config.eps_placement == "outside" else 0.0),
            l2=0.0 if config.decoupled else _f32(config.weight_decay),
            decay=float(np.float32(1.0) - np.float32(1.0 - decay)) if config.decoupled else 0.0,
        )

    def _make_correction(self) -> CorrectionCoefficients:
        beta, product = self._beta, self._beta_product
        ratio = (1 - beta) ** 2 * (1 - product**2) / ((1 - beta**2) * (1 - product) ** 2)
        running = self._count >= CORRECTION_START
        return CorrectionCoefficients(
            m_scale=_f32(1.0 / (1.0 - product)),
            v_scale=_f32(1.0 / (1.0 - self._theta_product)),
            noise_ratio=_f32(ratio),
            signal_scale=_f32(1.0 / (1.0 - ratio)) if running else 0.0,
            update_s=float(running),
            s_scale=_f32(1.0 / (1.0 - self._s_product)) if running else 0.0,
            own_share=_f32(1.0 / self.workers),
            mean_share=_f32(1.0 - 1.0 / self.workers),
        )


def per_shard(
    config: AdamConfig,
    layout: Layout,
    workers: int = 1,
    state: Mapping[str, Floats] | None = None,
) -> tuple[list[Adam], dict[str, Floats]]:
    """One Adam per shard over common state vectors, made here when they are None.

    Returns:
        The Adams in shard order, and the vectors, f32[layout.numel] by name: each Adam works on
        its shard's views of them.
    """
    vectors = dict(state or _fresh_state(config, layout.numel, workers))
    adams = []
    for shard in layout.shards:
        stop = shard.offset + shard.numel
        views = {name: array[shard.offset : stop] for name, array in vectors.items()}
        adams.append(Adam(config, shard.numel, workers=workers, state=views))
    return adams, vectors


def _fresh_state(config: AdamConfig, numel: int, workers: int) -> dict[str, Floats]:
    state = {name: np.zeros(numel, np.float32) for name in state_names(config, workers)}
    if config.eps_placement == "initial":
        state["v"].fill(config.eps)
    return state


def _corrects(config: AdamConfig, workers: int) -> bool:
    return config.variance_correction and workers > 1


def _f32(value: float) -> float:
    return float(np.float32(value))

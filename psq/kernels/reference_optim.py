"""Adam's arithmetic in NumPy: the definition that every native level equals bit for bit.

    m <- beta m + (1 - beta) g                written as a lerp, from m or from g, as torch does
    v <- theta v + (1 - theta) g^2
    u  = step_size m / (sqrt(v + eps_inside) / root + eps_outside)

    with bias correction   step_size = lr / (1 - product of beta), root = sqrt(1 - product of theta)
    without                step_size = lr, root = 1

Everything is float32, each operation rounded by itself (no FMA), in the order the lines below are
written. The order is that of torch.optim.Adam; what remains between the two is torch's own: FMA in
its lerp, addcmul and add, and a vectorised square root that is not exactly rounded. One departure:
where the denominator is 0 (a value that never had a gradient, with an eps that is not in the
denominator) u is 0, not 0/0.

Variance correction (theory: docs/design.md): a worker's v holds the noise of its own share of the
batch, W times the variance of the mean gradient's. With g = mu + noise, and r the variance of the
bias-corrected m per unit of noise variance, E[mhat^2] = mu^2 + r sigma^2 and E[vhat] = mu^2 +
sigma^2, so (mhat^2 - r vhat) / (1 - r) estimates mu^2. Its running mean s, bias-corrected and
clamped to [0, vhat], gives what the v of the mean gradient would be: vhat / W + (1 - 1/W) mu^2,
which is mu^2 + sigma^2 / W.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["AdamCoefficients", "CorrectionCoefficients", "adam_update", "adam_update_corrected"]

Floats: TypeAlias = NDArray[np.float32]


class AdamCoefficients(NamedTuple):
    """The numbers of one Adam step, each exactly a float32; in the order of the native struct."""

    m_weight: float  # 1 - beta if below 0.5: m + m_weight (g - m); else -beta: g + m_weight (g - m)
    theta: float
    theta_rest: float  # 1 - theta
    step_size: float
    root: float
    eps_inside: float
    eps_outside: float
    l2: float  # g + l2 x replaces g
    decay: float  # u + decay x replaces u


class CorrectionCoefficients(NamedTuple):
    """What the variance correction needs beside them; in the order of the native struct."""

    m_scale: float  # 1 / (1 - product of beta): mhat = m_scale m
    v_scale: float  # 1 / (1 - product of theta): vhat = v_scale v
    noise_ratio: float  # r
    signal_scale: float  # 1 / (1 - r)
    update_s: float  # 1: s takes this step's estimate; 0: too early, mu^2 = vhat corrects nothing
    s_scale: float  # 1 / (1 - product of theta over the steps that updated s)
    own_share: float  # 1 / W
    mean_share: float  # 1 - 1/W


def adam_update(  # noqa: PLR0913 - the letters of the equations
    g: Floats,
    m: Floats,
    v: Floats,
    out: Floats,
    coefficients: AdamCoefficients,
    *,
    vmax: Floats | None = None,
    x: Floats | None = None,
) -> None:
    """One Adam step's direction: what is to be subtracted from x.

    Args:
        g: gradient, f32[n].
        m: first moment, f32[n], updated.
        v: second moment, f32[n], updated.
        out: u, f32[n], written; may be g itself.
        coefficients: this step's numbers.
        vmax: largest v so far, f32[n], updated; AMSGrad when given.
        x: weights, f32[n]; needed where l2 or decay is not 0.
    """
    c = coefficients
    with np.errstate(over="ignore", invalid="ignore"):
        g = _with_l2(g, c, x)
        _moments(g, m, v, c)
        second = v
        if vmax is not None:
            vmax[:] = np.where(vmax > v, vmax, v)
            second = vmax
        denominator = np.sqrt(second + c.eps_inside) / c.root + c.eps_outside
        _quotient(m, denominator, out, c, x)


def adam_update_corrected(  # noqa: PLR0913, PLR0917 - the letters of the equations
    g: Floats,
    m: Floats,
    v: Floats,
    s: Floats,
    out: Floats,
    coefficients: AdamCoefficients,
    correction: CorrectionCoefficients,
    *,
    x: Floats | None = None,
) -> None:
    """The same with the mean gradient's v estimated from this worker's.

    Args:
        g: gradient, f32[n].
        m: first moment, f32[n], updated.
        v: second moment, f32[n], updated.
        s: running estimate of the squared mean gradient, f32[n], updated once `update_s` is 1.
        out: u, f32[n], written; may be g itself.
        coefficients: this step's numbers; `root` is not used.
        correction: this step's numbers of the correction.
        x: weights, f32[n]; needed where l2 or decay is not 0.
    """
    c, k = coefficients, correction
    with np.errstate(over="ignore", invalid="ignore"):
        g = _with_l2(g, c, x)
        _moments(g, m, v, c)
        vhat = v * k.v_scale
        squared_mean = vhat
        if k.update_s:
            mhat = m * k.m_scale
            estimate = (mhat * mhat - k.noise_ratio * vhat) * k.signal_scale
            s[:] = s * c.theta + c.theta_rest * estimate
            squared_mean = s * k.s_scale
            squared_mean = np.where(squared_mean > 0.0, squared_mean, np.float32(0.0))
            squared_mean = np.where(squared_mean < vhat, squared_mean, vhat)
        second: Floats = vhat * k.own_share + squared_mean * k.mean_share
        denominator = np.sqrt(second + c.eps_inside) + c.eps_outside
        _quotient(m, denominator, out, c, x)


def _with_l2(g: Floats, c: AdamCoefficients, x: Floats | None) -> Floats:
    return g if x is None or c.l2 == 0.0 else g + c.l2 * x


def _moments(g: Floats, m: Floats, v: Floats, c: AdamCoefficients) -> None:
    base = m if c.m_weight > 0.0 else g
    m[:] = base + c.m_weight * (g - m)
    v[:] = v * c.theta + (c.theta_rest * g) * g


def _quotient(
    m: Floats, denominator: Floats, out: Floats, c: AdamCoefficients, x: Floats | None
) -> None:
    denominator[denominator <= 0.0] = np.inf
    np.divide(c.step_size * m, denominator, out=out)
    if x is not None and c.decay != 0.0:
        out += c.decay * x

"""What a hostile worker says instead of its gradient: to test aggregates with, and to show them.

    sign-flip   -a g                      uphill
    scaled      -a g                      uphill, and louder than all others
    random      a rms(g) N(0, 1)          noise
    nan         NaN                       what a broken worker says, too
    silent      nothing                   the push never comes
    little      mean - z std              colluders, all alike, just inside the honest spread
                                          ("a little is enough", Baruch 2019)

Of little, z is the largest that still has enough honest workers behind it: of n workers, f of them
hostile, s = n // 2 + 1 - f honest ones must look worse than the attack, and z is the normal
quantile of (n - f - s) / (n - f). It needs what honest workers say, or an estimate of it: the
colluders' own gradients.

Nothing here is ever used by a server or a worker that trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from types import MappingProxyType
from typing import Final

import numpy as np

from psq.errors import UsageError
from psq.kernels import Floats

__all__ = ["ATTACKS", "attack", "little_quantile"]

ATTACKS: Final[Mapping[str, float]] = MappingProxyType(
    {"sign-flip": 1.0, "scaled": 100.0, "random": 10.0, "nan": 0.0, "silent": 0.0, "little": 0.0}
)
"""Each attack's name and its default strength a; of little 0 stands for the z above."""


def attack(  # noqa: PLR0913 - who attacks, with what, knowing what
    kind: str,
    gradient: Floats,
    *,
    seen: Sequence[Floats],
    world_size: int,
    hostile: int,
    rng: np.random.Generator,
    strength: float | None = None,
) -> Floats | None:
    """What a hostile worker says in one step.

    Args:
        kind: a name in `ATTACKS`.
        gradient: what it would say if it were honest, f32[n]; only read.
        seen: of little: what honest workers say, f32[n] each, at least two.
        world_size: n.
        hostile: f, how many attack; colluders who see the same say the same.
        rng: of random.
        strength: a, or z; the default is the attack's.

    Returns:
        f32[n], or None: it says nothing.

    Raises:
        UsageError: no such attack, or nothing to collude on.
    """
    if kind not in ATTACKS:
        msg = f"no attack is called {kind!r}; there are {', '.join(ATTACKS)}"
        raise UsageError(msg)
    a = np.float32(ATTACKS[kind] if strength is None else strength)
    match kind:
        case "sign-flip" | "scaled":
            return -a * gradient
        case "random":
            size = a * np.sqrt(np.mean(gradient * gradient))
            noise: Floats = rng.standard_normal(gradient.size).astype(np.float32)
            return noise * np.float32(size)
        case "nan":
            return np.full_like(gradient, np.nan)
        case "silent":
            return None
        case _:
            z = strength or little_quantile(world_size, hostile)
            return _little(seen, z)


def little_quantile(world_size: int, hostile: int) -> float:
    """The z of "a little is enough" for `hostile` of `world_size` workers.

    Raises:
        UsageError: nobody is honest, or nobody hostile.
    """
    honest = world_size - hostile
    if honest < 1 or hostile < 1:
        msg = f"{hostile} hostile of {world_size} workers: at least one of each kind is needed"
        raise UsageError(msg)
    supporters = world_size // 2 + 1 - hostile
    share = (honest - supporters) / honest
    return NormalDist().inv_cdf(share) if 0.0 < share < 1.0 else 0.0


def _little(seen: Sequence[Floats], z: float) -> Floats:
    if len(seen) < 2:  # noqa: PLR2004 - a spread takes two
        msg = f"colluders need the gradients of 2 or more workers, got {len(seen)}"
        raise UsageError(msg)
    table = np.stack(seen)
    said: Floats = table.mean(axis=0) - np.float32(z) * table.std(axis=0)
    return said

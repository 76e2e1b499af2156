"""Adam's settings as a value, and as plain data.

What they mean is written at `AdamConfig`; the arithmetic is in `psq.optim`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from psq.errors import ConfigError
from psq.schedules import Schedule, check_unit, schedule_from_plain, schedule_plain

__all__ = ["AdamConfig", "EpsPlacement", "adam_from_plain", "adam_plain", "replace_adam"]

EpsPlacement = Literal["outside", "inside", "initial"]


@dataclass(frozen=True, slots=True)
class AdamConfig:
    """Generic Adam.

    v = theta v + (1 - theta) g^2,  m = beta m + (1 - beta) g,  u = alpha m / (sqrt(v) + eps).

    Args:
        beta: weight of the old first moment, in [0, 1); a number or a schedule.
        theta: weight of the old second moment, in [0, 1); a number or a schedule.
        eps: > 0.
        eps_placement: "outside" sqrt(v) + eps (torch), "inside" sqrt(v + eps) (the paper's form),
            "initial" v_0 = eps and no eps later.
        bias_correction: divide m and v by one minus the product of their weights so far (torch
            does).
        amsgrad: use the largest v so far.
        weight_decay: >= 0.
        decoupled: AdamW's decay of the weights (True) or an L2 term in the gradient (False).
        variance_correction: estimate the whole cluster's second moment from one worker's (only
            where the moments live on a worker; see docs/design.md): the learning rate that suits
            plain Adam then suits W workers.
    """

    beta: Schedule = 0.9
    theta: Schedule = 0.999
    eps: float = 1e-8
    eps_placement: EpsPlacement = "outside"
    bias_correction: bool = True
    amsgrad: bool = False
    weight_decay: float = 0.0
    decoupled: bool = True
    variance_correction: bool = False

    def __post_init__(self) -> None:
        """Refuse what no Adam can run."""
        check_unit("beta", self.beta, allow_zero=True)
        check_unit("theta", self.theta, allow_zero=False)
        if not (math.isfinite(self.eps) and self.eps > 0.0):
            msg = f"eps must be > 0, got {self.eps!r}"
            raise ConfigError(msg)
        if self.eps_placement not in get_args(EpsPlacement):
            msg = (
                f"eps_placement must be one of {get_args(EpsPlacement)}, got {self.eps_placement!r}"
            )
            raise ConfigError(msg)
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0.0):
            msg = f"weight_decay must be >= 0, got {self.weight_decay!r}"
            raise ConfigError(msg)
        if self.variance_correction and (self.amsgrad or not self.bias_correction):
            msg = "variance_correction needs bias_correction and excludes amsgrad"
            raise ConfigError(msg)
        if self.variance_correction and not isinstance(self.beta, float | int):
            msg = "variance_correction needs a constant beta: its noise ratio is derived for one"
            raise ConfigError(msg)


def replace_adam(adam: AdamConfig, changes: Mapping[str, Any]) -> AdamConfig:
    """The same settings with some changed.

    Raises:
        ConfigError: there is no such setting, or Adam cannot run with it.
    """
    known = {f.name for f in dataclasses.fields(AdamConfig)}
    unknown = sorted(set(changes) - known)
    if unknown:
        msg = f"no Adam setting {', '.join(unknown)}; there are: {', '.join(sorted(known))}"
        raise ConfigError(msg)
    return dataclasses.replace(adam, **changes)


def adam_plain(adam: AdamConfig | None) -> dict[str, Any] | None:
    """Adam's settings as plain data, None as None."""
    if adam is None:
        return None
    plain = {f.name: getattr(adam, f.name) for f in dataclasses.fields(AdamConfig)}
    for name in ("beta", "theta"):
        plain[name] = schedule_plain(plain[name])
    for name in ("eps", "weight_decay"):
        plain[name] = float(plain[name])
    return plain


def adam_from_plain(plain: Mapping[str, Any] | None) -> AdamConfig | None:
    """Inverse of `adam_plain`.

    Raises:
        ConfigError, KeyError, TypeError: it is none.
    """
    if plain is None:
        return None
    flags = ("bias_correction", "amsgrad", "decoupled", "variance_correction")
    return AdamConfig(
        beta=schedule_from_plain(plain["beta"]),
        theta=schedule_from_plain(plain["theta"]),
        eps=_number(plain["eps"]),
        eps_placement=plain["eps_placement"],
        weight_decay=_number(plain["weight_decay"]),
        **{name: _flag(plain[name]) for name in flags},
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        msg = f"expected a number, got {value!r}"
        raise ConfigError(msg)
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        msg = f"expected true or false, got {value!r}"
        raise ConfigError(msg)
    return value

"""An algorithm as a value: five parts, composed, never a class tree.

    direction  (worker)  what a worker wants to say this step: its gradient, or an Adam update of
    its own uplink               how that is said: a codec, with or without error feedback
    aggregate  (server)  how the workers' messages become one
    apply      (server)  what the server does with it: add it to the weights, or take an Adam step
    downlink             how the server answers: weights through a codec, or the weights' change

A recipe is plain data. It travels in the plan, so that every process of a job can compare it, and
nothing in it is code: schedules are named families with numbers, not callables. The math lives in
`psq.optim`, `psq.feedback` and `psq_server.reduce`; this module only says what is meant and refuses
what makes no sense.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, get_args

from psq.errors import ConfigError

__all__ = [
    "MAX_EVERY",
    "MAX_LOCAL_STEPS",
    "PRESETS",
    "AdamConfig",
    "Apply",
    "ApplyKind",
    "Direction",
    "DirectionKind",
    "Downlink",
    "DownlinkKind",
    "EpsPlacement",
    "OneMinusPower",
    "Power",
    "Recipe",
    "Schedule",
    "Uplink",
    "preset",
    "schedule_value",
]

DirectionKind = Literal["gradient", "adam"]
ApplyKind = Literal["add", "adam"]
DownlinkKind = Literal["weights", "delta"]
AggregateKind = Literal["mean"]
EpsPlacement = Literal["outside", "inside", "initial"]
Meaning = Literal["gradient", "update"]


@dataclass(frozen=True, slots=True)
class Power:
    """value / t**exponent: the step sizes of the generic-Adam analyses (t counts from 1)."""

    value: float
    exponent: float


@dataclass(frozen=True, slots=True)
class OneMinusPower:
    """1 - value / t**exponent: a second-moment weight that approaches 1 (t counts from 1)."""

    value: float
    exponent: float


Schedule: TypeAlias = float | Power | OneMinusPower
MAX_EXPONENT: Final = 8.0


def schedule_value(schedule: Schedule, t: int) -> float:
    """The schedule at step t >= 1."""
    if isinstance(schedule, Power):
        return float(schedule.value / t**schedule.exponent)
    if isinstance(schedule, OneMinusPower):
        return float(1.0 - schedule.value / t**schedule.exponent)
    return schedule


def _check_unit(name: str, schedule: Schedule, *, allow_zero: bool) -> None:
    # With such an exponent a schedule that starts inside [0, 1) stays there, for any 64-bit t.
    if isinstance(schedule, Power | OneMinusPower) and not 0.0 <= schedule.exponent <= MAX_EXPONENT:
        msg = f"{name}: the exponent must lie in [0, {MAX_EXPONENT:g}], got {schedule!r}"
        raise ConfigError(msg)
    first = schedule_value(schedule, 1)
    low_ok = first >= 0.0 if allow_zero else first > 0.0
    if isinstance(schedule, OneMinusPower):
        # theta_1 = 1 - value may be 0: then v starts as g^2, which is well defined.
        low_ok = first >= 0.0
    if not (math.isfinite(first) and low_ok and first < 1.0):
        msg = f"{name} must lie in [0, 1) at t=1, got {first!r} from {schedule!r}"
        raise ConfigError(msg)


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
        _check_unit("beta", self.beta, allow_zero=True)
        _check_unit("theta", self.theta, allow_zero=False)
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


MAX_LOCAL_STEPS: Final = 1000
MAX_EVERY: Final = 1024


@dataclass(frozen=True, slots=True)
class Direction:
    """What a worker says: "gradient", or "adam" (its own moments, learning rate inside).

    An Adam worker may take several `local_steps` on its own weights before it says how far they
    have moved since the last round: it pushes in every `local_steps`-th step.
    """

    kind: DirectionKind = "gradient"
    adam: AdamConfig | None = None
    local_steps: int = 1

    def __post_init__(self) -> None:
        """An Adam direction has settings, a gradient has none, and takes no step by itself."""
        _check_choice("direction", self.kind, get_args(DirectionKind))
        _check_pair("direction", self.adam, needed=self.kind == "adam")
        _check_count("direction local_steps", self.local_steps, MAX_LOCAL_STEPS)
        if self.local_steps > 1 and self.kind != "adam":
            msg = (
                f"direction local_steps={self.local_steps} needs Adam on the workers, a "
                f"{self.kind} moves no weights: choose a recipe such as local-adam or qadam-1bit"
            )
            raise ConfigError(msg)

    @property
    def meaning(self) -> Meaning:
        """What the message is: a gradient, or an update that already holds the learning rate."""
        return "update" if self.kind == "adam" else "gradient"


@dataclass(frozen=True, slots=True)
class Uplink:
    """How a worker says it: a codec spec, and whether what it left out is said later.

    Each shard speaks in every `every`-th step, in rotation with the others.
    """

    codec: str
    error_feedback: bool = True
    every: int = 1

    def __post_init__(self) -> None:
        """A shard speaks now and then, or always."""
        _check_count("uplink every", self.every, MAX_EVERY)


@dataclass(frozen=True, slots=True)
class Apply:
    """What the server does: "add" the mean update, or step "adam" on the mean gradient."""

    kind: ApplyKind
    adam: AdamConfig | None = None

    def __post_init__(self) -> None:
        """An Adam step has settings, an addition has none; the correction is for worker moments."""
        _check_choice("apply", self.kind, get_args(ApplyKind))
        _check_pair("apply", self.adam, needed=self.kind == "adam")
        if self.adam is not None and self.adam.variance_correction:
            msg = "variance_correction is for worker moments: the server's v sees the mean gradient"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class Downlink:
    """How the server answers: "weights" through a codec, or the "delta" of the weights.

    With error_feedback (delta only) the server says later what its codec left out now.
    """

    kind: DownlinkKind
    codec: str
    error_feedback: bool = True

    def __post_init__(self) -> None:
        """Weights are sent whole each time: there is nothing to feed back."""
        _check_choice("downlink", self.kind, get_args(DownlinkKind))
        if self.kind == "weights" and self.error_feedback:
            msg = "a weights downlink has no error feedback: its next message repeats the weights"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One algorithm: see the module's docstring."""

    name: str
    direction: Direction
    uplink: Uplink
    apply: Apply
    downlink: Downlink
    aggregate: AggregateKind = field(default="mean")

    def __post_init__(self) -> None:
        """The meaning of the message must fit what the server does with it."""
        _check_choice("aggregate", self.aggregate, get_args(AggregateKind))
        wanted = "update" if self.apply.kind == "add" else "gradient"
        if self.direction.meaning != wanted:
            msg = (
                f"recipe {self.name!r}: apply={self.apply.kind} needs workers that send {wanted}s, "
                f"direction={self.direction.kind} sends {self.direction.meaning}s"
            )
            raise ConfigError(msg)
        if self.uplink.every > 1 and not self.uplink.error_feedback:
            msg = (
                f"recipe {self.name!r}: uplink every={self.uplink.every} needs error feedback: "
                "what a shard does not say waits in the residual"
            )
            raise ConfigError(msg)

    @property
    def adam(self) -> AdamConfig:
        """The Adam settings, wherever the moments live."""
        config = self.direction.adam or self.apply.adam
        if config is None:  # every present recipe has moments somewhere
            msg = f"recipe {self.name!r} has no Adam settings"
            raise ConfigError(msg)
        return config

    def with_adam(self, **changes: Any) -> Recipe:
        """The same recipe with some Adam settings changed, on whichever side they live."""
        if self.direction.adam is not None:
            adam = _replace_checked(self.direction.adam, changes)
            return dataclasses.replace(
                self, direction=dataclasses.replace(self.direction, adam=adam)
            )
        return dataclasses.replace(self, apply=Apply("adam", _replace_checked(self.adam, changes)))

    def with_codecs(self, *, uplink: str | None = None, downlink: str | None = None) -> Recipe:
        """The same recipe with other codecs.

        `downlink` may begin with "weights:" or "delta:" to change its kind, as in "delta:sign" or
        "weights:uniform:bits=8".
        """
        recipe = self
        if uplink is not None:
            recipe = dataclasses.replace(
                recipe, uplink=dataclasses.replace(self.uplink, codec=uplink)
            )
        if downlink is not None:
            recipe = dataclasses.replace(recipe, downlink=_parse_downlink(downlink, self.downlink))
        return recipe

    def with_rhythm(self, *, local_steps: int | None = None, every: int | None = None) -> Recipe:
        """The same recipe with another rhythm of pushes; None leaves what it has."""
        recipe = self
        if local_steps is not None:
            direction = dataclasses.replace(self.direction, local_steps=local_steps)
            recipe = dataclasses.replace(recipe, direction=direction)
        if every is not None:
            uplink = dataclasses.replace(self.uplink, every=every)
            recipe = dataclasses.replace(recipe, uplink=uplink)
        return recipe

    def to_plain(self) -> dict[str, Any]:
        """Plain data in a fixed order: what the plan's digest covers."""
        return {
            "name": self.name,
            "direction": {
                "kind": self.direction.kind,
                "adam": _adam_plain(self.direction.adam),
                "local_steps": self.direction.local_steps,
            },
            "uplink": {
                "codec": self.uplink.codec,
                "error_feedback": self.uplink.error_feedback,
                "every": self.uplink.every,
            },
            "aggregate": self.aggregate,
            "apply": {"kind": self.apply.kind, "adam": _adam_plain(self.apply.adam)},
            "downlink": {
                "kind": self.downlink.kind,
                "codec": self.downlink.codec,
                "error_feedback": self.downlink.error_feedback,
            },
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_plain`. Raises ConfigError on anything a recipe cannot be."""
        try:
            direction, apply = plain["direction"], plain["apply"]
            uplink, downlink = plain["uplink"], plain["downlink"]
            return cls(
                name=_text(plain["name"]),
                direction=Direction(
                    direction["kind"],
                    _adam_from_plain(direction["adam"]),
                    direction["local_steps"],
                ),
                uplink=Uplink(
                    _text(uplink["codec"]), _flag(uplink["error_feedback"]), uplink["every"]
                ),
                aggregate=plain["aggregate"],
                apply=Apply(apply["kind"], _adam_from_plain(apply["adam"])),
                downlink=Downlink(
                    downlink["kind"], _text(downlink["codec"]), _flag(downlink["error_feedback"])
                ),
            )
        except (KeyError, TypeError, AttributeError) as error:
            msg = f"not a recipe: {error!r}"
            raise ConfigError(msg) from error


def _server_adam(adam: AdamConfig) -> Recipe:
    return Recipe(
        "server-adam",
        Direction("gradient"),
        Uplink("lloyd-max:bits=4,block=256"),
        Apply("adam", adam),
        Downlink("delta", "lloyd-max:bits=3"),
    )


def _qadam(adam: AdamConfig) -> Recipe:
    return Recipe(
        "qadam",
        Direction("adam", adam),
        Uplink("log:k=2"),
        Apply("add"),
        Downlink("weights", "uniform:bits=8", error_feedback=False),
    )


def _qadam_1bit(adam: AdamConfig) -> Recipe:
    corrected = dataclasses.replace(adam, variance_correction=True)
    return Recipe(
        "qadam-1bit",
        Direction("adam", corrected),
        Uplink("sign:norm=l2"),
        Apply("add"),
        Downlink("delta", "sign:norm=l2"),
    )


def _local_adam(adam: AdamConfig) -> Recipe:
    one_bit = _qadam_1bit(adam)
    return dataclasses.replace(one_bit, name="local-adam").with_rhythm(local_steps=8)


def _efficient_adam(adam: AdamConfig) -> Recipe:
    return Recipe(
        "efficient-adam",
        Direction("adam", adam),
        Uplink("log:k=2"),
        Apply("add"),
        Downlink("delta", "log:k=2"),
    )


def _fp32(adam: AdamConfig) -> Recipe:
    return Recipe(
        "fp32",
        Direction("gradient"),
        Uplink("fp32", error_feedback=False),
        Apply("adam", adam),
        Downlink("weights", "fp32", error_feedback=False),
    )


PRESETS = {
    "server-adam": _server_adam,
    "qadam": _qadam,
    "qadam-1bit": _qadam_1bit,
    "local-adam": _local_adam,
    "efficient-adam": _efficient_adam,
    "fp32": _fp32,
}


def preset(name: str, adam: AdamConfig | None = None) -> Recipe:
    """One of PRESETS by name.

    Raises:
        ConfigError: no such recipe; the message lists what exists.
    """
    try:
        make = PRESETS[name]
    except KeyError:
        msg = f"no recipe {name!r}; there are: {', '.join(PRESETS)}"
        raise ConfigError(msg) from None
    return make(adam or AdamConfig())


def _parse_downlink(text: str, old: Downlink) -> Downlink:
    kind, _, codec = text.partition(":")
    if kind not in get_args(DownlinkKind):
        return dataclasses.replace(old, codec=text)
    if not codec:
        msg = f"downlink {text!r} names no codec: write for example {kind}:uniform:bits=8"
        raise ConfigError(msg)
    if kind == "weights":
        return Downlink("weights", codec, error_feedback=False)
    return Downlink("delta", codec, error_feedback=True)


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        msg = f"{what} must be one of {', '.join(choices)}, got {value!r}"
        raise ConfigError(msg)


def _check_count(what: str, value: int, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        msg = f"{what} must be a whole number 1..{most}, got {value!r}"
        raise ConfigError(msg)


def _check_pair(what: str, adam: AdamConfig | None, *, needed: bool) -> None:
    if needed != (adam is not None):
        msg = (
            f"{what}: Adam settings are {'needed' if needed else 'meaningless'} here, got {adam!r}"
        )
        raise ConfigError(msg)


def _replace_checked(adam: AdamConfig, changes: Mapping[str, Any]) -> AdamConfig:
    known = {f.name for f in dataclasses.fields(AdamConfig)}
    unknown = sorted(set(changes) - known)
    if unknown:
        msg = f"no Adam setting {', '.join(unknown)}; there are: {', '.join(sorted(known))}"
        raise ConfigError(msg)
    return dataclasses.replace(adam, **changes)


def _adam_plain(adam: AdamConfig | None) -> dict[str, Any] | None:
    if adam is None:
        return None
    plain = {f.name: getattr(adam, f.name) for f in dataclasses.fields(AdamConfig)}
    for name in ("beta", "theta"):
        plain[name] = _schedule_plain(plain[name])
    for name in ("eps", "weight_decay"):
        plain[name] = float(plain[name])
    return plain


def _adam_from_plain(plain: Mapping[str, Any] | None) -> AdamConfig | None:
    if plain is None:
        return None
    flags = ("bias_correction", "amsgrad", "decoupled", "variance_correction")
    return AdamConfig(
        beta=_schedule_from_plain(plain["beta"]),
        theta=_schedule_from_plain(plain["theta"]),
        eps=_number(plain["eps"]),
        eps_placement=plain["eps_placement"],
        weight_decay=_number(plain["weight_decay"]),
        **{name: _flag(plain[name]) for name in flags},
    )


def _schedule_plain(schedule: Schedule) -> float | list[Any]:
    if isinstance(schedule, Power | OneMinusPower):
        name = "power" if isinstance(schedule, Power) else "one-minus-power"
        return [name, float(schedule.value), float(schedule.exponent)]
    return float(schedule)


def _schedule_from_plain(plain: Any) -> Schedule:
    match plain:
        case ["power", value, exponent]:
            return Power(_number(value), _number(exponent))
        case ["one-minus-power", value, exponent]:
            return OneMinusPower(_number(value), _number(exponent))
    return _number(plain)


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


def _text(value: Any) -> str:
    if not isinstance(value, str):
        msg = f"expected text, got {value!r}"
        raise ConfigError(msg)
    return value

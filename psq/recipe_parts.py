"""The parts of a recipe as values: each knows its kind, its options, and what it cannot be.

What fits together is `psq.recipe`'s to say; what kinds there are, `psq.parts`'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from psq import parts
from psq.adam_config import AdamConfig
from psq.codec_text import widths_of
from psq.errors import ConfigError
from psq.parts import Options, Part, part

__all__ = [
    "MAX_EVERY",
    "MAX_LOCAL_STEPS",
    "Aggregate",
    "Apply",
    "Choice",
    "Direction",
    "Downlink",
    "DownlinkKind",
    "Uplink",
    "downlink_kind",
    "flag_from_plain",
    "part_from_plain",
    "part_plain",
    "text_from_plain",
]

DownlinkKind = Literal["weights", "delta", "mean"]

MAX_LOCAL_STEPS: Final = 1000
MAX_EVERY: Final = 1024
_NONE: Final[Options] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """Which codec a message is written in: see the parts of the slot "choice"."""

    kind: str = "fixed"
    options: Options = _NONE

    def __post_init__(self) -> None:
        """Its options, complete."""
        _complete(self, "choice")

    @property
    def part(self) -> Part:
        """What it is."""
        return part("choice", self.kind)

    def codecs(self, default: str) -> tuple[str, ...]:
        """Specs of all codecs that a message may be written in; the default is the first."""
        given = dict(self.options)
        specs = [default]
        for text in self.part.codecs:
            if text.startswith("@"):  # it has its number even where it is the default
                specs.append(str(given[text[1:]]))
            else:
                others = widths_of(default, int(given["least"]), int(given["most"]))
                specs += [spec for spec in others if spec != default]
        return tuple(specs)


@dataclass(frozen=True, slots=True)
class Direction:
    """What a worker says: its gradient, an Adam update of its own moments, ... (`psq.parts`).

    A worker that moves weights itself may take several `local_steps` on its own before it says how
    far they have come since the last round: it pushes in every `local_steps`-th step.
    """

    kind: str = "gradient"
    adam: AdamConfig | None = None
    local_steps: int = 1
    options: Options = _NONE

    def __post_init__(self) -> None:
        """Adam's settings where there is Adam, local steps where weights move, and its options."""
        _complete(self, "direction")
        _check_pair("direction", self.adam, needed=self.part.adam)
        _check_count("direction local_steps", self.local_steps, MAX_LOCAL_STEPS)
        if self.local_steps > 1 and not self.part.local:
            msg = (
                f"direction local_steps={self.local_steps} needs Adam on the workers, a "
                f"{self.kind} moves no weights: choose a recipe such as local-adam or qadam-1bit"
            )
            raise ConfigError(msg)
        _check_correction(self.adam, allowed=self.kind == "adam")

    @property
    def part(self) -> Part:
        """What it is."""
        return part("direction", self.kind)

    @property
    def meaning(self) -> str:
        """What the message is: a "gradient", an "update" with the learning rate, or a "vote"."""
        return self.part.says


@dataclass(frozen=True, slots=True)
class Uplink:
    """How a worker says it: a codec spec, and whether what it left out is said later.

    Each shard speaks in every `every`-th step, in rotation with the others. `choice` says in which
    messages another codec is used.
    """

    codec: str
    error_feedback: bool = True
    every: int = 1
    choice: Choice = field(default_factory=Choice)

    def __post_init__(self) -> None:
        """A shard speaks now and then, or always."""
        _check_count("uplink every", self.every, MAX_EVERY)
        self.choice.codecs(self.codec)


@dataclass(frozen=True, slots=True)
class Aggregate:
    """How the workers' messages become one (`psq.parts`)."""

    kind: str = "mean"
    options: Options = _NONE

    def __post_init__(self) -> None:
        """Its options, complete."""
        _complete(self, "aggregate")

    @property
    def part(self) -> Part:
        """What it is."""
        return part("aggregate", self.kind)


@dataclass(frozen=True, slots=True)
class Apply:
    """What becomes of the aggregate (`psq.parts`): on the server, or with a mean on every node."""

    kind: str
    adam: AdamConfig | None = None
    options: Options = _NONE

    def __post_init__(self) -> None:
        """Adam's settings where there is Adam; the correction is for worker moments."""
        _complete(self, "apply")
        _check_pair("apply", self.adam, needed=self.part.adam)
        _check_correction(self.adam, allowed=False)

    @property
    def part(self) -> Part:
        """What it is."""
        return part("apply", self.kind)


@dataclass(frozen=True, slots=True)
class Downlink:
    """How the server answers: "weights" through a codec, their "delta", or the "mean".

    With error_feedback (never of weights) the server says later what its codec left out now. The
    mean is what `aggregate` made, through the codec: every node applies it by itself.
    """

    kind: DownlinkKind
    codec: str
    error_feedback: bool = True
    choice: Choice = field(default_factory=Choice)

    def __post_init__(self) -> None:
        """Weights are sent whole each time: there is nothing to feed back, and one way to say."""
        downlink_kind(self.kind)
        if self.kind == "weights" and self.error_feedback:
            msg = "a weights downlink has no error feedback: its next message repeats the weights"
            raise ConfigError(msg)
        if self.kind == "weights" and self.choice.kind != "fixed":
            msg = (
                f"a weights downlink has one codec, got choice={self.choice.kind}: a worker that "
                "asks for its weights again gets what the others have"
            )
            raise ConfigError(msg)
        if not self.choice.part.clocked:
            msg = (
                f"downlink choice={self.choice.kind} is for workers: the server's answer has one "
                "that the round's number alone decides, such as first or periodic"
            )
            raise ConfigError(msg)
        self.choice.codecs(self.codec)


AnyPart: TypeAlias = Direction | Aggregate | Apply | Choice


def part_plain(each: AnyPart) -> dict[str, Any]:
    """Kind and options of a part as plain data, and who brings it."""
    return {"kind": each.kind, "package": each.part.package, "options": dict(each.options)}


def part_from_plain(slot: str, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Kind and options of a part in a plan, which has to name all options it has here.

    Raises:
        ConfigError, KeyError, TypeError: it is none, or another than the one here.
    """
    package = text_from_plain(plain["package"])
    made = part(slot, text_from_plain(plain["kind"]), package=package)
    names = [option.name for option in made.options]
    if made.package != package:
        msg = (
            f"{slot} {made.kind!r} is of package {made.package or 'psq'!r} here, the plan has that "
            f"of {package or 'psq'!r}: install the same everywhere"
        )
        raise ConfigError(msg)
    if set(plain["options"]) != set(names):
        msg = (
            f"{slot} {made.kind!r} has options {sorted(names)} here, the plan has "
            f"{sorted(plain['options'])}: run the same versions everywhere"
        )
        raise ConfigError(msg)
    return {"kind": made.kind, "options": parts.options(made, plain["options"])}


def _complete(each: AnyPart, slot: str) -> None:
    """Fill in the options that were not given."""
    object.__setattr__(each, "options", parts.options(part(slot, each.kind), each.options))


def downlink_kind(text: str) -> DownlinkKind:
    """The downlink that a text names.

    Raises:
        ConfigError: it names none.
    """
    for kind in get_args(DownlinkKind):
        if text == kind:
            return cast("DownlinkKind", kind)
    msg = f"downlink must be one of {', '.join(get_args(DownlinkKind))}, got {text!r:.200}"
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


def _check_correction(adam: AdamConfig | None, *, allowed: bool) -> None:
    if adam is not None and adam.variance_correction and not allowed:
        msg = "variance_correction is for worker moments: the server's v sees the mean gradient"
        raise ConfigError(msg)


def flag_from_plain(value: Any) -> bool:
    """True or false, and nothing else."""
    if not isinstance(value, bool):
        msg = f"expected true or false, got {value!r}"
        raise ConfigError(msg)
    return value


def text_from_plain(value: Any) -> str:
    """A text, and nothing else."""
    if not isinstance(value, str):
        msg = f"expected text, got {value!r}"
        raise ConfigError(msg)
    return value

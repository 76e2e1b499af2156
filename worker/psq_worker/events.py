"""What a training process tells the one that started it: one JSON object per line on stdout.

    {"psq": "started", "rank": 0, ...}       once, when the model is known
    {"psq": "progress", "rank": 0, ...}      now and then while it trains
    {"psq": "evaluation", "rank": 0, ...}    whenever the model was scored
    {"psq": "summary", "rank": 0, ...}       once, at the end

All counts and times are totals since the start, so a lost line loses nothing. Bytes are those of
the socket, headers included. A line that is none of these is the user's own output and is passed
on as it is. This module does no I/O and imports neither torch nor zmq.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, TypeAlias

__all__ = [
    "PHASES",
    "Counts",
    "Evaluation",
    "Event",
    "Progress",
    "Started",
    "Summary",
    "format_event",
    "parse_event",
]

PHASES: Final = ("compute", "encode", "wire", "server", "decode")
MAX_LINE_CHARS: Final = 65_536


@dataclass(frozen=True, slots=True)
class Started:
    """A worker knows its model and is about to train.

    Attributes:
        steps: how many steps it will make; 0 when only the user's script knows.
        numel: values in the model.
        recipe: name and codecs, in words.
        consistency: the job's rule, as in "bsp" or "ssp:2".
    """

    kind: ClassVar[str] = "started"
    rank: int = 0
    world_size: int = 1
    task: str = ""
    recipe: str = ""
    consistency: str = "bsp"
    steps: int = 0
    numel: int = 0
    text: str = ""


@dataclass(frozen=True, slots=True)
class Counts:
    """Where a worker stands: the totals that its progress and its summary have in common.

    Attributes:
        loss: mean over the steps since the last report; None when no step reported one.
        samples: trained on by this worker.
        elapsed_s: since the first step began.
        sent_bytes, received_bytes: on the wire, headers included.
        phases_s: seconds spent in each of PHASES during `timed_steps` steps: all but the first one
            and those right after an evaluation, which are no typical steps.
        exposed_s: of these, seconds of waiting for the network and for others that no computing
            hid.
        payload_bytes, said_numel: what was said in all steps, scales included and headers not, and
            how many values that says.
        staleness_sum, staleness_max: rounds that others were ahead when a step of this worker
            counted, over all steps; 0 under bsp.
        skipped: steps of which some gradient was not finite and was left out.
        rejected: other steps of which the server did not take all; it is still to be said.
    """

    rank: int = 0
    step: int = 0
    loss: float | None = None
    samples: int = 0
    elapsed_s: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    payload_bytes: int = 0
    said_numel: int = 0
    numel: int = 0
    skipped: int = 0
    rejected: int = 0
    timed_steps: int = 0
    phases_s: dict[str, float] = field(default_factory=dict)
    exposed_s: float = 0.0
    staleness_sum: int = 0
    staleness_max: int = 0


@dataclass(frozen=True, slots=True)
class Progress(Counts):
    """Where a worker stands, now and then.

    Attributes:
        steps: how many it will make; 0 when only the user's script knows.
        doing: "training", or "evaluating" when that is what comes next.
    """

    kind: ClassVar[str] = "progress"
    steps: int = 0
    doing: str = "training"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The model's scores after `step` steps; `metric` names the entry that counts."""

    kind: ClassVar[str] = "evaluation"
    rank: int = 0
    step: int = 0
    metric: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    sent_bytes: int = 0
    received_bytes: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Summary(Counts):
    """The end of one process: its last progress and scores. What `psq-worker --json` prints."""

    kind: ClassVar[str] = "summary"
    world_size: int = 1
    task: str = ""
    recipe: str = ""
    consistency: str = "bsp"
    metric: str = ""
    scores: dict[str, float] = field(default_factory=dict)


Event: TypeAlias = Started | Progress | Evaluation | Summary
_CLASSES: Final[dict[str, type[Event]]] = {
    cls.kind: cls for cls in (Started, Progress, Evaluation, Summary)
}


def format_event(event: Event) -> str:
    """The event as one line, without its end."""
    return json.dumps({"psq": event.kind, **dataclasses.asdict(event)}, separators=(",", ":"))


def parse_event(line: str) -> Event | None:
    """The event a line says, or None when the line is anything else."""
    if not line.startswith('{"psq":') or len(line) > MAX_LINE_CHARS:
        return None
    try:
        fields: dict[str, Any] = json.loads(line)
        event = _CLASSES[fields.pop("psq")](**fields)
    except (ValueError, TypeError, KeyError):
        return None
    return (
        event if all(_fits(getattr(event, f.name), f) for f in dataclasses.fields(event)) else None
    )


def _fits(value: Any, field: dataclasses.Field[Any]) -> bool:
    """Whether a value that came has the type of its field."""
    if field.type == "float | None":
        return value is None or _is_number(value)
    if field.type == "dict[str, float]":
        return isinstance(value, dict) and all(_is_number(number) for number in value.values())
    if field.type == "float":
        return _is_number(value)
    return type(value).__name__ == field.type


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

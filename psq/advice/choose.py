"""From measured rates and a link to one choice among the candidates, and a sentence that says why.

Pure: numbers in, words out. The fastest wins; of those within TIE of it the most exact, so that
nothing is rounded away for a gain that no one would notice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from psq.advice.candidates import (
    CAUTION,
    DEFAULT_MIN_BITS,
    DENSE,
    Candidate,
    Specs,
    message_bytes,
    plan_of,
)
from psq.advice.model import BOTTLENECKS, Cluster, Prediction, Rates, Work, link_s, predict

__all__ = ["TIE", "Advice", "Option", "Step", "advise"]

TIE: Final = 0.01
TEN_MS_S: Final = 0.01  # below this a fraction of a millisecond is worth a digit


@dataclass(frozen=True, slots=True)
class Step:
    """What is asked about.

    Attributes:
        specs: name and shape of each parameter.
        cluster: who takes part.
        compute_s: of forward and backward; 0 where nobody knows, which changes no ranking unless
            pushes overlap with it.
        overlap: pushes leave while backward runs.
    """

    specs: Specs
    cluster: Cluster
    compute_s: float = 0.0
    overlap: bool = False


@dataclass(frozen=True, slots=True)
class Option:
    """A candidate and what is predicted of it.

    Attributes:
        bits_up, bits_down: per value, as they travel, headers included.
        link_s: of the step, those that a link without a limit would save.
    """

    candidate: Candidate
    prediction: Prediction
    bits_up: float
    bits_down: float
    link_s: float


@dataclass(frozen=True, slots=True)
class Advice:
    """Every option, and which to take."""

    options: tuple[Option, ...]
    dense: Option
    chosen: Option

    @property
    def pays(self) -> bool:
        """Whether anything is gained by not sending dense float32."""
        return self.chosen.candidate != DENSE

    @property
    def gain(self) -> float:
        """Seconds of a dense step over those of the chosen one."""
        return self.dense.prediction.step_s / self.chosen.prediction.step_s

    @property
    def sentence(self) -> str:
        """What to do, plainly."""
        dense = self.dense.prediction.step_s
        if not self.pays:
            return (
                f"Compression does not pay here: {_ms(self.dense.link_s)} of {_ms(dense)} ms a "
                f"step are the link's; use fp32: {DENSE.flags}"
            )
        best = self.chosen.prediction
        words = (
            f"Use {self.chosen.candidate.flags}: {_ms(best.step_s)} ms a step where dense fp32 "
            f"takes {_ms(dense)}, {self.gain:.1f} times as fast; what limits it then: "
            f"{BOTTLENECKS[best.bottleneck]}."
        )
        few = min(self.chosen.candidate.bits) < DEFAULT_MIN_BITS
        return f"{words} {CAUTION}" if few else words


def advise(step: Step, rates: Mapping[str, Rates], choices: Sequence[Candidate]) -> Advice:
    """Predict a step with each candidate and choose one.

    Args:
        step: what is asked about.
        rates: of each candidate, by its name.
        choices: the candidates, the most exact first, dense float32 among them.

    Raises:
        ConfigError: the model cannot be cut for so many servers, or the cluster cannot be.
    """
    options = tuple(_option(step, each, rates[each.name]) for each in choices)
    fastest_s = min(option.prediction.step_s for option in options)
    return Advice(
        options,
        dense=next(option for option in options if option.candidate == DENSE),
        chosen=next(o for o in options if o.prediction.step_s <= fastest_s * (1 + TIE)),
    )


def _option(step: Step, candidate: Candidate, rates: Rates) -> Option:
    plan = plan_of(candidate, step.specs, step.cluster.workers, step.cluster.servers)
    up_bytes, down_bytes = message_bytes(plan)
    numel, shards = plan.layout.numel, len(plan.layout.shards)
    work = Work(numel, shards, up_bytes, down_bytes, rates)
    return Option(
        candidate,
        predict(work, step.cluster, compute_s=step.compute_s, overlap=step.overlap),
        bits_up=8 * up_bytes / numel,
        bits_down=8 * down_bytes / numel,
        link_s=link_s(work, step.cluster, compute_s=step.compute_s, overlap=step.overlap),
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= TEN_MS_S else f"{1e3 * seconds:.2g}"

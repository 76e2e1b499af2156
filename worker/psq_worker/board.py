"""What a launcher knows of a job: the workers' events, put together. Pure: the time is an argument.

Display, summary and picture read a `Board`; nothing else does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from psq_worker.events import PHASES, Counts, Evaluation, Event, Progress, Started, Summary

__all__ = [
    "FP32_BITS",
    "Board",
    "Point",
    "RankState",
    "bits_curve",
    "metric_words",
    "saved_bytes",
]

FP32_BITS: Final = 32
QUIET_AFTER_S: Final = 2.0  # a worker silent for longer is shown as quiet
CURVE_PARTS: Final = 60
NEW_RATE_WEIGHT: Final = 0.3  # of the newest in the running mean of samples per second


@dataclass(frozen=True, slots=True)
class Point:
    """Mean loss of one rank over its steps (step - steps, step], and its bytes up to there.

    `bits` is what a value that it said in these steps took on average; None where it said none.
    """

    rank: int
    step: int
    steps: int
    loss: float
    sent_bytes: int
    bits: float | None = None


@dataclass(slots=True)
class RankState:
    """One worker as it was last heard of.

    Attributes:
        rank: its number.
        progress, started, summary: the last event of each kind.
        samples_per_s: a running mean.
        exposed_s: per step, over those that the last progress told of; None before a timed one.
        heard_s: when it last said anything.
        wait: what it said it waits for.
    """

    rank: int
    progress: Progress = field(default_factory=Progress)
    started: Started | None = None
    summary: Summary | None = None
    samples_per_s: float = 0.0
    exposed_s: float | None = None
    heard_s: float | None = None
    wait: str = ""

    def state(self, now_s: float) -> str:
        """In a word or two: what it does now."""
        if self.summary is not None:
            return "done"
        if self.heard_s is None:
            return "starting"
        quiet_s = now_s - self.heard_s
        busy = self.progress.doing if self.progress.step else "joining"
        quiet = "quiet" if busy == "training" else busy
        return self.wait or (busy if quiet_s < QUIET_AFTER_S else f"{quiet} {quiet_s:.0f} s")


class Board:
    """All workers of a job.

    Args:
        world_size: how many there are.
        servers: how many servers they talk to.
        alone: there is one process that sends nothing: the bytes it reports are what dense fp32
            would take.

    Attributes:
        lost: the ranks that the job went on without, and the codes that they ended with;
            None: with the job.
    """

    def __init__(self, world_size: int, *, servers: int = 1, alone: bool = False) -> None:
        self.servers = 0 if alone else servers
        self.alone = alone
        self.ranks = [RankState(rank) for rank in range(world_size)]
        self.points: list[Point] = []
        self.evaluations: list[Evaluation] = []
        self.lost: dict[int, int | None] = {}

    def add(self, event: Event, now_s: float) -> None:
        """Take one event in; one of an unknown rank is ignored."""
        if not 0 <= event.rank < len(self.ranks):
            return
        state = self.ranks[event.rank]
        state.heard_s, state.wait = now_s, ""
        match event:
            case Started():
                state.started = event
            case Progress():
                self._advance(state, event)
            case Evaluation():
                self.evaluations.append(event)
            case Summary():
                state.summary = event
                if event.step > state.progress.step:  # a script's last steps, not reported yet
                    self._advance(state, _progress_of(event, state.progress))

    def waits(self, rank: int, words: str) -> None:
        """A worker said whom it waits for; its next event ends that."""
        self.ranks[rank].wait = words

    def loses(self, rank: int, code: int | None) -> None:
        """The job goes on without a worker, which ended with this code; None: it still runs."""
        self.lost[rank] = code
        self.ranks[rank].samples_per_s = 0.0
        self.ranks[rank].wait = "lost"

    @property
    def steps(self) -> int:
        """How many steps the job will make; 0 while nobody knows."""
        return max((state.progress.steps for state in self.ranks), default=0)

    @property
    def step(self) -> int:
        """Steps that every worker has made that is still there."""
        there = (state for state in self.ranks if state.rank not in self.lost)
        return min((state.progress.step for state in there), default=0)

    @property
    def numel(self) -> int:
        """Values in the model; 0 while nobody knows."""
        return max((state.progress.numel for state in self.ranks), default=0)

    @property
    def samples_per_s(self) -> float:
        """Of all workers together."""
        return sum(state.samples_per_s for state in self.ranks)

    @property
    def consistency(self) -> str:
        """The job's rule; "bsp" while nobody has said another."""
        told = (state.started.consistency for state in self.ranks if state.started is not None)
        return next((rule for rule in told if rule != "bsp"), "bsp")

    @property
    def exposed_s(self) -> float | None:
        """Per step, the mean of all workers; None before anybody knows."""
        known = [state.exposed_s for state in self.ranks if state.exposed_s is not None]
        return sum(known) / len(known) if known else None

    @property
    def saved_bytes(self) -> int:
        """What fp32 both ways would have taken beyond what was taken, all workers together."""
        return sum(saved_bytes(state.progress) for state in self.ranks)

    def summary(self) -> dict[str, Any]:
        """The job in numbers, as `psq launch --json` prints it.

        The loss is the mean over the last tenth of the steps: that of one batch says little. Bytes
        are those of one worker, times those of one step, both averaged over the workers.
        Steps right after an evaluation are left out of the times, and so of `samples_per_s`.
        `exposed_s` is, per step, the waiting that no computing hid. `payload_bits` is what a value
        that was pushed took in its payload, without headers; None where none was. `bits_curve` is
        the same by steps, for recipes that choose their codec as they go.
        """
        ends = [state.summary for state in self.ranks if state.summary is not None]
        if not ends:
            return {}
        first = ends[0]
        steps = max(end.step for end in ends)
        scores = next((end.scores for end in ends if end.scores), {})
        metric = next((end.metric for end in ends if end.metric), "")
        samples = sum(end.samples for end in ends)
        step_s = _step_s(ends)
        return {
            "task": first.task,
            "recipe": first.recipe,
            "workers": len(self.ranks),
            "servers": self.servers,
            "lost": [{"rank": r, "exit_code": code} for r, code in sorted(self.lost.items())],
            "steps": steps,
            "numel": first.numel,
            "samples": samples,
            "samples_per_s": samples / steps / step_s["total"] if step_s["total"] else 0.0,
            "elapsed_s": max(end.elapsed_s for end in ends),
            "loss": _late_loss(self.points, steps),
            "metric": metric,
            "score": scores.get(metric),
            "scores": scores,
            "skipped": sum(end.skipped for end in ends),
            "rejected": sum(end.rejected for end in ends),
            "wire": _wire(ends),
            "payload_bits": _bits(
                sum(end.payload_bytes for end in ends), sum(end.said_numel for end in ends)
            ),
            "bits_curve": bits_curve([(p.step, p.steps, p.bits) for p in self.points], steps),
            "step_s": step_s,
            "exposed_s": _per_timed_step(ends, sum(end.exposed_s for end in ends)),
            "consistency": first.consistency,
            "staleness": {
                "mean": sum(end.staleness_sum for end in ends) / max(1, sum(e.step for e in ends)),
                "max": max(end.staleness_max for end in ends),
            },
        }

    def _advance(self, state: RankState, event: Progress) -> None:
        old = state.progress
        state.progress = event
        seconds = event.elapsed_s - old.elapsed_s
        if old.step and seconds > 0:  # the first step's time is not known
            rate = (event.samples - old.samples) / seconds
            weight = NEW_RATE_WEIGHT if state.samples_per_s else 1.0
            state.samples_per_s += weight * (rate - state.samples_per_s)
        timed = event.timed_steps - old.timed_steps
        if timed > 0:
            state.exposed_s = (event.exposed_s - old.exposed_s) / timed
        if event.loss is not None and event.step > old.step:
            made = event.step - old.step
            bits = _bits(event.payload_bytes - old.payload_bytes, event.said_numel - old.said_numel)
            point = Point(event.rank, event.step, made, event.loss, event.sent_bytes, bits)
            self.points.append(point)


def _bits(payload_bytes: int, said_numel: int) -> float | None:
    """What a value took; None where none was said."""
    return 8 * payload_bytes / said_numel if said_numel > 0 else None


def bits_curve(
    points: Iterable[tuple[int, int, float | None]], steps: int
) -> list[dict[str, float]]:
    """What a value took over the steps: means over `CURVE_PARTS` equal parts, at their last step.

    Args:
        points: (step, steps that it is the mean of, bits), of any worker.
        steps: of the job.
    """
    parts: dict[int, list[float]] = {}
    for step, made, bits in points:
        if bits is None:
            continue
        row = parts.setdefault((step - 1) * CURVE_PARTS // max(1, steps), [0.0, 0.0, 0.0])
        row[0], row[1], row[2] = max(row[0], step), row[1] + made, row[2] + made * bits
    return [{"step": int(last), "bits": total / made} for _, (last, made, total) in
            sorted(parts.items())]  # fmt: skip


def _progress_of(end: Summary, old: Progress) -> Progress:
    """How far a process was when it ended."""
    said = {each.name: getattr(end, each.name) for each in dataclasses.fields(Counts)}
    return dataclasses.replace(old, **said)


def metric_words(metric: str) -> str:
    """What a score is, in words: "test accuracy", "test loss"."""
    return f"test {metric.removeprefix('test_').removeprefix('val_').replace('_', ' ')}"


def saved_bytes(progress: Progress) -> int:
    """What fp32 both ways would have taken beyond what one worker sent and received."""
    dense = 2 * FP32_BITS // 8 * progress.numel * progress.step
    return dense - progress.sent_bytes - progress.received_bytes


def _late_loss(points: list[Point], steps: int) -> float | None:
    """The mean loss of the last tenth of the steps, all workers together; None if none was said."""
    start = steps - max(1, steps // 10)
    late = [(point.loss, min(point.steps, point.step - start)) for point in points]
    count = sum(made for _, made in late if made > 0)
    return sum(loss * made for loss, made in late if made > 0) / count if count else None


def _wire(ends: list[Summary]) -> dict[str, float]:
    sent = sum(end.sent_bytes for end in ends) / len(ends)
    received = sum(end.received_bytes for end in ends) / len(ends)
    values = sum(end.numel * end.step for end in ends) / len(ends)
    up, down = (8 * count / values if values else 0.0 for count in (sent, received))
    return {
        "sent_bytes": sent,
        "received_bytes": received,
        "bits_per_parameter_up": up,
        "bits_per_parameter_down": down,
        "compression_ratio_up": FP32_BITS / up if up else 0.0,
        "compression_ratio_down": FP32_BITS / down if down else 0.0,
        "compression_ratio": 2 * FP32_BITS / (up + down) if up + down else 0.0,
    }


def _step_s(ends: list[Summary]) -> dict[str, float]:
    split = {
        phase: _per_timed_step(ends, sum(end.phases_s.get(phase, 0.0) for end in ends))
        for phase in PHASES
    }
    return {"total": sum(split.values()), **split}


def _per_timed_step(ends: list[Summary], seconds: float) -> float:
    timed = sum(end.timed_steps for end in ends)
    return seconds / timed if timed else 0.0

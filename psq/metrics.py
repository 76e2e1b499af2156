"""What a process tells Prometheus: names, units and meanings, once for servers and workers.

Two kinds of numbers. Durations are observed where they are measured (`observe_step`,
`observe_phase`); everything else is a plain count that its owner keeps anyway, read through one
callable at the moment of a scrape. So counting costs the hot path next to nothing, and
prometheus_client, whose import is a fifth of a server's start, is needed only when somebody asks.
The library's default collectors (which name this process's files and threads) stay out.

Never here: sockets. `psq_server.health` serves what `exposition` returns.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

__all__ = ["CONTENT_TYPE", "PHASES", "Metrics", "Totals"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
PHASES: Final = (
    *("compute", "encode", "wire", "server", "decode"),
    *("wait", "receive", "reduce", "send"),
)
"""Of a worker's step the first five, of a server's round the last four (wait: for frames)."""
BUCKETS_S: Final = (
    *(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    *(1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
)
"""Upper bounds of the histograms' buckets; one more holds what is longer."""
BUCKETS_STEPS: Final = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0, 64.0)
"""The same of staleness."""


@dataclass(frozen=True, slots=True)
class Totals:
    """The counts at one moment; what a role does not have keeps its default and is still shown.

    Attributes:
        sent_bytes, received_bytes: on the wire, with headers.
        rounds: rounds this server has committed, or steps of this worker that were applied.
        version: of the weights held now; -1 before the first.
        pushes: contributions (worker) or shards (server) by outcome.
        skipped: contributions of nothing, because a gradient was not finite.
        evicted: ranks that rounds went on without, each time that one was lost.
        rejected: contributions that did not count, or not wholly, by rank and kind of reason.
        workers: how many ranks are in each state.
        waiting_s: how long the present wait has lasted; 0 when nobody is waited for.
        staleness_steps: how many rounds behind the newest known weights the ones in use are.
        insecure: whether an address other than loopback is served without encryption.
        durable_version: the newest version that a crash does not take back; -1: none.
        blocked: whether the disk refuses what has to be durable.
        journal_bytes: payload that was handed to the journal.
        checkpoints: how many were written, and how many could not be, as "written" and "failed".
        copies: of checkpoints elsewhere, as "copied", "failed" and "overtaken" by a newer one.
        checkpoint_age_s: of the newest one.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    rounds: int = 0
    version: int = -1
    pushes: Mapping[str, int] = field(default_factory=dict)
    skipped: int = 0
    evicted: int = 0
    rejected: Mapping[tuple[int, str], int] = field(default_factory=dict)
    workers: Mapping[str, int] = field(default_factory=dict)
    waiting_s: float = 0.0
    staleness_steps: int = 0
    insecure: bool = False
    durable_version: int = -1
    blocked: bool = False
    journal_bytes: int = 0
    checkpoints: Mapping[str, int] = field(default_factory=dict)
    copies: Mapping[str, int] = field(default_factory=dict)
    checkpoint_age_s: float = 0.0


class Metrics:
    """The metrics of one process; nothing is shared between two in one process.

    Args:
        role: "server" or "worker".
        version: of the package.
        kernel: the live kernel level.
        read: gives the present counts; called in the thread that serves a scrape: must not block.
    """

    def __init__(self, *, role: str, version: str, kernel: str, read: Callable[[], Totals]) -> None:
        self._build = {"role": role, "version": version, "kernel": kernel}
        self._read = read
        self._step = _Histogram()
        self._staleness = _Histogram(BUCKETS_STEPS)
        self._phases = {phase: _Histogram() for phase in PHASES}

    def observe_step(self, duration_s: float) -> None:
        """A round or step has ended that took this long."""
        self._step.observe(duration_s)

    def observe_phase(self, phase: str, duration_s: float) -> None:
        """One round or step spent this long in `phase`, one of PHASES."""
        self._phases[phase].observe(duration_s)

    def observe_staleness(self, steps: int) -> None:
        """A contribution was applied that had been computed so many rounds before."""
        self._staleness.observe(steps)

    def registry(self) -> CollectorRegistry:
        """A registry of these metrics alone, for whoever serves several."""
        from prometheus_client import CollectorRegistry  # noqa: PLC0415 - see the module's docstring

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return registry

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format (`CONTENT_TYPE`)."""
        from prometheus_client import generate_latest  # noqa: PLC0415 - as above

        return generate_latest(self.registry())

    def collect(self) -> Iterator[Metric]:
        """The metric families, as prometheus_client asks for them."""
        yield from _families(self._build, self._read())
        step = _family("psq_step_seconds", "Time from one committed round or step to the next", [])
        self._step.add_to(step, [])
        yield step
        phase = _family("psq_phase_seconds", "Time of a round or step in one phase", ["phase"])
        for name, histogram in self._phases.items():
            if histogram.count:
                histogram.add_to(phase, [name])
        yield phase
        if self._staleness.count:
            text = "Rounds between the weights a contribution came from and the round it counted in"
            applied = _family("psq_applied_staleness_steps", text, [])
            self._staleness.add_to(applied, [])
            yield applied


class _Histogram:
    """Counts by size, and the sum of all."""

    def __init__(self, bounds: tuple[float, ...] = BUCKETS_S) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    @property
    def count(self) -> int:
        return sum(self._counts)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: list[str]) -> None:
        bounds = [*map(str, self._bounds), "+Inf"]
        cumulative = [float(count) for count in accumulate(self._counts)]
        family.add_metric(labels, list(zip(bounds, cumulative, strict=True)), self._sum)


def _family(name: str, text: str, labels: list[str]) -> HistogramMetricFamily:
    from prometheus_client.core import HistogramMetricFamily  # noqa: PLC0415 - as above

    return HistogramMetricFamily(name, text, labels=labels)


def _families(build: Mapping[str, str], totals: Totals) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415

    info = GaugeMetricFamily("psq_build_info", "What runs here: always 1", labels=list(build))
    info.add_metric(list(build.values()), 1)
    yield info
    directions = {"sent": totals.sent_bytes, "received": totals.received_bytes}
    yield _counter("psq_wire_bytes", "Bytes on the wire with headers", "direction", directions)
    yield CounterMetricFamily("psq_rounds", "Committed rounds", totals.rounds)
    yield _counter("psq_pushes", "Pushes by what became of them", "outcome", totals.pushes)
    yield CounterMetricFamily(
        "psq_skipped", "Contributions of nothing: gradient not finite", totals.skipped
    )
    yield CounterMetricFamily("psq_evicted", "Lost ranks that were given up", totals.evicted)
    rejected = CounterMetricFamily(
        "psq_rejected",
        "Contributions that did not count, or not wholly",
        labels=["rank", "reason"],
    )
    for (rank, kind), count in sorted(totals.rejected.items()):
        rejected.add_metric([str(rank), kind], count)
    yield rejected
    yield CounterMetricFamily(
        "psq_journal_bytes", "Payload handed to the journal", totals.journal_bytes
    )
    yield _counter(
        "psq_checkpoints", "Checkpoints by what came of them", "outcome", totals.checkpoints
    )
    yield _counter(
        "psq_checkpoint_copies",
        "Checkpoints to be copied elsewhere by what came of it",
        "outcome",
        totals.copies,
    )
    workers = GaugeMetricFamily("psq_workers", "Ranks by state", labels=["state"])
    for state, count in totals.workers.items():
        workers.add_metric([state], count)
    yield workers
    for name, text, value in (
        ("psq_version", "Version of the weights; -1 before the first", totals.version),
        ("psq_waiting_seconds", "Age of the present wait", totals.waiting_s),
        ("psq_staleness_steps", "Rounds the weights in use are behind", totals.staleness_steps),
        ("psq_insecure", "1: other machines are served in the clear", int(totals.insecure)),
        (
            "psq_durable_version",
            "Newest version that a crash does not take back; -1: none",
            totals.durable_version,
        ),
        ("psq_blocked", "1: the disk refuses what has to be durable", int(totals.blocked)),
        ("psq_checkpoint_age_seconds", "Age of the newest checkpoint", totals.checkpoint_age_s),
    ):
        yield GaugeMetricFamily(name, text, value)


def _counter(name: str, text: str, label: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    from prometheus_client.core import CounterMetricFamily  # noqa: PLC0415 - as above

    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
